"""Timing of several functions, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..machine import last_level_cache_bytes


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over many calls: quartiles, and all of them in order."""

    low: float
    median: float
    high: float
    samples: list[float]

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        low, median, high = torch.tensor(samples).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return cls(low, median, high, samples)

    def as_dict(self) -> dict[str, Any]:
        return {"quartile1": self.low, "median": self.median, "quartile3": self.high, "samples": self.samples}


class ColdCache:
    """Called, reads twice as many bytes as the CPU caches hold, so that what comes next starts from memory.

    A decoding step visits every layer before it returns to the first one, so a layer's tokens are in no cache by then.
    """

    def __init__(self) -> None:
        self._buffer = torch.ones(2 * last_level_cache_bytes() // 4)

    def __call__(self) -> None:
        self._buffer.sum()


def time_interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before_each: Callable[[], None] = lambda: None,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Call every function once a round, so that whatever disturbs the machine disturbs all of them.

    Args:
        contenders: the functions by name.
        rounds: timed calls of each, after two that are not.
        before_each: called before every call, outside the timing.
        on_progress: called after every round, warm-up included.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, call in contenders.items():
            before_each()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            if number >= 2:
                samples[name].append(seconds)
        on_progress()
    return {name: Timing.of(values) for name, values in samples.items()}


def read_bandwidth(rounds: int = 10) -> float:
    """Bytes a second that all threads together read from memory: the faster of two torch reductions, median."""
    buffer = torch.ones(max(256 << 20, 4 * last_level_cache_bytes()) // 4)
    timings = time_interleaved({"sum": buffer.sum, "max": buffer.max}, rounds)
    return buffer.nbytes / min(timing.median for timing in timings.values())
