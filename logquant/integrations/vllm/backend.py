"""What vLLM asks of an attention backend: two kinds of cache in one pool.

Each attention layer gets two KV caches in vLLM's one pool of equally large blocks: its own, of packed tokens, a
``FullAttentionSpec`` whose blocks cover many tokens, and that of a companion layer, of exact tokens, a
``SlidingWindowSpec``. vLLM's own managers do the rest: they take back the blocks that the window has left, share blocks
of equal prefixes, and recompute what was preempted.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, KVCacheSpec, SlidingWindowSpec

from .impl import LogQuantImpl
from .layout import PAGE, WINDOW, BlockLayout, Pool
from .metadata import Builder


class _Backend(AttentionBackend):  # type: ignore[misc]
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks it up among its own

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return LogQuantImpl

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability | None) -> bool:
        return capability is None or capability.major >= 8  # None: not a GPU

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False


class LogQuantBackend(_Backend):
    """Of the attention layers: blocks of packed tokens."""

    layout: ClassVar[BlockLayout | None] = None

    @classmethod
    @functools.cache
    def of(cls, layout: BlockLayout) -> type[LogQuantBackend]:
        """The backend with a layout, the same class each time: vLLM asks it for a spec without a layer."""
        return type(cls.__name__, (cls,), {"layout": layout, "__module__": cls.__module__})

    @staticmethod
    def companion(attention: Any, dtype: torch.dtype) -> ExactCache:
        """What holds the exact tokens of a layer; see :class:`ExactCache`."""
        return ExactCache(attention, dtype)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if cls.layout is None or not isinstance(spec, FullAttentionSpec):
            return spec
        # Its dtype stays that of exact tokens: vLLM would clear every new block of a pool with two dtypes.
        return replace(
            spec,
            block_size=cls.layout.tokens,
            tokens_per_state=cls.layout.tokens,
            state_content_bytes=cls.layout.words * torch.int32.itemsize,
        )


class ExactBackend(_Backend):
    """Of the companion layers: blocks of exact tokens."""


class ExactCache(nn.Module, AttentionLayerBase):  # type: ignore[misc]
    """The exact tokens of an attention layer: a layer to vLLM, though it computes nothing.

    Args:
        attention: the layer, vLLM's ``Attention``.
        dtype: of its keys and values.

    Attributes:
        pool: views on the blocks of the two layers, as long as they have these; None until somebody makes them.
    """

    pool: Pool | None

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_size, self.dtype = attention.head_size, dtype
        self.kv_cache = torch.tensor([])

    @property
    def kv_cache(self) -> torch.Tensor:
        """The pool's blocks, which vLLM sets, and sets again: after it has profiled a step, and when it stops."""
        return self._blocks

    @kv_cache.setter
    def kv_cache(self, blocks: torch.Tensor) -> None:
        # Views would keep the memory of those that were there before.
        self._blocks, self.pool = blocks, None

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return SlidingWindowSpec(
            block_size=PAGE,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.dtype,
            sliding_window=WINDOW,
        )
