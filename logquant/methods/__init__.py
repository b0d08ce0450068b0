"""Caches by name: LogQuant's own, the full one, and other systems', for comparison.

Those are each its paper's rule, written for clearness, not for speed. They work with every attention implementation
that reads plain tensors; H2O, StreamingLLM, ClusterKV and OSCAR, which look at what attends to them, need
``"logquant"`` or ``"sdpa"``. They are for prompts, decoding and sampling: what would remove or reorder tokens is
refused.

A method is a file and a test: docs/development.md has the steps.
"""

from .. import compat as compat  # first: it refuses a transformers that is too old

# In the order in which names are listed.
# isort: off
from .logquant import LogQuant
from .partial import Partial
from .kivi import KIVI
from .oscar import OSCAR
from .turboquant import TurboQuant
from .kvarn import KVarN
from .occam import OScaR
from .kitty import Kitty
from .nexusquant import NexusQuant
from .quanto import Quanto
from .hqq import HQQ
from .streaming import Streaming
from .h2o import H2O
from .clusterkv import ClusterKV
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
    "ClusterKV",
    "Full",
    "KVarN",
    "Kitty",
    "LogQuant",
    "NexusQuant",
    "OScaR",
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
