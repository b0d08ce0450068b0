"""``logquant bench memory``: what a prompt costs in memory."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .shared import Caches, Dtype, Json, Model, cache_list, megabytes, progress, result_table, write_json


def command(
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 4000,
    cache: Caches = "full,logquant",
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    json_file: Json = None,
) -> None:
    """Prefill with each cache in processes of its own: peaks, bytes held, and what the formula says they are.

    The peak is that of the process as malloc leaves it, then without what malloc keeps of freed memory.
    """
    arguments = dict(locals())
    from ..bench.memory import bench_memory

    specs = cache_list("--cache", cache)
    results = []
    with progress("prefill", len(specs)) as advance:
        for spec in specs:
            results.append(bench_memory(spec, model, dtype.torch, context))
            advance()
    title = f"prefill of {context:,} tokens"
    table = result_table("cache", "peak rise", "of live memory", "held", "formula", title=title, no_wrap=False)
    for result in results:
        verdict = "-" if result.predicted is None else megabytes(result.predicted)
        verdict = "equal" if result.held == result.predicted else verdict
        peaks = megabytes(result.peak_rise), megabytes(result.live_peak_rise)
        table.add_row(result.cache, *peaks, megabytes(result.held), verdict)
    Console().print(table)
    write_json(json_file, "memory", arguments, results=[result.as_dict() for result in results])
