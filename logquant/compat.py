"""The oldest transformers that logquant works with, and a name that a newer one changed.

An argument or output that holds a cache is ``cache`` since 5.24. Before, it was ``past_key_values``, which still works,
with a warning, until 5.40 (``forward``) and 6.0 (``generate``).
"""

from __future__ import annotations

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

# By the version: to look at what `generate` takes would import it, which takes seconds.
CACHE = "cache" if Version(transformers.__version__).release >= Version("5.24").release else "past_key_values"


def as_argument(cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument, by the name that the installed transformers has for it.

    ``model(ids, **as_argument(cache))`` and ``model.generate(**inputs, **as_argument(cache))`` work with every
    transformers that logquant works with, and without a warning.
    """
    return {CACHE: cache}


def from_arguments(arguments: dict[str, Any]) -> Any:
    """The cache among keyword arguments under either name (models from the Hub may keep the old one); None without."""
    cache = arguments.get(CACHE)
    return arguments.get("past_key_values") if cache is None else cache
