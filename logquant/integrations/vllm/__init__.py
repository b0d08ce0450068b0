"""LogQuant as a KV cache of vLLM (docs/vllm.md): ``LLM(..., attention_backend="CUSTOM", additional_config=...)``.

This package is loaded by vLLM, by way of its entry point ``vllm.general_plugins``; nothing else of logquant imports it.
``plugin`` is what vLLM calls first; ``backend``, ``impl`` and ``metadata`` are what it asks of a backend. All others
import nothing of vLLM: ``layout`` of a block, ``step`` of a batch, ``packing``, ``attention``, ``maps`` and ``guards``.
"""

from __future__ import annotations

from .plugin import register

__all__ = ["register"]
