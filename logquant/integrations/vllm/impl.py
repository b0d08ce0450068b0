"""The attention of a layer, as vLLM calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from ...ops import has_cuda_kernels
from . import attention, guards
from .layout import PAGE, BlockLayout, Pool
from .maps import key_map
from .metadata import Metadata
from .packing import Quantizer


class LogQuantImpl(AttentionImpl[Metadata]):  # type: ignore[misc]
    """Attention over packed and exact tokens of a layer; the arguments are vLLM's.

    Raises:
        ValueError: a layer or a configuration that LogQuant cannot serve.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        wrong = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            f"attention of the kind {attn_type}": attn_type != AttentionType.DECODER,
            "the keys and values of another layer": kv_sharing_target_layer_name is not None,
            ", ".join(others): bool(others),
        }
        if reasons := [what for what, is_so in wrong.items() if is_so]:
            raise ValueError(
                f"LogQuant's KV cache serves models whose layers all have full causal attention, got one with "
                f"{'; '.join(reasons)}"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = float(logits_soft_cap or 0.0)
        self.vllm_config = get_current_vllm_config()
        guards.check(self.vllm_config)
        self.config = guards.config_of(self.vllm_config)
        if current_platform.is_cuda() and not has_cuda_kernels():
            raise ValueError(
                "LogQuant's KV cache needs its CUDA kernels on a GPU, and this logquant was installed without: "
                "LOGQUANT_CUDA=1 pip install ... builds them (docs/cuda.md)"
            )
        scheduler = self.vllm_config.scheduler_config
        # A request has a row for each page that its new tokens lie in: seldom more than these in all.
        self._most_rows = scheduler.max_num_seqs + -(-scheduler.max_num_batched_tokens // PAGE)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """All layers are known now, and have not been asked for their caches: the time to add a companion.

        Weights may be loaded again later, when there are caches.
        """
        layers = self.vllm_config.compilation_config.static_forward_context
        self.name = next(name for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        self.exact_name = f"{self.name}.exact"
        layer = layers[self.name]
        dtype = layer.kv_cache_torch_dtype
        if dtype != act_dtype:
            raise ValueError(f"kv_cache_dtype must be the model's, {act_dtype}, got {dtype}")
        if layer.head_size_v != self.head_size:
            raise ValueError(f"values must be as long as keys, {self.head_size}, got {layer.head_size_v}")
        group = self.num_heads // self.num_kv_heads
        layout = BlockLayout.of(self.config, self.head_size, group, dtype, guards.drafts(self.vllm_config))
        guards.check_drafts(self.vllm_config, layout.most_drafts)
        if self.exact_name not in layers:
            layers[self.exact_name] = layer.attn_backend.companion(layer, dtype)
            layer.attn_backend = layer.attn_backend.of(layout)
        layers[self.exact_name].pool = None  # so that what follows goes to the device of the blocks
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        total = model.get_total_num_kv_heads()
        # Ranks beyond the number of KV heads share them.
        first = get_tensor_model_parallel_rank() * total // parallel.tensor_parallel_size
        own = slice(first, first + self.num_kv_heads)
        maps = key_map(self.config, model.hf_config, extract_layer_index(self.name), layout.fmt, total)
        self.quantizer = Quantizer(
            layout, None if maps is None else maps[:, own].contiguous(), self.scale, self.softcap
        )

    def _pool(self, blocks: Tensor) -> Pool:
        """The views on the layer's blocks, made once."""
        exact = self.vllm_config.compilation_config.static_forward_context[self.exact_name]
        pool: Pool | None = exact.pool
        if pool is None:
            if exact.kv_cache.data_ptr() != blocks.data_ptr():
                raise RuntimeError("packed and exact blocks of a layer must be one pool, and vLLM has made two")
            layout, key_map = self.quantizer.layout, self.quantizer.key_map
            if key_map is not None:
                self.quantizer = self.quantizer._replace(key_map=key_map.to(blocks.device))
            exact.pool = pool = Pool.of(blocks, layout)
        return pool

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # a profiling run, which is to see what attention takes at once
            torch.empty(
                self.quantizer.layout.window_nbytes(self._most_rows, self.num_kv_heads),
                dtype=torch.uint8,
                device=query.device,
            )
            return output.zero_()
        every: Any = get_forward_context().attn_metadata
        exact: Metadata = (every[0] if isinstance(every, list) else every)[self.exact_name]
        pool = self._pool(kv_cache)
        step = attn_metadata.step(exact, self.quantizer.layout, self.num_kv_heads)
        attention.forward(query, key, value, pool, step, self.quantizer, output)
        return output
