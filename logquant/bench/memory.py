"""``logquant bench memory``: what a prompt costs with each cache, measured on a process of its own."""

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
from transformers.cache_utils import Cache

from .. import models
from ..cache import LogQuantLayer
from ..specs import CacheSpec, cache_nbytes


@dataclass(frozen=True)
class MemoryResult:
    """Bytes of one prefill.

    Args:
        cache: the cache's name.
        peak_rise: how far the process grew during the prefill, at most.
        held: bytes of the cache's tensors afterwards.
        predicted: what the formula says they are (:meth:`logquant.LogQuantConfig.head_nbytes`).
    """

    cache: str
    peak_rise: int
    held: int
    predicted: int

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "held_as_predicted": self.held == self.predicted}


def predicted_nbytes(spec: CacheSpec, cache: Cache, config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of ``cache`` after a prompt of ``tokens``, from the model's configuration and the format alone."""
    text = config.get_text_config(decoder=True)
    head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if spec.quantization is None:
        return len(cache.layers) * kv_heads * tokens * 2 * head_dim * itemsize
    ours = sum(isinstance(layer, LogQuantLayer) for layer in cache.layers)
    return ours * kv_heads * spec.quantization.head_nbytes(tokens, head_dim, itemsize=itemsize)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have {field}")


def _release_free_memory() -> None:
    """Hand what was freed back to the system, or a later peak would hide in it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


@torch.inference_mode()
def _measure(spec: CacheSpec, model_id: str | None, dtype: torch.dtype, tokens: int) -> MemoryResult:
    """Runs in a process of its own."""
    model, _ = models.load(model_id, dtype=dtype)
    model.set_attn_implementation("logquant")
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    # Weights that are mapped from a file count as the process's memory only once they have been read.
    model(ids[:, :8], past_key_values=spec.make(model.config), logits_to_keep=1)
    cache = spec.make(model.config)
    _release_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts again from here
    before = _status_bytes("VmRSS")
    model(ids, past_key_values=cache, logits_to_keep=1)
    peak = _status_bytes("VmHWM")
    predicted = predicted_nbytes(spec, cache, model.config, tokens, dtype.itemsize)
    return MemoryResult(spec.name, peak - before, cache_nbytes(cache), predicted)


def bench_memory(spec: CacheSpec, model_id: str | None, dtype: torch.dtype, tokens: int) -> MemoryResult:
    """Measure one prefill of ``tokens`` random tokens in a fresh process.

    Raises:
        RuntimeError: not on Linux, whose /proc it reads, or the process died.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("bench memory reads /proc, which only Linux has")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, spec, model_id, dtype, tokens).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"the process measuring cache {spec.name!r} died; out of memory?") from error
