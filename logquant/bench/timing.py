"""Timing of several functions, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..machine import last_level_cache_bytes

WARMUP = 2
"""Calls of each contender that are not timed."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over many calls: quartiles, all of them in order, and the round of each."""

    low: float
    median: float
    high: float
    samples: list[float]
    rounds: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, samples: list[float], rounds: list[int] | None = None) -> Timing:
        low, median, high = torch.tensor(samples).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return cls(low, median, high, samples, list(range(len(samples))) if rounds is None else rounds)

    def as_dict(self) -> dict[str, Any]:
        return {"quartile1": self.low, "median": self.median, "quartile3": self.high, "samples": self.samples}

    def speedup_over(self, other: Timing) -> Timing:
        """How many times as long the other one took, round by round of those that both were in; not seconds."""
        of_round = dict(zip(other.rounds, other.samples, strict=True))
        both = [(number, own) for number, own in zip(self.rounds, self.samples, strict=True) if number in of_round]
        return Timing.of([of_round[number] / own for number, own in both], [number for number, _ in both])


class ColdCache:
    """Called, reads twice as many bytes as the caches of the CPU or GPU hold: what comes next starts from memory.

    A decoding step visits every layer before it returns to the first one, so a layer's tokens are in no cache by then.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._buffer = torch.ones(2 * cache_bytes(device) // 4, device=device)

    def __call__(self) -> None:
        self._buffer.sum()


def cache_bytes(device: str) -> int:
    """Bytes of the last cache before the memory of a device."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device == "cuda" else last_level_cache_bytes()


def cpu_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds(call: Callable[[], object]) -> float:
    """Seconds that the GPU takes for one call, behind whatever was queued before it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_of(device: str) -> Callable[[Callable[[], object]], float]:
    return cuda_seconds if device == "cuda" else cpu_seconds


def time_interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    fewer: Mapping[str, int] | None = None,
    before_each: Callable[[], None] = lambda: None,
    after: Mapping[str, Callable[[], None]] | None = None,
    on_progress: Callable[[], None] = lambda: None,
    clock: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> dict[str, Timing]:
    """Call every function once a round, so that whatever disturbs the machine disturbs all of them.

    Args:
        contenders: the functions by name.
        rounds: timed calls of each, after :data:`WARMUP` that are not.
        fewer: timed calls of slow ones, spread evenly over the rounds.
        before_each: called before every call, outside the timing.
        after: by contender, called after each of its calls, outside the timing.
        on_progress: called after every round, warm-up included.
        clock: times one call, in seconds.
    """
    counts = dict.fromkeys(contenders, rounds) | {name: min(n, rounds) for name, n in (fewer or {}).items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    numbers: dict[str, list[int]] = {name: [] for name in contenders}
    for number in range(-WARMUP, rounds):
        for name, call in contenders.items():
            if number >= 0 and (number + 1) * counts[name] // rounds == number * counts[name] // rounds:
                continue
            before_each()
            seconds = clock(call)
            if after and name in after:
                after[name]()
            if number >= 0:
                samples[name].append(seconds)
                numbers[name].append(number)
        on_progress()
    return {name: Timing.of(values, numbers[name]) for name, values in samples.items()}


def read_bandwidth(device: str = "cpu", rounds: int = 10) -> float:
    """Bytes a second that a device reads from its memory, median.

    A CPU: the faster of two torch reductions, all threads together. A GPU: a copy, which counts twice.
    """
    buffer = torch.ones(max(256 << 20, 4 * cache_bytes(device)) // 4, device=device)
    if device == "cuda":
        other = torch.empty_like(buffer)
        timing = time_interleaved({"copy": lambda: other.copy_(buffer)}, rounds, clock=cuda_seconds)["copy"]
        return 2 * buffer.nbytes / timing.median
    timings = time_interleaved({"sum": buffer.sum, "max": buffer.max}, rounds)
    return buffer.nbytes / min(timing.median for timing in timings.values())
