"""What methods share: the settings that make a cache, and the layers of other systems' caches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, runtime_checkable

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from ...cache.sizes import tensors_in
from ...config import LogQuantConfig


def need_powers_of_two(method: str, *states: Tensor) -> None:
    """Refuse keys or values ``[B, H, n, D]`` that the Hadamard transform of a method does not fit (ValueError)."""
    for dim in (x.shape[3] for x in states):
        if dim & (dim - 1) or dim < 16:
            raise ValueError(f"{method} needs head dimensions that are powers of two from 16 on, got {dim}")


def need_group_divides(group: int, value_states: Tensor) -> None:
    """Refuse values ``[B, H, n, Dv]`` whose channels do not fall into groups (ValueError)."""
    if value_states.shape[3] % group:
        raise ValueError(f"group must divide the value dimension {value_states.shape[3]}, got {group}")


class Settings(ABC):
    """The settings of a method; they make its caches. A frozen dataclass, which validates its fields.

    ``is_full`` says whether every token stays exact.
    """

    is_full: ClassVar[bool] = False

    @property
    def quantization(self) -> LogQuantConfig | None:
        """The configuration of a LogQuant cache, None for others."""
        return None

    @abstractmethod
    def make(self, config: PreTrainedConfig) -> Cache:
        """An empty cache for a model with this configuration.

        Raises:
            ImportError: a cache of a package that is not installed.
            ValueError: a model that this kind of cache does not fit.
        """

    def need(self, ok: bool, field: str, what: str) -> None:
        """Refuse a bad field (ValueError)."""
        if not ok:
            raise ValueError(f"{field} must be {what}, got {getattr(self, field)!r}")


class Baseline(Settings):
    """The settings of another system; they make its layers."""

    @abstractmethod
    def layer(self, config: PreTrainedConfig) -> DynamicLayer:
        """An empty layer for a decoder with this configuration."""

    def make(self, config: PreTrainedConfig) -> Cache:
        """An empty cache; layers without full attention are what transformers would have made."""
        cache = DynamicCache(config=config)
        text = config.get_text_config(decoder=True)
        cache.layers = [self.layer(text) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache


class Packed(NamedTuple):
    """Quantised keys, or values, or both, of one layer, over all rows of the batch.

    Attributes:
        nbytes: bytes of codes and parameters.
        elements: keys' and values' elements that they stand for.
        tokens: of one row.
        fixed_nbytes: bytes that they need besides, however many tokens there are.
    """

    nbytes: int
    elements: int
    tokens: int
    fixed_nbytes: int = 0


@runtime_checkable
class HoldsPacked(Protocol):
    """A layer that says what it holds quantised."""

    def packed(self) -> list[Packed] | None:
        """Keys and values, together or one after the other; nothing as long as none are; None if none ever will be."""


class BaselineLayer(DynamicLayer):
    """A layer of a baseline: for prompts, decoding and sampling, not for rollback or beams.

    ``tokens`` counts those seen, whatever has become of them; ``forgets`` says whether as many are forgotten as come.
    """

    is_croppable = False
    forgets: ClassVar[bool] = False
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

    def packed(self) -> list[Packed] | None:
        """What is quantised (:class:`HoldsPacked`); by default nothing ever is."""
        return None

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
