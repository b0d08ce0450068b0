"""LogQuant: a 2-bit KV cache for large language models (arXiv 2503.19950).

    from logquant import LogQuantCache
    cache = LogQuantCache(model.config)
    model.generate(**inputs, past_key_values=cache)

``LogQuantCache``, ``enable`` and ``disable`` need transformers; everything else needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import LogQuantConfig
from .format import PageFormat

if TYPE_CHECKING:
    from .cache.cache import LogQuantCache
    from .integrations.transformers import disable, enable


__all__ = ["LogQuantCache", "LogQuantConfig", "PageFormat", "__version__", "disable", "enable"]

_LAZY = {
    "LogQuantCache": "cache.cache",
    "disable": "integrations.transformers",
    "enable": "integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
