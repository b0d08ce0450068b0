"""What the layers of a cache have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .storage import Allocator


@dataclass
class Shared:
    """What the layers of a cache have in common.

    Attributes:
        allocator: of their stores.
        padding: a mask ``[B, positions]``, 0 where there is padding, that holds where attention does not tell.
        speculative: how many of the positions that come next are speculative; None if that is not known.
    """

    allocator: Allocator = field(default_factory=Allocator)
    padding: Tensor | None = None
    speculative: int | None = None

    def forget(self) -> None:
        self.padding, self.speculative = None, None
        self.allocator.forget()
