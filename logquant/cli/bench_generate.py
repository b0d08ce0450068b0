"""``logquant bench generate``: how fast whole models decode with each cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .interrupt import interruptible
from .shared import (
    GIB,
    Caches,
    Dtype,
    Json,
    Model,
    bad,
    cache_list,
    check_fits,
    check_model,
    errors_of,
    finite,
    load_model,
    megabytes,
    number_list,
    progress,
    write_json,
)
from .tables import ResultTable

if TYPE_CHECKING:
    from ..bench.generate import GenerateResult
    from ..bench.memory import MemoryResult
    from ..methods.registry import CacheSpec

Rows = list[dict[str, Any]]


def command(
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 2000,
    batch: Annotated[str, typer.Option(help="Sequences decoded at once; several numbers separated by commas.")] = "1,8",
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each cache.")] = 40,
    baseline_steps: Annotated[
        int | None, typer.Option(min=3, help="Timed steps of other methods' caches, if they are to be fewer.")
    ] = None,
    peaks: Annotated[
        bool, typer.Option("--peaks", help="Also measure the peak memory of each cache, in processes of their own.")
    ] = False,
    caches: Caches = "full,logquant,recent",
    full_attention: Annotated[
        str | None,
        typer.Option(
            help="Also decode a full cache with this attention of transformers, such as eager; without peaks."
        ),
    ] = None,
    memory_budget: Annotated[
        float | None,
        typer.Option(
            help="GiB for keys and values: each cache decodes as many sequences as fit, not --batch.", callback=finite
        ),
    ] = None,
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.bfloat16,
    json_file: Json = None,
) -> None:
    """Decode with each cache in turn, a step at a time: tokens per second, their ratio to the full cache's, bytes held.

    All sequences of a batch have the same prompt, which is run once. A full cache is decoded with and without an
    attention mask, for which transformers has two forms of attention; ratios are to the faster one first.
    """
    arguments = dict(locals())
    batches = number_list("--batch", batch)
    if full_attention and peaks:
        raise bad("--full-attention", "not given with --peaks")
    check_model(model)
    specs = cache_list("--caches", caches, known_bytes=memory_budget is not None)
    from ..bench.generate import bench_budget, bench_generate, forms_of
    from ..bench.timing import WARMUP
    from ..methods.full import Full
    from ..methods.registry import CacheSpec

    attention = {} if full_attention is None else {f"full, {full_attention}": full_attention}
    specs += [CacheSpec(name, Full()) for name in attention]
    budget = _budget(memory_budget, context, steps + WARMUP)
    loaded, _ = load_model(model, dtype)
    check_fits("--caches", specs, loaded.config)
    with errors_of("--full-attention"):
        for name in attention.values():
            loaded.set_attn_implementation(name)
    results: list[GenerateResult] = []
    total = (len(batches) if budget is None else 1) * (len(specs) + steps + WARMUP)
    common: dict[str, Any] = {"context": context, "steps": steps, "attention": attention}
    with interruptible() as interrupted, progress("prefills and steps", total) as advance:
        if budget is not None:
            with errors_of("--memory-budget"):
                results = bench_budget(loaded, specs, **common, budget=budget, on_progress=advance)
        for size in batches if budget is None else ():
            if not interrupted():
                results += bench_generate(
                    loaded, specs, **common, batch=size, baseline_steps=baseline_steps, on_progress=advance
                )
    rows = [result.as_dict() for result in results]
    peaks = peaks and not interrupted()
    if peaks:
        del loaded
        tokens = context if budget is None else context - steps - WARMUP
        _add_peaks(rows, {name: spec for spec in specs for name in forms_of(spec)}, model, dtype, tokens)
    title = f"{'after' if budget is None else 'up to'} {context:,} tokens"
    if rows:
        _table(title, rows, results, peaks).show()
        write_json(json_file, "generate", arguments, results=rows)
    interrupted.leave()


def _add_peaks(rows: Rows, specs: dict[str, CacheSpec], model: str | None, dtype: Dtype, tokens: int) -> None:
    """Measure the peak memory of each row's cache after a prompt of ``tokens`` tokens; once for the forms of one."""
    from ..bench.memory import bench_memory

    known: dict[tuple[str, int], MemoryResult] = {}
    with progress("peak memory", len(rows)) as advance:
        for row in rows:
            spec, size = specs[row["cache"]], row["batch"]
            if (spec.name, size) not in known:
                known[spec.name, size] = bench_memory(spec, model, dtype.torch, tokens, size, steps=3)
            peak = known[spec.name, size]
            row |= {"peak_rise": peak.peak_rise, "live_peak_rise": peak.live_peak_rise}
            advance()


def _budget(gib: float | None, context: int, decoded: int) -> int | None:
    """``--memory-budget`` in bytes, if the other arguments fit it."""
    if gib is None:
        return None
    if gib * GIB < 1:
        raise bad("--memory-budget", f"more than 0 GiB are needed, got {gib:g}")
    if context <= decoded:
        raise bad("--context", f"needed: more tokens than are decoded, {decoded}, got {context}")
    return int(gib * GIB)


def _table(title: str, rows: Rows, results: Sequence[GenerateResult], peaks: bool) -> ResultTable:
    ratios = ["of faster full", "quartiles", "of slower full"]
    columns = ["cache", "batch", "tokens/s", "step, ms", *ratios, "held", *(["peak"] if peaks else [])]
    table = ResultTable(columns, title=title)
    for row, result in zip(rows, results, strict=True):
        first, second = [*result.speedups.values(), None, None][:2]
        table.add_row(
            result.cache,
            str(result.batch),
            f"{result.tokens_per_second:.1f}",
            f"{1e3 * result.timing.median:.1f}",
            "-" if first is None else f"{first.median:.2f}x",
            "-" if first is None else f"{first.low:.2f}-{first.high:.2f}",
            "-" if second is None else f"{second.median:.2f}x",
            megabytes(result.held),
            *([megabytes(row["peak_rise"])] if peaks else []),
        )
    return table
