"""``logquant eval``: what caches cost in accuracy."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .shared import (
    Caches,
    Dtype,
    Json,
    Model,
    cache_list,
    errors_of,
    load_model,
    megabytes,
    progress,
    result_table,
    write_json,
)


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

    kl is divergence from the full cache, perplexity and top-1 agreement.
    """
    arguments = dict(locals())
    from .. import eval as evaluation

    specs = cache_list("--caches", caches)
    with errors_of("--tasks"):
        wanted = {Task(name.strip()) for name in tasks.split(",")}
    loaded, tokenizer = load_model(model, dtype)
    paths = [*(text or []), *(files or [])]
    rows: list[dict[str, Any]] = [{"cache": spec.name} for spec in specs]
    if wanted & {Task.kl, Task.greedy}:
        with errors_of("--text"):
            ids = evaluation.read_tokens(tokenizer, paths, prefill + tokens + 1 if Task.kl in wanted else prefill)
    if Task.kl in wanted:
        with progress(f"{len(paths)} texts, {tokens} tokens each", len(paths) * tokens) as advance:
            scores = evaluation.evaluate(
                loaded, ids, specs, prefill=prefill, chunk=chunk, batch_size=batch_size, on_progress=advance
            )
        for row, each in zip(rows, scores, strict=True):
            row.update(each.as_dict())
        Console().print(_kl_table(rows))
    if Task.greedy in wanted:
        with progress("greedy decoding", len(specs) * len(paths) * tokens) as advance:
            agreements = evaluation.greedy_agreement(
                loaded, ids[:, :prefill], specs, tokens=tokens, batch_size=batch_size, on_progress=advance
            )
        for row, agreement in zip(rows, agreements, strict=True):
            row["greedy"] = agreement.as_dict()
        Console().print(_greedy_table(rows))
    if Task.passkey in wanted:
        runs = len(specs) * passkey_texts * len(evaluation.DEPTHS)
        with progress("passkeys", runs) as advance, errors_of("--passkey-tokens"):
            recalls = evaluation.passkey(
                loaded, tokenizer, specs, length=passkey_tokens, texts=passkey_texts, on_progress=advance
            )
        for row, recall in zip(rows, recalls, strict=True):
            row["passkey"] = recall.as_dict()
        Console().print(_passkey_table(rows))
    write_json(json_file, "eval", arguments, results=rows)


def _kl_table(rows: list[dict[str, Any]]) -> Table:
    table = result_table("cache", "KL", "95 % of KL", "ppl", "top-1", "bits", "bytes/token", "bytes/text")
    for row in rows:
        table.add_row(
            row["cache"],
            f"{row['kl']:.4f}",
            "{:.3f}-{:.3f}".format(*row["kl_interval"]) if row["kl_interval"] else "-",
            f"{row['ppl']:.2f}",
            f"{row['top1']:.3f}",
            f"{row['bits_per_element']:.2f}" if row["bits_per_element"] else "-",
            f"{row['bytes_per_token']:,.0f}" if row["bytes_per_token"] is not None else "-",
            megabytes(row["bytes"]),
        )
    return table


def _greedy_table(rows: list[dict[str, Any]]) -> Table:
    table = result_table("cache", "tokens written alike", "95 %", title=f"of {rows[0]['greedy']['tokens']:,}")
    for row in (row["greedy"] for row in rows):
        interval = "{:.0f}-{:.0f}".format(*row["agreement_interval"]) if row["agreement_interval"] else "-"
        table.add_row(row["cache"], f"{row['agreement']:.1f}", interval)
    return table


def _passkey_table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]["passkey"]
    columns = [f"depth {depth:g}" for depth in first["found_by_depth"]]
    table = result_table("cache", "found", "nats/token", *columns, title=f"passkeys in {first['length']:,} tokens")
    for row in (row["passkey"] for row in rows):
        by_depth = [f"{found:.2f}" for found in row["found_by_depth"].values()]
        table.add_row(row["cache"], f"{row['found']:.2f}", f"{row['nll']:.3f}", *by_depth)
    return table
