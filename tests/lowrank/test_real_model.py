"""A real model of low rank: what data are for, and what it writes with which cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from logquant import LogQuantCache
from logquant.lowrank import compress
from tests.helpers.models import generate

pytestmark = pytest.mark.slow


@pytest.fixture
def texts(smollm2_tokenizer, data_dir) -> list[Tensor]:
    names = "wikitext2_raw_test.txt", "humaneval.jsonl", "books/frankenstein_84.txt"
    parts = [(data_dir / "dev" / name).read_text()[:12000] for name in names]
    return [smollm2_tokenizer(part, return_tensors="pt").input_ids[:, :1024] for part in parts]


def divergence(model, small, ids: Tensor) -> float:
    with torch.no_grad():
        want, got = (m(ids).logits.log_softmax(-1) for m in (model, small))
    return (want.exp() * (want - got)).sum(-1).mean().item()


def test_weights_alone_say_little_data_much_and_what_reads_values_more(smollm2, texts):
    *data, text = texts
    text = text[:, :400]
    kls = {
        fit: divergence(smollm2, compress(copy.deepcopy(smollm2), 0.75, 1.0, seen, fit), text)
        for fit, seen in (("weights", None), ("inputs", data), ("outputs", data))
    }
    assert kls["outputs"] < 0.75 * kls["inputs"] and kls["inputs"] < 0.1 * kls["weights"]
    keys = divergence(smollm2, compress(copy.deepcopy(smollm2), 1.0, 0.75, data), text)
    assert keys < 0.5 * kls["outputs"]


@pytest.mark.parametrize(("values", "keys"), [(0.75, 1.0), (0.75, 0.75)])
def test_it_writes_the_same_with_a_full_cache_and_at_8_bits(smollm2, texts, values, keys):
    *data, text = texts
    small = compress(copy.deepcopy(smollm2), values, keys, data)
    prompt = text[:, :500]
    full = generate(small, prompt, DynamicCache(config=small.config))
    packed = generate(small, prompt, LogQuantCache(small.config, bits=8, rule="recent"))
    assert torch.equal(full[:, :520], packed[:, :520])
