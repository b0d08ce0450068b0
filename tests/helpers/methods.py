"""Tokens for the layers of methods, and what becomes of them, in plain Python."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

BATCH, HEADS, QUERY_HEADS, DIM = 2, 2, 4, 32
# A prompt, then steps and chunks.
ARRIVALS = [[10, *[1] * 30], [64, *[1] * 20], [65, *[1] * 40], [129, 7, 1, 40, *[1] * 5], [1] * 75, [200]]


def tokens_for(total, seed=0):
    """Keys and values of all tokens, and queries."""
    generator = torch.Generator().manual_seed(seed)
    make = [(BATCH, heads, total, DIM) for heads in (HEADS, HEADS, QUERY_HEADS)]
    return [torch.randn(shape, generator=generator) for shape in make]


def feed(layer, arrivals, seed=0):
    """Give a layer tokens as they arrive, and attend to it. Returns all keys and values, and the outputs."""
    keys, values, queries = tokens_for(sum(arrivals), seed)
    first, outputs = 0, []
    for new in arrivals:
        part = slice(first, first + new)
        seen_k, seen_v = layer.update(keys[:, :, part], values[:, :, part])
        # As transformers does: no mask for a step, none but is_causal for a prompt.
        mask = torch.ones(new, seen_k.shape[2], dtype=torch.bool).tril(seen_k.shape[2] - new)[None, None]
        how = {"is_causal": True} if first == 0 and new > 1 else {"attn_mask": mask if new > 1 else None}
        out = F.scaled_dot_product_attention(queries[:, :, part], seen_k, seen_v, enable_gqa=True, **how)
        outputs.append(out)
        first += new
    return keys, values, outputs


def exact_positions(dense, original):
    """Positions at which a cache gives back what it was given."""
    same = (dense == original).flatten(0, 1).all(-1)
    assert (same == same[0]).all()
    return same[0].nonzero().flatten().tolist()


def half(x):
    return torch.tensor(x).half().item()


def minmax(group, bits=2):
    """What a group of floats becomes, in plain Python."""
    low = half(min(group))
    scale = half((max(group) - min(group)) / (2**bits - 1))
    return [low + scale * min(max(round((x - low) / scale), 0), 2**bits - 1) for x in group]


def walsh(dim):
    """The orthonormal Hadamard matrix of Sylvester, float64 ``[dim, dim]``."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
    return torch.tensor(signs).double() / dim**0.5


# What all methods are tested with: settings that matter within some hundred tokens.
NAMES = [
    "partial",
    "kivi",
    "turboquant",
    "turboquant:bits=4",
    "oscar:sinks=4,recent=64",
    "kvarn:tile=64,sinks=4",
    "occam:residual=64",
    "kitty:residual=64,sinks=4",
    "nexusquant",
    "streaming:recent=100",
    "h2o:heavy=50,recent=50",
    "clusterkv:budget=60,per_cluster=20,sinks=4,window=40,skip=0",
]
if importlib.util.find_spec("hqq"):
    NAMES.append("hqq")
