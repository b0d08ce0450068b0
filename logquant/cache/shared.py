"""What the layers of a cache have in common."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from torch import Tensor

from .layout import Rows
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
        seen: where tokens were when somebody looked at plain steps last.
    """

    allocator: Allocator = field(default_factory=Allocator)
    padding: Tensor | None = None
    speculative: int | None = None
    latest: tuple[int, int] = (sys.maxsize, 0)
    steps_left: int = 0
    seen: Rows | None = None

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

    def same_for_all(self, rows: Rows) -> Rows:
        """What is equal to these, if another layer had it last: layers share what they work out of their rows."""
        if self.seen is None or not self.seen.equals(rows):
            self.seen = rows
        return self.seen

    def forget(self) -> None:
        self.padding, self.speculative, self.seen = None, None, None
        self.latest = sys.maxsize, 0
        self.allocator.forget()
