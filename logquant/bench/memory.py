"""``logquant bench memory``: what a prompt and decoding cost with each cache, measured on a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..compat import as_argument
from ..methods.accounting import cache_nbytes, commit
from ..methods.registry import CacheSpec
from ..plan import sequence_nbytes
from .generate import prefilled, random_tokens


@dataclass(frozen=True)
class MemoryResult:
    """Bytes of one prefill, and of the steps of decoding after it.

    Args:
        cache: the cache's name.
        peak_rise: how far the process grew, at most.
        live_peak_rise: the same where malloc hands freed tensors back to the system at once. glibc usually keeps them,
            and how many depends on how small blocks that stay happen to lie between large ones that do not.
        held: bytes of the cache's tensors afterwards.
        predicted: what the formula says they are after a prompt (:func:`logquant.plan.sequence_nbytes`); None after
            steps of decoding, and for baseline caches, which have none.
    """

    cache: str
    peak_rise: int
    live_peak_rise: int
    held: int
    predicted: int | None

    def as_dict(self) -> dict[str, Any]:
        as_predicted = None if self.predicted is None else self.held == self.predicted
        return {**vars(self), "held_as_predicted": as_predicted}


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have {field}")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        raise RuntimeError("bench memory needs the GNU C library, to know what malloc keeps")
    return libc


@torch.inference_mode()
def _prefill(
    spec: CacheSpec, model_id: str | None, dtype: torch.dtype, tokens: int, batch: int, steps: int, return_freed: bool
) -> tuple[int, int, int | None]:
    """Runs in a process of its own. Returns its peak rise, bytes held and bytes predicted."""
    libc = _libc()
    if return_freed:
        m_mmap_threshold = -3  # malloc.h: larger blocks are mappings of their own
        libc.mallopt(m_mmap_threshold, 1 << 16)
    model, _ = models.load(model_id, dtype=dtype)
    model.set_attn_implementation("logquant")
    ids = random_tokens(model, tokens)
    # Weights that are mapped from a file count as the process's memory only once they have been read.
    model(ids[:, :8], **as_argument(spec.make(model.config)), logits_to_keep=1)
    gc.collect()
    libc.malloc_trim(0)  # or the peak would hide in what the warm-up has left
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts again from here
    before = _status_bytes("VmRSS")
    cache = prefilled(spec, model, ids, batch)
    for _ in range(steps):
        model(ids[:, -1:].expand(batch, -1), **as_argument(cache), logits_to_keep=1)
    peak = _status_bytes("VmHWM")
    predicted = None
    if not (spec.is_baseline or steps):
        predicted = batch * sequence_nbytes(spec, model.config, tokens, dtype.itemsize)
    commit(cache)
    return peak - before, cache_nbytes(cache), predicted


def bench_memory(
    spec: CacheSpec, model_id: str | None, dtype: torch.dtype, tokens: int, batch: int = 1, steps: int = 0
) -> MemoryResult:
    """Measure a prefill of ``tokens`` random tokens in fresh processes.

    Args:
        spec, model_id, dtype, tokens: what is measured.
        batch: sequences that then hold this prompt, which is run once (:func:`logquant.bench.generate.prefilled`).
        steps: steps of decoding after it.

    Raises:
        RuntimeError: not on Linux with the GNU C library, or a process died.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("bench memory reads /proc, which only Linux has")
    peaks = []
    for return_freed in (False, True):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                peak, held, predicted = pool.submit(
                    _prefill, spec, model_id, dtype, tokens, batch, steps, return_freed
                ).result()
            except BrokenProcessPool as error:
                raise RuntimeError(f"the process measuring cache {spec.name!r} died; out of memory?") from error
        peaks.append(peak)
    return MemoryResult(spec.name, peaks[0], peaks[1], held, predicted)
