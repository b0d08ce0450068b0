"""``logquant eval``: what caches cost in accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .interrupt import Interrupt, interruptible
from .shared import (
    Caches,
    Dtype,
    Json,
    Model,
    bad,
    cache_list,
    check_fits,
    check_model,
    errors_of,
    load_model,
    megabytes,
    not_among,
    progress,
    texts,
    write_json,
)
from .tables import ResultTable

if TYPE_CHECKING:
    from ..methods.registry import CacheSpec

Rows = list[dict[str, Any]]


class Task(str, Enum):
    """What ``eval`` measures."""

    kl = "kl"
    greedy = "greedy"
    passkey = "passkey"


def command(
    files: Annotated[list[Path] | None, typer.Argument(help="More files of text.", show_default=False)] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A file of text; may be given several times.")] = None,
    model: Model = None,
    caches: Caches = "logquant,recent,full",
    tasks: Annotated[
        str, typer.Option(help="Separated by commas: kl, greedy (tokens written alike), passkey (needs no text).")
    ] = "kl",
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, which attends to itself exactly.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it, in every text.")] = 1000,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens decoded at once; more than 1 is faster, but flatters.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts run at once.")] = 8,
    passkey_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text that holds a passkey.")] = 2000,
    passkey_texts: Annotated[int, typer.Option(min=1, help="Such texts for each of five depths.")] = 5,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    json_file: Json = None,
) -> None:
    """Measure what a cache costs: by teacher forcing on real text, in greedy decoding, and in recalling a passkey.

    kl is divergence from the full cache, perplexity and top-1 agreement. "minus first" is the 95 % interval of how
    much higher KL is than that of the first cache, text by text.
    """
    arguments = dict(locals())
    wanted = _tasks(tasks)
    on_text = Task.kl in wanted or Task.greedy in wanted
    paths = [*(text or []), *(files or [])]
    if on_text and not paths:
        raise bad("FILES", "tasks kl and greedy need at least one file of text, got none")
    if on_text:
        texts("--text", text or [])
        texts("FILES", files or [])
    not_among("--json", json_file, paths)
    check_model(model)
    specs = cache_list("--caches", caches)
    loaded, tokenizer = load_model(model, dtype)
    check_fits("--caches", specs, loaded.config)
    run = _Run(loaded, tokenizer, specs, arguments)
    if on_text:
        run.read(paths, prefill + tokens + 1 if Task.kl in wanted else prefill)
    if Task.passkey in wanted:
        run.check_passkey()
    rows: Rows = [{"cache": spec.name} for spec in specs]
    with interruptible() as run.interrupted:
        for task in wanted:
            if not run.interrupted():
                _MEASURES[task](run, rows)
    if any(len(row) > 1 for row in rows):
        write_json(json_file, "eval", arguments, results=rows)
    run.interrupted.leave()


def _tasks(text: str) -> list[Task]:
    """Tasks, separated by commas, in their own order."""
    known = [task.value for task in Task]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in known:
            raise bad("--tasks", f"tasks must be of {', '.join(known)}, separated by commas; got {name!r}")
    return [task for task in Task if task.value in names]


@dataclass
class _Run:
    """What every task needs.

    Args:
        model, tokenizer, specs: of the measurement.
        arguments: of the command.
        ids: token ids ``[texts, length]``, for tasks on text.
        interrupted: whether Ctrl-C was pressed.
    """

    model: Any
    tokenizer: Any
    specs: list[CacheSpec]
    arguments: dict[str, Any]
    ids: Any = None
    interrupted: Interrupt = field(default_factory=Interrupt)

    def read(self, paths: list[Path], length: int) -> None:
        """Read ``length`` tokens of each text."""
        from ..eval import read_tokens

        with errors_of("FILES, --text, --prefill, --tokens"):
            self.ids = read_tokens(self.tokenizer, paths, length)

    def check_passkey(self) -> None:
        """Refuse texts that are too short for a passkey."""
        from ..eval import passkey_text

        with errors_of("--passkey-tokens"):
            passkey_text(self.tokenizer, "11111", 0.0, self.arguments["passkey_tokens"])


def _kl(run: _Run, rows: Rows) -> None:
    from ..eval import evaluate

    texts, tokens = len(run.ids), run.arguments["tokens"]
    sizes = {name: run.arguments[name] for name in ("prefill", "chunk", "batch_size")}
    with progress(f"{texts} texts, {tokens} tokens each", texts * tokens) as advance:
        scores = evaluate(run.model, run.ids, run.specs, **sizes, on_progress=advance, stop=run.interrupted)
    if scores[0].nll:
        for row, each in zip(rows, scores, strict=True):
            row.update(each.as_dict())
            if each is not scores[0]:
                row["minus"] = each.minus(scores[0])
        _kl_table(rows).show()


def _greedy(run: _Run, rows: Rows) -> None:
    from ..eval import greedy_agreement

    prompts = run.ids[:, : run.arguments["prefill"]]
    sizes = {name: run.arguments[name] for name in ("tokens", "batch_size")}
    with progress("greedy decoding", len(run.specs) * len(prompts) * sizes["tokens"]) as advance:
        scores = greedy_agreement(run.model, prompts, run.specs, **sizes, on_progress=advance, stop=run.interrupted)
    if scores[0].agreement:
        for row, each in zip(rows, scores, strict=True):
            row["greedy"] = each.as_dict()
        _greedy_table(rows).show()


def _passkey(run: _Run, rows: Rows) -> None:
    from ..eval import DEPTHS, passkey

    sizes = {"length": run.arguments["passkey_tokens"], "texts": run.arguments["passkey_texts"]}
    with progress("passkeys", len(run.specs) * sizes["texts"] * len(DEPTHS)) as advance:
        scores = passkey(run.model, run.tokenizer, run.specs, **sizes, on_progress=advance, stop=run.interrupted)
    if any(scores[0].found.values()):
        for row, each in zip(rows, scores, strict=True):
            row["passkey"] = each.as_dict()
        _passkey_table(rows).show()


_MEASURES = {Task.kl: _kl, Task.greedy: _greedy, Task.passkey: _passkey}


def _kl_table(rows: Rows) -> ResultTable:
    table = ResultTable(
        (
            *("cache", "KL", "95 % of KL", "minus first: from", "to", "KL, p99", "KL, p99.9", "KL > 1"),
            *("ppl", "top-1", "bits", "bytes/token", "bytes/text"),
        )
    )
    for row in rows:
        table.add_row(
            row["cache"],
            f"{row['kl']:.4f}",
            "{:.3f}-{:.3f}".format(*row["kl_interval"]) if row["kl_interval"] else "-",
            *([f"{bound:+.4f}" for bound in row.get("minus", {}).get("interval") or ()] or ["-", "-"]),
            f"{row['kl_p99']:.4f}",
            f"{row['kl_p999']:.4f}",
            f"{row['kl_above_1']:.2%}",
            f"{row['ppl']:.2f}",
            f"{row['top1']:.3f}",
            f"{row['bits_per_element']:.2f}" if row["bits_per_element"] else "-",
            f"{row['bytes_per_token']:,.0f}" if row["bytes_per_token"] is not None else "-",
            megabytes(row["bytes"]),
        )
    return table


def _greedy_table(rows: Rows) -> ResultTable:
    table = ResultTable(("cache", "tokens written alike", "95 %"), title=f"of {rows[0]['greedy']['tokens']:,}")
    for row in (row["greedy"] for row in rows):
        interval = "{:.0f}-{:.0f}".format(*row["agreement_interval"]) if row["agreement_interval"] else "-"
        table.add_row(row["cache"], f"{row['agreement']:.1f}", interval)
    return table


def _passkey_table(rows: Rows) -> ResultTable:
    first = rows[0]["passkey"]
    columns = [f"depth {depth:g}" for depth in first["found_by_depth"]]
    table = ResultTable(("cache", "found", "nats/token", *columns), title=f"passkeys in {first['length']:,} tokens")
    for row in (row["passkey"] for row in rows):
        by_depth = [f"{found:.2f}" for found in row["found_by_depth"].values()]
        table.add_row(row["cache"], f"{row['found']:.2f}", f"{row['nll']:.3f}", *by_depth)
    return table
