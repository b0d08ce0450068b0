"""What baseline caches share: their settings make layers of transformers, which refuse what they cannot do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from ...cache.sizes import tensors_in


class Packed(NamedTuple):
    """Quantised keys, or values, or both, of one layer, over all rows of the batch.

    Attributes:
        nbytes: bytes of codes and parameters.
        elements: keys' and values' elements that they stand for.
        tokens: of one row.
    """

    nbytes: int
    elements: int
    tokens: int


@dataclass(frozen=True)
class Baseline(ABC):
    """The settings of a baseline; they make its caches."""

    @abstractmethod
    def layer(self, config: PreTrainedConfig) -> DynamicLayer:
        """An empty layer for a decoder with this configuration."""

    def make(self, config: PreTrainedConfig) -> Cache:
        """An empty cache; layers without full attention are what transformers would have made."""
        cache = DynamicCache(config=config)
        text = config.get_text_config(decoder=True)
        cache.layers = [self.layer(text) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def need(self, ok: bool, field: str, what: str) -> None:
        """Refuse a bad field (ValueError)."""
        if not ok:
            raise ValueError(f"{field} must be {what}, got {getattr(self, field)!r}")


class BaselineLayer(DynamicLayer):
    """A layer of a baseline: for prompts, decoding and sampling, not for rollback or beams.

    ``tokens`` counts those seen, whatever has become of them.
    """

    is_croppable = False
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def get_seq_length(self) -> int:
        return self.tokens

    def reset(self) -> None:
        super().reset()
        self.tokens = 0

    def packed(self) -> list[Packed]:
        """What is quantised: keys, then values, once there are some of both; nothing by default."""
        return []

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.nbytes for t in tensors_in(vars(self)))

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot remove, repeat or reorder what it holds: baseline caches do greedy decoding "
            "and sampling, not beam search or assisted generation"
        )

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse  # type: ignore[assignment]
