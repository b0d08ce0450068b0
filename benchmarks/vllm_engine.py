"""An engine of vLLM in this process, with its own KV cache or LogQuant's: for benchmarks and tests of docs/vllm.md."""

from __future__ import annotations

import os
from typing import Any

# vLLM reads them when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

MIB = 1 << 20


def engine(
    model: str, calibration: str | None, mib: int, settings: dict[str, Any] | None = None, **options: Any
) -> Any:
    """An engine; with a calibration it has LogQuant's KV cache, without one vLLM's.

    Args:
        model: directory of a model.
        calibration: file that ``logquant calibrate`` has made of it, or None.
        mib: memory of the KV cache.
        settings: others of LogQuant's.
        **options: arguments of vLLM's ``LLM``.
    """
    from vllm import LLM

    cache: dict[str, Any] = {}
    if calibration is not None:
        settings = {"calibration": calibration} | (settings or {})
        cache = {"attention_backend": "CUSTOM", "additional_config": {"logquant": settings}}
    return LLM(model, **({"enforce_eager": True, "kv_cache_memory_bytes": mib * MIB} | cache | options))


def ngrams(drafts: int) -> dict[str, Any]:
    """The option of an engine that drafts so many tokens from n-grams of the text; none for 0."""
    if not drafts:
        return {}
    return {"speculative_config": {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3}}


def kv_cache_manager(llm: Any) -> Any:
    """What says which blocks a request gets, of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
