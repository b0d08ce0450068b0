"""A layer that forgets tokens, or reads only some: what it shares with others of its kind."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...attention.call import AttentionCall
from ...attention.handle import handles
from ...attention.masks import hides
from ...attention.view import View
from .base import BaselineLayer


class EvictingLayer(BaselineLayer):
    """Exact keys and values of the tokens that a rule keeps, in order; all heads keep equally many.

    New tokens attend to what was there before they came and to each other; the rule is applied afterwards.
    """

    forgets = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self._waits = False

    @property
    def held(self) -> int:
        """Tokens held."""
        return self.keys.shape[2] if self.keys is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # To masks the tokens held look like the newest ones: all of them are older than the queries.
        return self.held + query_length, self.tokens - self.held

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys ``[B, H, n, D]`` and values ``[B, H, n, Dv]``; returns handles for those that attention sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._waits:
            raise RuntimeError(
                f"{type(self).__name__} was not told what attended to it: the model's attention implementation must be "
                "'logquant' or 'sdpa' (model.set_attn_implementation)"
            )
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self.tokens += key_states.shape[2]
        self._waits = True
        return handles(self.view(key_states.shape[2]))

    def view(self, new: int) -> View:
        """What the newest ``new`` tokens are to attend to."""
        return View(self, self.visible_keys(), self.values, new)

    def visible_keys(self) -> Tensor:
        """Keys ``[B, H, held, D]`` as attention is to see them."""
        keys: Tensor = self.keys
        return keys

    @torch.no_grad()
    def observe(self, view: View, call: AttentionCall | None) -> None:
        """Apply the rule, once attention has seen the new tokens."""
        if call is None or not self._waits:
            return
        if call.mask is not None and bool(hides(call.mask[:, :, -1, : view.length]).any()):
            raise ValueError(
                f"{type(self).__name__} takes no padding and no masks of its own: tokens would be kept or forgotten by "
                "places that padding has shifted; give sequences of one length, or one at a time"
            )
        self._waits = False
        self.evict(view, call)

    @abstractmethod
    def evict(self, view: View, call: AttentionCall) -> None:
        """Forget what the rule says: the newest ``view.new`` tokens have attended to ``view.keys``."""
