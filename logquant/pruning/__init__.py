"""Pruning: tokens of a prompt that are dropped when it ends, instead of being packed.

A *pruner* (:mod:`logquant.pruning.prompt`) says what each token is worth to each KV head; a file each. How many stay is
for :mod:`logquant.pruning.spec` to say, and which of them are exact anyway for the rule of the cache.
"""

from .keydiff import KeyDiff
from .prompt import Pruner
from .snapkv import SnapKV
from .streaming import Streaming

PRUNERS: dict[str, type[Pruner]] = {"snapkv": SnapKV, "keydiff": KeyDiff, "streaming": Streaming}

__all__ = ["PRUNERS"]
