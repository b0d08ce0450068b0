"""``logquant bench generate``: tokens per second of whole decoding, cache by cache, and the bytes each cache holds.

At one batch size for all caches, or at the largest that fits into a number of bytes, for each cache its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..compat import as_argument
from ..plan import plan
from ..specs import CacheSpec, cache_nbytes
from .timing import WARMUP, Timing, clock_of, time_interleaved


@dataclass(frozen=True)
class GenerateResult:
    """Decoding of one batch size with one cache.

    Args:
        cache: its name.
        batch: sequences decoded at once.
        context: tokens of the prompt; within a budget those at the end.
        timing: of one step, that is of one token of each sequence.
        held: bytes of the cache's tensors after the last step.
        predicted: bytes that they were to be at most (:func:`logquant.plan.plan`); None if not asked for.
    """

    cache: str
    batch: int
    context: int
    timing: Timing
    held: int
    predicted: int | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.timing.median

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "tokens_per_second": self.tokens_per_second, "timing": self.timing.as_dict()}


@torch.inference_mode()
def bench_generate(
    model: PreTrainedModel,
    specs: list[CacheSpec],
    *,
    context: int,
    batch: int,
    steps: int,
    on_progress: Callable[[], None] = lambda: None,
) -> list[GenerateResult]:
    """Prefill each cache with the same random tokens, then decode, a step with each cache in turn.

    Args:
        model: with its attention implementation set; ``"logquant"`` serves all caches.
        specs: the caches.
        context: tokens of the prompt.
        batch: sequences decoded at once.
        steps: timed steps of each cache, after :data:`WARMUP` that are not.
        on_progress: called after every prefill and every round of steps.
    """
    prompt = _random_tokens(model, batch, context)
    caches = {}
    for spec in specs:
        caches[spec.name] = spec.make(model.config)
        model(prompt, **as_argument(caches[spec.name]), logits_to_keep=1)
        on_progress()
    timings = _time_steps(model, caches, dict.fromkeys(caches, prompt[:, -1:]), steps, on_progress)
    return [GenerateResult(name, batch, context, timings[name], cache_nbytes(cache)) for name, cache in caches.items()]


@torch.inference_mode()
def bench_budget(
    model: PreTrainedModel,
    specs: list[CacheSpec],
    *,
    context: int,
    budget: int,
    steps: int,
    on_progress: Callable[[], None] = lambda: None,
) -> list[GenerateResult]:
    """As :func:`bench_generate`, each cache with as many sequences as fit into ``budget`` bytes.

    The sequences of a cache have the same prompt, which is run once; each then holds keys and values of its own.

    Args:
        model, specs, steps, on_progress: as for :func:`bench_generate`.
        context: tokens of a sequence at the end, prompt and decoded.
        budget: bytes for keys and values.

    Raises:
        ValueError: not even one sequence fits, or a cache whose bytes the configuration does not tell.
    """
    prompt = _random_tokens(model, 1, context - steps - WARMUP)
    caches, plans = {}, {}
    for spec in specs:
        planned = plan(spec, model.config, budget=budget, tokens=context, itemsize=model.dtype.itemsize)
        if planned.batch < 1:
            raise ValueError(f"budget must be at least {planned.nbytes} bytes for cache {spec.name!r}, got {budget}")
        plans[spec.name], caches[spec.name] = planned, spec.make(model.config)
        model(prompt, **as_argument(caches[spec.name]), logits_to_keep=1)
        caches[spec.name].batch_repeat_interleave(planned.batch)
        on_progress()
    last = {name: prompt[:, -1:].expand(planned.batch, -1) for name, planned in plans.items()}
    timings = _time_steps(model, caches, last, steps, on_progress)
    return [
        GenerateResult(name, p.batch, context, timings[name], cache_nbytes(caches[name]), p.batch * p.nbytes)
        for name, p in plans.items()
    ]


def _random_tokens(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def _time_steps(
    model: PreTrainedModel,
    caches: dict[str, Cache],
    tokens: dict[str, Tensor],
    steps: int,
    on_progress: Callable[[], None],
) -> dict[str, Timing]:
    """Decode one token of each sequence with each cache in turn."""

    def step_with(name: str) -> Callable[[], Tensor]:
        def step() -> Tensor:
            logits: Tensor = model(tokens[name], **as_argument(caches[name]), logits_to_keep=1).logits
            return logits.argmax(-1)

        return step

    return time_interleaved(
        {name: step_with(name) for name in caches},
        steps,
        on_progress=on_progress,
        clock=clock_of(model.device.type),
    )
