"""The oldest transformers that logquant works with, and a name that a newer one changed.

An argument or output that holds a cache is ``cache`` since 5.24. Before, it was ``past_key_values``, which still works,
with a warning, until 5.40 (``forward``) and 6.0 (``generate``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers
from packaging.version import Version

OLDEST = "5.17"


def check_version(found: str) -> None:
    """Raise ImportError, naming both versions, if transformers is older than :data:`OLDEST`."""
    if Version(found).release < Version(OLDEST).release:
        raise ImportError(
            f"logquant needs transformers {OLDEST} or newer, found {found}: pip install 'transformers>={OLDEST}'"
        )


check_version(transformers.__version__)

# After the check, for what an older one may not have.
from transformers.generation.utils import GenerateDecoderOnlyOutput  # noqa: E402

CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(GenerateDecoderOnlyOutput)} else "past_key_values"


def as_argument(cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument: ``model(ids, **as_argument(cache))``."""
    return {CACHE: cache}


def from_arguments(arguments: dict[str, Any]) -> Any:
    """The cache among keyword arguments under either name (models from the Hub may keep the old one); None without."""
    cache = arguments.get(CACHE)
    return arguments.get("past_key_values") if cache is None else cache
