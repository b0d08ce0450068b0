"""LESS (2402.09398) as its paper states it, in plain torch, and files of features to state it with."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from logquant import ops
from logquant.attention.call import AttentionCall
from logquant.attention.view import KVView
from logquant.files import fingerprint
from logquant.residual.less import Less
from logquant.residual.trained import Trained
from tests.helpers import corm


def features(config: PreTrainedConfig, layer: int, rank: int = 8) -> Less:
    """Random ones that weigh something: what is left of dropped tokens shows."""
    heads, dim = config.num_key_value_heads, config.head_dim
    random = torch.Generator().manual_seed(layer)
    made = Less.random(config.num_attention_heads, heads, dim, hidden=16, rank=rank, generator=random)
    return made._replace(size=torch.full_like(made.size, 0.5), share=torch.full_like(made.share, 0.3))


def write_features(path: Path, config: PreTrainedConfig, layers: list[int] | None = None, rank: int = 8) -> str:
    """A file of such, and the setting that names it."""
    numbers = range(config.num_hidden_layers) if layers is None else layers
    nets = {layer: features(config, layer, rank) for layer in numbers}
    Trained("less", nets, fingerprint(config), {}).save(path)
    return f"less(file={path})"


def phi(net: Less, query: Tensor, query_head: int) -> Tensor:
    """Of queries ``[L, D]`` of one query head, ``[L, R]``."""
    return F.gelu(F.gelu(query @ net.query_in[query_head].double()) @ net.query_out[query_head].double()).abs()


def psi(net: Less, keys: Tensor, head: int) -> Tensor:
    """Of keys ``[T, D]`` of one KV head, ``[T, R]``."""
    inner = F.gelu(F.gelu(keys @ net.key_in[head].double()) @ net.key_out[head].double())
    scaled = inner * net.size[head].double().abs()
    return (scaled + scaled @ net.mix[head].double() * net.share[head].double()).abs()


def attention(
    view: KVView, call: AttentionCall, net: Less, dropped: list[list[tuple[Tensor, Tensor]]]
) -> tuple[Tensor, Tensor]:
    """What queries make of what a view holds and of ``dropped`` keys and values of each row and KV head.

    Returns:
        The output, float64 ``[B, Hq, L, Dv]``, and the least share that dropped tokens have of a softmax.
    """
    batch, query_heads, asked, _ = call.query.shape
    heads = view.keys.shape[1]
    outs, least = [], torch.tensor(1.0, dtype=torch.float64)
    for row in range(batch):
        for query_head in range(query_heads):
            head = query_head // (query_heads // heads)
            keys, values = (x.double() for x in _held(view, row, head))
            old_keys, old_values = (x.double() for x in dropped[row][head])
            query = call.query[row, query_head].double()
            scores = query @ keys.T * call.scale
            later = torch.arange(len(keys)) > torch.arange(len(keys) - asked, len(keys))[:, None]
            given = scores.masked_fill(later, -torch.inf).exp()
            left = phi(net, query, query_head) @ psi(net, old_keys, head).T
            total = given.sum(-1, keepdim=True) + left.sum(-1, keepdim=True)
            if call.sinks is not None:
                total = total + call.sinks[query_head].double().exp()
            outs.append((given @ values + left @ old_values) / total)
            least = torch.minimum(least, (left.sum(-1) / total[:, 0]).min())
    return torch.stack(outs).unflatten(0, (batch, query_heads)), least


def _held(view: KVView, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values that a KV head has, as they came, those of pages first; all rows alike."""
    if view.ragged is not None:
        return view.units.outside(*corm.held_tokens(view, row, head))
    own_map = None if view.key_map is None else view.key_map[row : row + 1, head : head + 1]
    packed = ops.dequantize(view.pages[row : row + 1, head : head + 1], view.fmt, key_map=own_map)
    k, v = (torch.cat([p[0, 0], x[row, head]]) for p, x in zip(packed, (view.keys, view.values), strict=True))
    return view.units.outside(k, v)
