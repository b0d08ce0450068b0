"""Tokens that have come but not taken their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..attention.call import AttentionCall


class Exact(NamedTuple):
    """Exact tokens, of which some are about to be committed.

    Attributes:
        keys, values: ``[B, H, N, D]``: each row's exact tokens, then new ones.
        in_window: whether they are the layer's own window.
    """

    keys: Tensor
    values: Tensor
    in_window: bool

    @property
    def in_graph(self) -> bool:
        """Whether they belong to a graph of autograd."""
        return self.keys.requires_grad or self.values.requires_grad


@dataclass(slots=True)
class Uncommitted:
    """New tokens of a layer, which are exact, and what is known of them.

    Which of them are padding is known only when they are attended to, for masks come with attention.

    Attributes:
        exact: each row's exact tokens, then the new ones.
        states: keys and values of the new ones alone, ``[B, H, new, D]``.
        call: what has attended to them, or None. Without its mask: whoever made that may reuse its memory.
        real: what that said of the new positions: bool ``[B, new]``, which of them hold a token; None if all do.
        masked: whether it attended with a mask.
        given: what all exact tokens have been given since the rule was last applied, the new queries included
            (:class:`logquant.cache.chosen.Chosen`); None if it is not known yet.
    """

    exact: Exact
    states: tuple[Tensor, Tensor]
    call: AttentionCall | None = None
    real: Tensor | None = None
    masked: bool = False
    given: Tensor | None = None

    @property
    def new(self) -> int:
        """Positions that have come."""
        return self.states[0].shape[2]

    @property
    def is_step(self) -> bool:
        """Whether it is a token of each row, which attended to all that there is."""
        return self.new == 1 and self.call is not None and not self.masked

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that the layer has made for them; what the model has made lives until the next ones come."""
        given = 0 if self.given is None else self.given.nbytes
        return given + (0 if self.exact.in_window else self.exact.keys.nbytes + self.exact.values.nbytes)

    def known(self, part: slice) -> tuple[AttentionCall | None, Tensor | None]:
        """``call`` and ``real`` of some of the new positions."""
        call = self.call
        if call is not None:
            unknown = self.new - call.query.shape[2]
            start, stop = (max(0, end - unknown) for end in (part.start, part.stop))
            lse = None if call.lse is None else call.lse[:, :, start:stop]
            call = call._replace(query=call.query[:, :, start:stop], lse=lse)
        real = None if self.real is None or self.real[:, part].all() else self.real[:, part]
        return call, real
