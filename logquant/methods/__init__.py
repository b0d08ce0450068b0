"""Other KV caches, for comparison: each is its paper's rule, written for clearness, not for speed.

They work with every attention implementation that reads plain tensors; H2O, StreamingLLM and OSCAR, which look at what
attends to them, need ``"logquant"`` or ``"sdpa"``. They are for prompts, decoding and sampling: what would remove or
reorder tokens is refused.
"""

from .. import compat as compat  # first: it refuses a transformers that is too old
from .h2o import H2O
from .kivi import KIVI
from .layers.base import Baseline
from .oscar import OSCAR
from .partial import Partial
from .quanto import HQQ, Quanto
from .streaming import Streaming
from .turboquant import TurboQuant

__all__ = ["H2O", "HQQ", "KIVI", "OSCAR", "Baseline", "Partial", "Quanto", "Streaming", "TurboQuant"]
