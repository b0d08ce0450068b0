"""The second forward pass of ``torch.utils.checkpoint``, which runs within the backward pass.

It gives a layer the same tokens once more. They must not come twice, and must attend to what they attended to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.call import AttentionCall
from ..attention.view import KVView, View
from .layout import Rows
from .storage import Storage


def in_backward() -> bool:
    """Whether a backward pass runs in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


class Step(NamedTuple):
    """An update, as the layer was before it.

    Attributes:
        storage: what the layer held; its pages may hold more by now.
        rows: where the tokens were.
        key_map: the bit allocation of the keys.
        states: the keys and values that came.
    """

    storage: Storage
    rows: Rows
    key_map: Tensor | None
    states: tuple[Tensor, Tensor]

    def is_of(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are the tokens that came."""
        came = self.states
        return keys.shape == came[0].shape and torch.equal(keys, came[0]) and torch.equal(values, came[1])

    def again(self, keys: Tensor, values: Tensor) -> KVView:
        """What the tokens attend to, computed anew."""
        new, held = keys.shape[2], self.storage
        if self.rows.length:
            keys, values = held.append(self.rows, keys, values, in_window=False)
        return KVView(
            _Unchanged(),
            keys,
            values,
            new,
            held.used_pages(self.rows),
            held.format,
            key_map=self.key_map,
            rows=self.rows,
            plain=self.rows.length == 0,
            units=held.units,
            severed=held.severed,
        )


class _Unchanged:
    """In place of a layer: it learns nothing."""

    version = 0

    def observe(self, view: View, call: AttentionCall | None) -> None:
        pass

    def attend(self, view: KVView, call: AttentionCall) -> Tensor:
        return view.compute(call)


class Recompute:
    """The updates of a layer that autograd has recorded."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def record(self, step: Step) -> None:
        """An update comes."""
        self._steps.append(step)

    def forget(self) -> None:
        """What comes next is not recorded, or follows on nothing."""
        self._steps.clear()

    def again(self, keys: Tensor, values: Tensor, length: int) -> View:
        """The view of an update that comes once more.

        Args:
            keys, values: what comes.
            length: how many positions the layer holds.

        Raises:
            RuntimeError: it has not been recorded, and there were tokens before it.
        """
        for step in reversed(self._steps):
            if step.is_of(keys, values):
                return step.again(keys, values)
        if length == keys.shape[2]:
            return View(_Unchanged(), keys, values, length)
        raise RuntimeError(
            "a LogQuant cache was given tokens in a backward pass that had not come with a gradient before: "
            "use torch.utils.checkpoint with use_reentrant=False, or no cache"
        )
