"""What is refused of caches whose KV heads have chosen tokens of a prompt for themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from logquant import LogQuantCache
from logquant.attention.call import AttentionCall
from logquant.cache.layer import LogQuantLayer
from tests.helpers.models import logits_of


def check_dense_attention(model, cache: LogQuantCache, prompt: Tensor, message: str) -> None:
    """Attention that wants all keys and values is refused: with the prompt by this message, and with a later token.

    The cache then holds the prompt.
    """
    with pytest.raises(RuntimeError, match=message):
        logits_of(model, cache, prompt, [prompt.shape[1]], "eager")
    cache.reset()
    logits_of(model, cache, prompt, [prompt.shape[1]], "logquant")
    with pytest.raises(RuntimeError, match="there are no keys and values of all positions"):
        logits_of(model, cache, prompt, [1], "eager")
    cache.rewind()
    with pytest.raises(RuntimeError, match="there are no keys and values of all positions"):
        cache.layers[0].keys  # noqa: B018


def check_masks(layer: LogQuantLayer) -> None:
    """Masks that hide a token, or add to its score, are refused, and others not; of two rows without padding."""
    q, k = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 1, 32)
    mask = torch.ones(2, 1, 1, layer.length + 1, dtype=torch.bool)
    hiding, biased = mask.clone(), torch.zeros(mask.shape)
    hiding[0, :, :, 100] = False
    biased[1, :, :, 5] = -1.0
    for given in (hiding, biased):
        handle, _ = copy.deepcopy(layer).update(k, k)
        with pytest.raises(ValueError, match="attention_mask must show all tokens that came before"):
            handle.kv_view.attend(AttentionCall(q, given, 0.2))
    handle, _ = layer.update(k, k)
    handle.kv_view.attend(AttentionCall(q, mask, 0.2))
