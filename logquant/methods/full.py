"""The cache that others are compared with: transformers' own, in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from .layers.base import Settings
from .registry import method


@method("full")
@dataclass(frozen=True)
class Full(Settings):
    """``DynamicCache``: every token stays exact."""

    is_full: ClassVar[bool] = True

    def make(self, config: PreTrainedConfig) -> Cache:
        return DynamicCache(config=config)
