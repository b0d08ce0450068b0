"""``logquant bench generate``: tokens per second of whole decoding, cache by cache, and the bytes each cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import as_argument
from ..specs import CacheSpec, cache_nbytes
from .timing import Timing, clock_of, time_interleaved


@dataclass(frozen=True)
class GenerateResult:
    """Decoding of one batch size with one cache.

    Args:
        cache: its name.
        batch: sequences decoded at once.
        context: tokens of the prompt.
        timing: of one step, that is of one token of each sequence.
        held: bytes of the cache's tensors after the last step.
    """

    cache: str
    batch: int
    context: int
    timing: Timing
    held: int

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
        steps: timed steps of each cache, after two that are not.
        on_progress: called after every prefill and every round of steps.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(model.device)
    caches = {}
    for spec in specs:
        caches[spec.name] = spec.make(model.config)
        model(prompt, **as_argument(caches[spec.name]), logits_to_keep=1)
        on_progress()

    def step_with(name: str) -> Callable[[], Tensor]:
        def step() -> Tensor:
            logits: Tensor = model(prompt[:, -1:], **as_argument(caches[name]), logits_to_keep=1).logits
            return logits.argmax(-1)

        return step

    timings = time_interleaved(
        {name: step_with(name) for name in caches}, steps, on_progress=on_progress, clock=clock_of(model.device.type)
    )
    return [GenerateResult(name, batch, context, timings[name], cache_nbytes(cache)) for name, cache in caches.items()]
