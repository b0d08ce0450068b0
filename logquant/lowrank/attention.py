"""Attention of the Llama family that caches latents: values of fewer channels, or keys and values."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.handle import KVHandle
from ..compat import from_arguments
from .positions import key_positions

# Attention modules whose forward pass is Llama's, with or without biases and with norms of queries and keys.
FAMILIES = (
    "LlamaAttention",
    "MistralAttention",
    "MixtralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
)
_SETTINGS = (
    "config",
    "layer_idx",
    "head_dim",
    "num_key_value_groups",
    "scaling",
    "attention_dropout",
    "is_causal",
)


class LowRankAttention(nn.Module):
    """In the place of a family's attention.

    Values: ``v_proj`` gives each KV head ``rank`` channels, which are what is cached; ``o_proj`` takes as many of each
    query head, for attention is linear in values. So nothing else changes, and attention stays fused.

    Keys, if ``key_rank`` is given: ``k_proj`` gives the latents of all KV heads together, of which the cache holds an
    equal part as each head's; ``k_up`` makes keys of them. Rotation comes after it and depends on the position, so no
    query can absorb ``k_up``: keys of all tokens are made and rotated anew in every forward pass, and attention is over
    plain tensors.

    Args:
        full: the attention that it replaces, whose other parts it takes over.
        rotary: what gives cosines and sines to the model.
        rank: channels of a value.
        key_rank: latents of keys, of all KV heads; None: keys are as ever.
        value_bias: whether values have a bias, which ``o_proj`` then has in its own.
    """

    config: Any
    layer_idx: int
    head_dim: int
    num_key_value_groups: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def __init__(
        self, full: Any, rotary: nn.Module, rank: int, key_rank: int | None = None, *, value_bias: bool = False
    ) -> None:
        super().__init__()
        for name in _SETTINGS:
            setattr(self, name, getattr(full, name))
        self.family: type = type(full)
        self.sliding_window = getattr(full, "sliding_window", None)
        self.rank, self.key_rank = rank, key_rank
        # In a tuple: it is the model's part, not this module's.
        self._rotary = (rotary,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            setattr(self, name, getattr(full, name, None))
        hidden, heads = self.v_proj.in_features, self.kv_heads
        like: dict[str, Any] = {"device": self.v_proj.weight.device, "dtype": self.v_proj.weight.dtype}
        if rank < self.head_dim:
            queries = self.q_proj.out_features // self.head_dim
            bias = value_bias or self.o_proj.bias is not None
            self.v_proj = nn.Linear(hidden, heads * rank, bias=False, **like)
            self.o_proj = nn.Linear(queries * rank, self.o_proj.out_features, bias=bias, **like)
        self.k_up: nn.Linear | None = None
        if key_rank is not None:
            bias = self.k_proj.bias is not None
            self.k_proj = nn.Linear(hidden, key_rank, bias=False, **like)
            self.k_up = nn.Linear(key_rank, heads * self.head_dim, bias=bias, **like)

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.q_proj.out_features // self.head_dim // self.num_key_value_groups

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the attention that it replaces."""
        cache = from_arguments(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}
        shape = hidden_states.shape[:-1]
        query = self._normed(self.q_norm, self.q_proj(hidden_states).view(*shape, -1, self.head_dim))
        query = self._rotated(query.transpose(1, 2), *position_embeddings)
        keys = self.k_proj(hidden_states).view(*shape, self.kv_heads, -1)
        values = self.v_proj(hidden_states).view(*shape, self.kv_heads, -1).transpose(1, 2)
        if self.k_up is None:
            keys = self._rotated(self._normed(self.k_norm, keys).transpose(1, 2), *position_embeddings)
            if cache is not None:
                keys, values = cache.update(keys, values, self.layer_idx)
            out, weights = self._attend(query, keys, values, attention_mask, **kwargs)
        else:
            out, weights = self._attend_latents(query, keys.transpose(1, 2), values, attention_mask, cache, **kwargs)
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        eager = sys.modules[self.family.__module__].eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if self.sliding_window is not None:
            options["sliding_window"] = self.sliding_window
        found: tuple[Tensor, Tensor | None] = attention(self, query, keys, values, mask, **options, **kwargs)
        return found

    @torch.compiler.disable
    def _attend_latents(
        self, query: Tensor, latents: Tensor, values: Tensor, mask: Tensor | None, cache: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over keys that are made of the latents of all tokens, ``[B, H, n, key_rank / H]``."""
        positions = kwargs["position_ids"]
        view = None
        if cache is not None:
            latents, values = cache.update(latents, values, self.layer_idx)
            if isinstance(latents, KVHandle):
                view = latents.kv_view
                view.check(mask)
                latents, values = view.dense()
        assert self.k_up is not None
        batch, _, tokens, _ = latents.shape
        keys = self.k_up(latents.transpose(1, 2).flatten(2)).view(batch, tokens, self.kv_heads, self.head_dim)
        keys = self._normed(self.k_norm, keys).transpose(1, 2)
        turns = self._rotary[0](keys, key_positions(positions, mask, tokens))
        out = self._attend(query, self._rotated(keys, *turns), values, mask, **kwargs)
        if view is not None:
            view.observe(None)
        return out

    @staticmethod
    def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
        return x if norm is None else norm(x)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` ``[B, H, n, D]`` with the model's rotation of ``[1 or B, n, D]``."""
        half = sys.modules[self.family.__module__].rotate_half
        turned: Tensor = x * cos.unsqueeze(1) + half(x) * sin.unsqueeze(1)
        return turned
