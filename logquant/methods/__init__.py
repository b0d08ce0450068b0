"""Caches by name: LogQuant's own, the full one, and other systems', for comparison.

Those are each its paper's rule, written for clearness, not for speed. They work with every attention implementation
that reads plain tensors; H2O, StreamingLLM and OSCAR, which look at what attends to them, need ``"logquant"`` or
``"sdpa"``. They are for prompts, decoding and sampling: what would remove or reorder tokens is refused.

A method is a file and a test. To add one:

1. Write ``methods/NAME.py``, which says in its first line what the method is and where it was published.
2. In it, the settings: a frozen dataclass derived from :class:`Baseline`, with ``@method("NAME")`` above. Its fields
   are what the command line takes (``NAME:field=value``): give each a default, and refuse bad ones in
   ``__post_init__`` (``self.need``).
3. And the layer that ``layer(config)`` makes, derived from one in :mod:`logquant.methods.layers`: ``EvictingLayer``
   wants ``evict``, which forgets tokens; ``QuantizingLayer`` wants ``packed_tokens`` and two quantisers. For others,
   ``BaselineLayer`` wants ``update``, and ``packed`` if it quantises.
4. Import it below, where its name is to stand in lists.
5. Write ``tests/test_methods_NAME.py``: the rule against a plain statement of it, the bytes held, the bad settings.
6. Add the name, with settings for some hundred tokens, to ``NAMES`` of ``tests/helpers/methods.py`` for the tests that
   all methods pass, and to README.md.
"""

from .. import compat as compat  # first: it refuses a transformers that is too old

# In the order in which names are listed.
# isort: off
from .logquant import LogQuant
from .partial import Partial
from .kivi import KIVI
from .oscar import OSCAR
from .turboquant import TurboQuant
from .quanto import Quanto
from .hqq import HQQ
from .streaming import Streaming
from .h2o import H2O
from .full import Full

# isort: on
from .accounting import cache_nbytes, packed_bits_per_element, token_nbytes
from .layers.base import Baseline, Settings
from .registry import CacheSpec, method, method_names, parse_cache, parse_caches

__all__ = [
    "H2O",
    "HQQ",
    "KIVI",
    "OSCAR",
    "Baseline",
    "CacheSpec",
    "Full",
    "LogQuant",
    "Partial",
    "Quanto",
    "Settings",
    "Streaming",
    "TurboQuant",
    "cache_nbytes",
    "method",
    "method_names",
    "packed_bits_per_element",
    "parse_cache",
    "parse_caches",
    "token_nbytes",
]
