"""``logquant plan``: what fits into memory."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .shared import GIB, Caches, Dtype, Json, Model, cache_list, errors_of, megabytes, result_table, write_json


def command(
    memory: Annotated[float, typer.Option(min=0.0, help="GiB for keys and values.")] = 1.0,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, prompt and generated.")] = 4000,
    caches: Caches = "full,logquant",
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option(help="Of exact tokens.")] = Dtype.bfloat16,
    json_file: Json = None,
) -> None:
    """Say how many sequences fit into memory, and how long a single one may be, from a model's configuration alone."""
    arguments = dict(locals())
    from .. import models
    from ..plan import plan

    specs = cache_list("--caches", caches)
    with errors_of("--model"):
        config = models.load_config(model)
    budget = int(memory * GIB)
    with errors_of("arguments"):
        plans = [plan(spec, config, budget=budget, tokens=context, itemsize=dtype.torch.itemsize) for spec in specs]
    table = result_table(
        "cache",
        "a sequence",
        "sequences",
        "longest, tokens",
        title=f"{context:,} tokens of {config.model_type} in {memory:g} GiB",
        no_wrap=False,
    )
    for each in plans:
        table.add_row(each.cache, megabytes(each.nbytes), f"{each.batch:,}", f"{each.longest:,}")
    Console().print(table)
    write_json(json_file, "plan", arguments, results=[each.as_dict() for each in plans])
