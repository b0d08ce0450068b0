"""``logquant bench generate``: how fast whole models decode with each cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .shared import (
    GIB,
    Caches,
    Dtype,
    Json,
    Model,
    cache_list,
    errors_of,
    load_model,
    megabytes,
    number_list,
    progress,
    result_table,
    write_json,
)

if TYPE_CHECKING:
    from ..bench.generate import GenerateResult


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
            min=0.0, help="GiB for keys and values: each cache decodes as many sequences as fit, not --batch."
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
    from ..bench.generate import bench_budget, bench_generate, forms_of
    from ..bench.memory import bench_memory
    from ..bench.timing import WARMUP
    from ..methods.full import Full
    from ..methods.registry import CacheSpec

    batches = number_list("--batch", batch)
    specs = cache_list("--caches", caches)
    attention = {} if full_attention is None else {f"full, {full_attention}": full_attention}
    specs += [CacheSpec(name, Full()) for name in attention]
    if attention and peaks:
        raise typer.BadParameter("not given with --peaks", param_hint="--full-attention")
    if memory_budget is not None and context <= steps + WARMUP:
        raise typer.BadParameter(f"needed: more tokens than are decoded, {steps + WARMUP}", param_hint="--context")
    loaded, _ = load_model(model, dtype)
    with errors_of("--full-attention"):
        for name in attention.values():
            loaded.set_attn_implementation(name)
    results = []
    runs = len(batches) if memory_budget is None else 1
    with progress("prefills and steps", runs * (len(specs) + steps + WARMUP)) as advance:
        if memory_budget is None:
            for size in batches:
                results += bench_generate(
                    loaded,
                    specs,
                    context=context,
                    batch=size,
                    steps=steps,
                    baseline_steps=baseline_steps,
                    attention=attention,
                    on_progress=advance,
                )
        else:
            with errors_of("--memory-budget"):
                results = bench_budget(
                    loaded,
                    specs,
                    context=context,
                    budget=int(memory_budget * GIB),
                    steps=steps,
                    attention=attention,
                    on_progress=advance,
                )
    rows = [result.as_dict() for result in results]
    if peaks:
        del loaded
        by_name = {name: spec for spec in specs for name in forms_of(spec)}
        known = {}
        with progress("peak memory", len(results)) as advance:
            for row, result in zip(rows, results, strict=True):
                spec, size = by_name[result.cache], result.batch
                if (spec.name, size) not in known:
                    tokens = result.context if memory_budget is None else context - steps - WARMUP
                    known[spec.name, size] = bench_memory(spec, model, dtype.torch, tokens, size, steps=3)
                peak = known[spec.name, size]
                row |= {"peak_rise": peak.peak_rise, "live_peak_rise": peak.live_peak_rise}
                advance()
    title = f"{'after' if memory_budget is None else 'up to'} {context:,} tokens"
    Console().print(_table(title, rows, results, peaks))
    write_json(json_file, "generate", arguments, results=rows)


def _table(title: str, rows: Sequence[dict[str, Any]], results: Sequence[GenerateResult], peaks: bool) -> Table:
    ratios = ["of faster full", "quartiles", "of slower full"]
    columns = ["cache", "batch", "tokens/s", "step, ms", *ratios, "held", *(["peak"] if peaks else [])]
    table = result_table(*columns, title=title)
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
