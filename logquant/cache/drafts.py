"""Speculative decoding: tokens that may be taken back, and that see what each would if it came by itself.

``generate`` with an assistant or prompt lookup feeds several tokens at once and then crops those that the model would
not have chosen. The rule must not have quantised what comes back, so the newest W tokens stay exact until the next
crop; and where the rule applies in the midst of tokens that come together, those after must attend to other pages than
those before. Plain decoding meets none of this.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor

from ..attention.call import AttentionCall
from ..attention.view import KVView
from ..config import LogQuantConfig
from ..rule import evictions
from .layout import Rows
from .uncommitted import Uncommitted


class SpeculativeLayer(Protocol):
    """What speculation needs of a layer (:class:`logquant.cache.layer.LogQuantLayer`)."""

    config: LogQuantConfig
    uncommitted: Uncommitted | None

    @property
    def rows(self) -> Rows: ...
    @property
    def batch_size(self) -> int: ...
    def reserve(self, tokens: int) -> None: ...
    def commit(self) -> None: ...
    def copy(self) -> SpeculativeLayer: ...
    def append(self, keys: Tensor, values: Tensor) -> KVView: ...


class Speculation:
    """Of one layer, from :meth:`LogQuantLayer.activate_past_recording` on.

    Attributes:
        tokens: how many of the newest uncommitted positions are speculative: they come one by one after the others.
    """

    def __init__(self) -> None:
        self.tokens = 0

    def begin(self, layer: SpeculativeLayer, new: int, told: int | None) -> None:
        """Before new tokens come: those before them are committed, all but the newest W.

        Args:
            layer: whose they are.
            new: positions that come.
            told: how many of them are speculative (:meth:`LogQuantCache.set_drafts`); None if that is not known: all
                after a prompt, none of a prompt.
        """
        window = layer.config.window
        layer.reserve(min(layer.rows.reserved, window))
        layer.commit()
        layer.reserve(max(window, new))
        if not layer.rows.length:
            self.tokens = min(told or 0, new - 1)
        else:
            self.tokens = new if told is None or told >= new - 1 else told

    def end(self, layer: SpeculativeLayer) -> None:
        """Nothing more is speculative; the newest W tokens stay exact until the next ones come."""
        layer.reserve(min(layer.rows.reserved, layer.config.window))
        layer.commit()
        layer.reserve(0)

    def parts(self, rows: Rows, new: int, real: Tensor | None) -> tuple[slice, ...]:
        """New positions, cut where those before and those after find the rule applied to different tokens.

        Args:
            rows: where tokens are that came before.
            new: positions that come, of which the last :attr:`tokens` are speculative.
            real: bool ``[batch, new]`` on the CPU, which of them hold a token; None if all do.
        """
        return cut(rows, new, min(self.tokens, new), real)

    def attend(self, layer: SpeculativeLayer, view: KVView, call: AttentionCall) -> Tensor:
        """Attention of the layer's uncommitted tokens: to what each part of them would find, one after the other."""
        if layer.uncommitted is None or not view.is_current or layer.rows.undecided or not self.tokens:
            return view.compute(call)
        if call.query.shape[2] != view.new or not (call.causal or call.mask is not None):
            return view.compute(call)
        parts = self.parts(layer.rows, view.new, layer.rows.real_positions(call.mask, view.new, layer.batch_size))
        if len(parts) == 1:
            return view.compute(call)
        # A copy of the layer, to which they come by and by.
        twin, outs = layer.copy(), []
        for part in parts:
            twin.commit()
            keys, values = layer.uncommitted.states
            seen = twin.append(keys[:, :, part], values[:, :, part])
            mask = call.mask if call.mask is None or call.mask.shape[2] == 1 else call.mask[:, :, part]
            mask = None if mask is None else mask[..., : seen.length]
            outs.append(seen.attend(call._replace(query=call.query[:, :, part], mask=mask)))
        return torch.cat(outs, 2)


def cut(rows: Rows, new: int, speculative: int, real: Tensor | None) -> tuple[slice, ...]:
    """See :meth:`Speculation.parts`."""

    def make() -> tuple[slice, ...]:
        together = new - speculative
        ends = {new, together} - {0} if new else {0}
        batch = [[True] * new] * len(rows.slots) if real is None else real.tolist()
        for held, came in zip(rows.each(len(batch)), batch, strict=True):
            counts = itertools.accumulate(came, initial=held.tokens)
            done = [evictions(tokens, held.window, held.sinks) for tokens in counts]
            ends |= {i for i in range(together + 1, new) if done[i] > done[i - 1]}
        return tuple(itertools.starmap(slice, itertools.pairwise((0, *sorted(ends)))))

    return rows.once("cut", (new, speculative, None if real is None else real.numpy().tobytes()), make)
