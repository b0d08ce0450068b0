"""Attention over plain tensors, where torch's own knows no softcap and no sinks."""

from __future__ import annotations

import pytest
import torch

from logquant.attention import exact
from logquant.attention.call import AttentionCall
from logquant.attention.exact import exact_attention


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
def test_exact_attention_in_blocks(monkeypatch, softcap, with_sinks, kind):
    monkeypatch.setattr(exact, "_SCORES_AT_ONCE", 2 * 4 * 50 * 7)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 50, d, generator=random) for h, d in ((4, 32), (2, 32), (2, 16)))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    seen = torch.ones(50, 50, dtype=torch.bool).tril()
    mask = {"bool": seen[None, None], "float": torch.zeros(50, 50).masked_fill(~seen, -torch.inf)[None, None]}.get(kind)
    got = exact_attention(AttentionCall(q, mask, 0.2, softcap, sinks, kind == "causal"), k, v)
    scores = 0.2 * q @ k.repeat_interleave(2, 1).mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if kind != "none":
        scores = scores.masked_fill(~seen, -torch.inf)
    if with_sinks:
        scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 50, 1)], -1)
    want = scores.softmax(-1)[..., :50] @ v.repeat_interleave(2, 1)
    assert torch.allclose(got, want, atol=1e-5)
