"""Residuals: a small state of the tokens that ``prune`` or ``evict`` has dropped, with which attention goes on.

What a model's layers need for it is trained (:mod:`logquant.residual.train`) and read from a file: a kind of residual
is a class of *features*, :class:`logquant.residual.features.Features`, a file each. The state itself is the same for
all (:mod:`logquant.residual.state`).
"""

from .features import Features
from .less import Less

KINDS: dict[str, type[Features]] = {"less": Less}

__all__ = ["KINDS"]
