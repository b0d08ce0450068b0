"""What the layers of a cache have in common."""

from __future__ import annotations

import sys
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
        latest: the layer that tokens came to last, and how many positions each layer should have held before.
        steps_left: of a cache of fixed size, how many steps can be taken at least until somebody must look.
    """

    allocator: Allocator = field(default_factory=Allocator)
    padding: Tensor | None = None
    speculative: int | None = None
    latest: tuple[int, int] = (sys.maxsize, 0)
    steps_left: int = 0

    def arrive(self, layer: int, length: int) -> None:
        """Tokens come to a layer that holds ``length`` positions.

        Raises:
            RuntimeError: the layers before it, in the same forward pass, held another number.
        """
        last, expected = self.latest
        if layer <= last:  # another forward pass
            expected = length
        if length != expected:
            raise RuntimeError(
                f"layer {layer} of the LogQuant cache holds {length} tokens where those before it held {expected}: an "
                "earlier forward pass ended early. Call cache.rewind(), which removes what only some layers have, and "
                "feed the tokens after that once more"
            )
        self.latest = layer, expected

    def forget(self) -> None:
        self.padding, self.speculative = None, None
        self.latest = sys.maxsize, 0
        self.allocator.forget()
