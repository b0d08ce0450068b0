"""A layer whose oldest tokens are quantised, apart from the very first ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .base import BaselineLayer, Packed


class Quantizer(Protocol):
    """Makes tensors of tokens, and tokens of those tensors again; both have the tokens along dimension 2."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of ``x`` ``[B, H, n, D]``; encodings of consecutive tokens can be joined along dimension 2."""

    def decode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Float32 ``[B, H, n, D]`` from what :meth:`encode` made, one argument each."""


class Decoded:
    """What quantised tokens were decoded to, so that it is done once; no part of what a cache holds.

    Attributes:
        tokens: ``[B, H, n, D]``, the first so many of the quantised tokens; None before any.
        parts: of their encoding along dimension 2.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.parts = 0

    def up_to_date(self, parts: tuple[Tensor, ...], decode: Callable[..., Tensor]) -> Tensor:
        """All tokens, of which only those that are new are decoded."""
        if self.tokens is None or self.parts < parts[0].shape[2]:
            new = decode(*(part[:, :, self.parts :] for part in parts))
            self.tokens = new if self.tokens is None else torch.cat([self.tokens, new], 2)
            self.parts = parts[0].shape[2]
        return self.tokens


class QuantizingLayer(BaselineLayer):
    """Keys and values in their order, ``[sinks | quantised | exact]`` each.

    New tokens attend to what was there before they came, and exactly to each other. ``keys`` and ``values`` hold the
    exact tokens, ``key_parts`` and ``value_parts`` the quantised ones. They are decoded at every step, or after
    :meth:`remember` only once: that takes the memory of a full cache, and is for measurements of accuracy alone.

    Args:
        sinks: first tokens that stay exact.
    """

    key_quantizer: Quantizer
    value_quantizer: Quantizer
    _decoded: tuple[Decoded, Decoded] | None = None

    def __init__(self, sinks: int = 0) -> None:
        super().__init__()
        self.sinks = sinks
        self._forget()

    def _forget(self) -> None:
        self.key_parts: tuple[Tensor, ...] = ()
        self.value_parts: tuple[Tensor, ...] = ()
        self.packed_keys = self.packed_values = 0
        self._decoded = None

    def remember(self) -> None:
        """Decode quantised tokens once, not at every step, and keep them: faster, with the same results."""
        self._decoded = Decoded(), Decoded()

    def reset(self) -> None:
        super().reset()
        self._forget()

    @abstractmethod
    def packed_tokens(self, tokens: int) -> tuple[int, int]:
        """How many keys and how many values are quantised once ``tokens`` tokens have been seen: the rule."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys ``[B, H, n, D]`` and values ``[B, H, n, Dv]``; returns all tokens, dequantised, in order."""
        seen = self._append(key_states, value_states)
        self._pack()
        return seen

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens become exact ones. Returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self.tokens += key_states.shape[2]
        return self.dense()

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys ``[B, H, T, D]`` and values ``[B, H, T, Dv]``, dequantised, in order."""
        decoded = self._decoded or (None, None)
        return (
            self._joined(self.keys, self.key_parts, self.packed_keys and self.key_quantizer, decoded[0]),
            self._joined(self.values, self.value_parts, self.packed_values and self.value_quantizer, decoded[1]),
        )

    def _joined(
        self, exact: Tensor, parts: tuple[Tensor, ...], quantizer: Quantizer | int, decoded: Decoded | None
    ) -> Tensor:
        if isinstance(quantizer, int):
            return exact
        history = quantizer.decode(*parts) if decoded is None else decoded.up_to_date(parts, quantizer.decode)
        history = history.to(exact.dtype)
        return torch.cat([exact[:, :, : self.sinks], history, exact[:, :, self.sinks :]], 2)

    def _pack(self) -> None:
        """Quantise what the rule says."""
        keys, values = self.packed_tokens(self.tokens)
        if (new := keys - self.packed_keys) > 0:
            self.keys, self.key_parts = self._moved(self.keys, self.key_parts, self.key_quantizer, new)
            self.packed_keys = keys
        if (new := values - self.packed_values) > 0:
            self.values, self.value_parts = self._moved(self.values, self.value_parts, self.value_quantizer, new)
            self.packed_values = values

    def _moved(
        self, exact: Tensor, parts: tuple[Tensor, ...], quantizer: Quantizer, count: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        sinks, leaving, rest = exact.split([self.sinks, count, exact.shape[2] - self.sinks - count], 2)
        encoded = quantizer.encode(leaving)
        joined = tuple(torch.cat(pair, 2) for pair in zip(parts, encoded, strict=True)) if parts else encoded
        return torch.cat([sinks, rest], 2), joined

    def packed(self) -> list[Packed]:
        """Keys, then values, once there are some of both."""
        if not (self.packed_keys and self.packed_values):
            return []
        counts = (self.keys, self.key_parts, self.packed_keys), (self.values, self.value_parts, self.packed_values)
        return [
            Packed(sum(t.nbytes for t in parts), exact.shape[0] * exact.shape[1] * tokens * exact.shape[3], tokens)
            for exact, parts, tokens in counts
        ]
