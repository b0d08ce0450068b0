"""``logquant plan``: what fits into memory."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

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
    errors_of_model,
    finite,
    megabytes,
    write_json,
)
from .tables import ResultTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..methods.registry import CacheSpec
    from ..plan import Plan


class Engine(str, enum.Enum):
    transformers = "transformers"
    vllm = "vllm"


def command(
    memory: Annotated[float, typer.Option(help="GiB for keys and values.", callback=finite)] = 1.0,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, prompt and generated.")] = 4000,
    caches: Caches = "full,logquant",
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option(help="Of exact tokens.")] = Dtype.bfloat16,
    engine: Annotated[
        Engine, typer.Option(help="Whose caches: transformers', or vLLM's pool of blocks with LogQuant in it.")
    ] = Engine.transformers,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Of vLLM: tokens of a step, which are exact while a prompt is read.")
    ] = 2048,
    drafts: Annotated[
        bool, typer.Option("--drafts", help="Of vLLM: speculative decoding, with which a block holds fewer pages.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Say how many sequences fit into memory, and how long a single one may be, from a model's configuration alone."""
    arguments = dict(locals())
    budget = int(memory * GIB)
    if budget < 1:
        raise bad("--memory", f"more than 0 GiB are needed, got {memory:g}")
    check_model(model)
    specs = cache_list("--caches", caches, known_bytes=True)
    from .. import models
    from ..plan import plan

    with errors_of_model(model):
        config = models.load_config(model)
    check_fits("--caches", specs, config)
    with errors_of("--model"):
        if engine is Engine.vllm:
            plans = _in_vllm(specs, config, budget, context, dtype, max_num_batched_tokens, drafts)
        else:
            plans = [plan(spec, config, budget=budget, tokens=context, itemsize=dtype.torch.itemsize) for spec in specs]
    table = ResultTable(
        ("cache", "a sequence", "sequences", "longest, tokens"),
        title=f"{context:,} tokens of {config.model_type} in {memory:g} GiB",
    )
    for each in plans:
        table.add_row(each.cache, megabytes(each.nbytes), f"{each.batch:,}", f"{each.longest:,}")
    table.show()
    write_json(json_file, "plan", arguments, results=[each.as_dict() for each in plans])


def _in_vllm(
    specs: list[CacheSpec],
    config: PreTrainedConfig,
    budget: int,
    tokens: int,
    dtype: Dtype,
    chunk: int,
    drafts: bool,
) -> list[Plan]:
    from .. import plan_vllm
    from ..integrations.vllm import guards
    from ..methods.registry import settings_given

    plans = []
    for spec in specs:
        if not spec.is_full and spec.name.partition(":")[0] != "logquant":
            raise ValueError(f"cache must be full or logquant with settings for vLLM, got {spec.name!r}")
        options = settings_given(spec.name)
        quantization = None if spec.is_full else guards.config_from(options, f"settings of {spec.name!r} in vLLM")
        blocks = plan_vllm.blocks_of(quantization, config, dtype.torch, drafts)
        plans.append(plan_vllm.plan(spec.name, blocks, budget=budget, tokens=tokens, chunk=chunk))
    return plans
