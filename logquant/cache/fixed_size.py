"""``FixedSize``: the layers of a cache with a ``max_length``, and what they do together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin
from transformers.cache_utils import StaticLayer as FullStaticLayer

from ..config import LogQuantConfig
from .layout import Rows
from .shared import Shared
from .static import StaticLayer


class FixedSize:
    """The layers of a cache of fixed size.

    Args:
        config: the model's configuration.
        settings: those of each layer.
        shared, rows: as for :class:`StaticLayer`.
        max_length: N, positions there is room for.

    Attributes:
        layers: of the model, a :class:`StaticLayer` where attention sees all tokens.

    Raises:
        ValueError: no positive ``max_length``, or an option that goes with caches that grow alone.
    """

    def __init__(
        self, config: PreTrainedConfig, settings: Sequence[LogQuantConfig], shared: Shared, rows: Rows, max_length: int
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        for name, quantization in product(("recall", "prune", "evict"), settings):
            if (option := getattr(quantization, name)) is not None:
                raise ValueError(
                    f"{name} does not go with max_length: got {name}={option!r} and max_length={max_length}"
                )
        self.max_length, self._shared, self._announced = max_length, shared, False
        self.layers: list[Any] = [
            StaticLayer(settings[i], shared, rows, i, max_length) if type(layer) is FullStaticLayer else layer
            for i, layer in enumerate(StaticCache(config=config, max_cache_len=max_length).layers)
        ]
        self._own = [layer for layer in self.layers if isinstance(layer, StaticLayer)]
        # Of those that keys and values come to, which linear attention has none of.
        self._first = next((i for i, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)), 0)

    def make_room(self) -> None:
        """Somebody is about to take a step: so that it fits, tokens that are due leave the windows.

        Raises:
            ValueError: all N positions are held; nothing has changed.
        """
        shared = self._shared
        shared.steps_left -= 1
        # One step is spare: a compiled step may have been announced where one that is not compiled followed it.
        if shared.steps_left <= 1 and self._own:
            shared.steps_left = min([layer.make_room() for layer in self._own])
        self._announced = True

    def arrive(self, layer_idx: int, new: int) -> None:
        """So many tokens come to a layer, where nothing is compiled.

        Raises:
            ValueError: there is no room for them; no layer has taken one.
        """
        if layer_idx != self._first:
            return
        if new > 1 and self._own:  # of a single step make_room knows, without a look at the device
            self._own[0].check_length(new)
        if not self._announced:
            self.make_room()
        self._announced = False

    def resize(self, max_length: int) -> None:
        """Have room for another number of positions; what is held is copied.

        Raises:
            ValueError: there are other layers, or more is held.
        """
        if len(self._own) < len(self.layers) or not self._own:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise ValueError(f"resize is for caches with full attention in all layers, got {kinds}")
        held = max(layer.length for layer in self._own)
        if max_length < held:
            raise ValueError(f"max_length must be at least the {held} positions that are held, got {max_length}")
        for layer in self._own:
            layer.resize(max_length)
        self.max_length = max_length
