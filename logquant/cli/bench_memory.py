"""``logquant bench memory``: what a prompt costs in memory."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .interrupt import interruptible
from .shared import (
    Caches,
    Dtype,
    Json,
    Model,
    cache_list,
    check_fits,
    check_model,
    errors_of_model,
    megabytes,
    progress,
    write_json,
)
from .tables import ResultTable


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
    if not sys.platform.startswith("linux"):
        raise typer.BadParameter("bench memory reads /proc, which only Linux has")
    check_model(model)
    specs = cache_list("--cache", cache)
    from .. import models
    from ..bench.memory import bench_memory

    with errors_of_model(model):
        config = models.load_config(model)
    check_fits("--cache", specs, config)
    results = []
    with interruptible() as interrupted, progress("prefill", len(specs)) as advance, errors_of_model(model):
        for spec in specs:
            if interrupted():
                break
            results.append(bench_memory(spec, model, dtype.torch, context))
            advance()
    table = ResultTable(
        ("cache", "peak rise", "of live memory", "held", "formula"), title=f"prefill of {context:,} tokens"
    )
    for result in results:
        verdict = "-" if result.predicted is None else megabytes(result.predicted)
        verdict = "equal" if result.held == result.predicted else verdict
        peaks = megabytes(result.peak_rise), megabytes(result.live_peak_rise)
        table.add_row(result.cache, *peaks, megabytes(result.held), verdict)
    if results:
        table.show()
        write_json(json_file, "memory", arguments, results=[result.as_dict() for result in results])
    interrupted.leave()
