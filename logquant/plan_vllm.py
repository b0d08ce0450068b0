"""How many requests vLLM holds at once in a number of bytes, as its KV cache manager counts: nothing of vLLM.

Its pool is of blocks that are equally large, one of which it keeps for itself. A request of LogQuant has blocks of
packed tokens for all of its tokens, and of exact ones for those in its window, and for those of the step that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from .config import LogQuantConfig
from .integrations.vllm.layout import PAGE, WINDOW, BlockLayout
from .plan import Plan, head_shape, largest

# Of vLLM's own cache, by default, on a CPU.
_BLOCK_TOKENS = 128


@dataclass(frozen=True)
class Blocks:
    """What a request takes of the pool.

    Args:
        nbytes: of a block, in all layers together.
        tokens: that a block holds of those that stay.
        exact: whether tokens have blocks of :data:`PAGE` exact ones besides, while they are in the window.
    """

    nbytes: int
    tokens: int
    exact: bool

    def of(self, seen: int, new: int) -> int:
        """Blocks that a request holds in a step in which ``new`` tokens come after ``seen``."""
        blocks = -(-(seen + new) // self.tokens)
        if self.exact:
            blocks += (seen + new - 1) // PAGE - max(0, seen - WINDOW + 1) // PAGE + 1
        return blocks

    def most(self, tokens: int, chunk: int) -> int:
        """Blocks that a request holds at once at most, while its prompt is read in chunks, or when it then decodes."""
        # Those of the prompt are in its last chunks.
        first = max(0, (tokens - 1) // chunk - 2) * chunk
        chunks = [(begin, min(chunk, tokens - begin)) for begin in range(first, tokens, chunk)]
        return max(self.of(*part) for part in [*chunks, (tokens, 1)])

    def requests(self, budget: int, tokens: int, chunk: int) -> int:
        """Requests of ``tokens`` tokens that have been read, one after the other, in chunks, and decode."""
        pool, most = budget // self.nbytes - 1, self.most(tokens, chunk)
        return 0 if pool < most else 1 + (pool - most) // self.of(tokens, 1)


def blocks_of(
    quantization: LogQuantConfig | None, config: PreTrainedConfig, dtype: torch.dtype, drafts: bool = False
) -> Blocks:
    """The blocks of a model.

    Args:
        quantization: what vLLM's setting ``logquant`` says (``config_from`` of integrations/vllm/guards.py); None:
            vLLM's own cache.
        config: the model's configuration.
        dtype: of the cache.
        drafts: whether decoding is speculative.

    Raises:
        ValueError: a model with other layers than those of full attention, one of low rank, or one that
            :class:`BlockLayout` refuses.
    """
    if low := getattr(config.get_text_config(decoder=True), "lowrank", None):
        raise ValueError(f"vLLM knows no models of low rank, got config.lowrank={low!r}")
    shape, layers = head_shape(config), DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            raise ValueError(f"layer {i} must be full attention for vLLM, got {type(layer).__name__}")
    token = len(layers) * shape.count * 2 * shape.dim * dtype.itemsize
    if quantization is None:
        return Blocks(token * _BLOCK_TOKENS, _BLOCK_TOKENS, exact=False)
    layout = BlockLayout.of(quantization, shape.dim, shape.group, dtype, drafts)
    return Blocks(token * PAGE, layout.tokens, exact=True)


def plan(name: str, blocks: Blocks, *, budget: int, tokens: int, chunk: int) -> Plan:
    """What fits into ``budget`` bytes of vLLM's pool; bytes of a request are those of its blocks while it decodes.

    Args:
        name: of the cache.
        blocks: its blocks (:func:`blocks_of`).
        budget: ``kv_cache_memory_bytes``.
        tokens: of a request, prompt and generated.
        chunk: ``max_num_batched_tokens``.
    """
    nbytes = blocks.of(tokens - 1, 1) * blocks.nbytes
    longest = largest(lambda n: n == 0 or blocks.requests(budget, n - 1, chunk) > 0)
    return Plan(name, nbytes, blocks.requests(budget, max(1, tokens - 1), chunk), longest)
