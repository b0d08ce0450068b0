"""What a forward pass needs to know of a batch, as vLLM tells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from .layout import BlockLayout, Ints
from .step import Batch, Step


@dataclass
class Metadata(AttentionMetadata):  # type: ignore[misc]
    """A batch as one of the two caches has it.

    Attributes:
        starts, lengths: as of :class:`logquant.integrations.vllm.step.Batch`.
        blocks: int32 ``[requests, n]``, the block table.
        slots: int64 ``[tokens]``, where each token goes.
    """

    starts: Ints
    lengths: Ints
    blocks: Tensor
    slots: Tensor
    _steps: dict[tuple[BlockLayout, int], Step] = field(default_factory=dict)

    def step(self, exact: Metadata, layout: BlockLayout, heads: int) -> Step:
        """The forward pass, as packed tokens, which this is of, and exact ones have it: for all layers the same."""
        key = layout, heads
        if key not in self._steps:
            batch = Batch(exact.starts, exact.lengths, self.blocks, exact.blocks, exact.slots)
            self._steps[key] = Step.of(batch, layout, heads)
        return self._steps[key]


class Builder(AttentionMetadataBuilder[Metadata]):  # type: ignore[misc]
    """Makes :class:`Metadata`, from what vLLM has on the CPU. No CUDA graphs: numbers of rows and pages change."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # vLLM's is abstract
        super().__init__(*args, **kwargs)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        common = common_attn_metadata
        # Exact where the next step waits for the last one's drafts to be judged, as with all that guards.py serves.
        lengths = common.seq_lens_cpu_upper_bound
        if lengths is None:
            lengths = common.seq_lens.cpu()
        count = common.num_reqs
        # Copies: vLLM writes the next step into the same memory.
        return Metadata(
            common.query_start_loc_cpu[: count + 1].numpy().astype(np.int64),
            lengths[:count].numpy().astype(np.int64),
            common.block_table_tensor,
            common.slot_mapping,
        )
