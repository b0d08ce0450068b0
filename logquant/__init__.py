"""LogQuant: a 2-bit KV cache for large language models (arXiv 2503.19950).

    from logquant import LogQuantCache, as_argument
    cache = LogQuantCache(model.config)
    model.generate(**inputs, **as_argument(cache))

``LogQuantCache``, ``as_argument``, ``enable`` and ``disable`` need transformers; everything else needs torch alone.
Names are imported when they are used, so that ``logquant --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .cache.cache import LogQuantCache
    from .compat import as_argument
    from .config import LogQuantConfig
    from .format import PageFormat
    from .integrations.transformers import disable, enable


__all__ = ["LogQuantCache", "LogQuantConfig", "PageFormat", "__version__", "as_argument", "disable", "enable"]

_LAZY = {
    "LogQuantCache": "cache.cache",
    "LogQuantConfig": "config",
    "PageFormat": "format",
    "as_argument": "compat",
    "disable": "integrations.transformers",
    "enable": "integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
