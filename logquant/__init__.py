"""LogQuant: a 2-bit KV cache for large language models (arXiv 2503.19950).

    from logquant import LogQuantCache
    cache = LogQuantCache(model.config)
    model.generate(**inputs, past_key_values=cache)

``LogQuantCache`` needs transformers; everything else needs torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import LogQuantConfig
from .reference import PageFormat

if TYPE_CHECKING:
    from .cache import LogQuantCache


__all__ = ["LogQuantCache", "LogQuantConfig", "PageFormat", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LogQuantCache":
        from .cache import LogQuantCache

        return LogQuantCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
