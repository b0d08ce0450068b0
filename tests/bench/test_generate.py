"""Prompts that benchmarks decode after."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from logquant import models
from logquant.bench.generate import bench_generate, prefilled
from logquant.bench.timing import WARMUP
from logquant.compat import as_argument
from logquant.methods.accounting import cache_nbytes
from logquant.methods.registry import parse_cache
from tests.helpers.models import family_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["full", "logquant:window=32", "recent:bits=4", "quanto:bits=4", "hqq", "kivi"])
@torch.inference_mode()
def test_prompts_of_benchmarks_leave_what_every_sequence_would_hold(model_dir, name):
    loaded, _ = models.load(model_dir)
    prompt, spec = torch.arange(200)[None] % loaded.config.vocab_size, parse_cache(name)
    want, exact = spec.make(loaded.config), DynamicCache(config=loaded.config)
    loaded(prompt.expand(3, -1), **as_argument(want))
    loaded(prompt, **as_argument(exact))
    caches = {given: prefilled(spec, loaded, prompt, 3, given) for given in (None, exact)}
    for cache in caches.values():
        assert cache.get_seq_length() == want.get_seq_length() and cache_nbytes(cache) == cache_nbytes(want)
    expected = loaded(prompt[:, :1].expand(3, -1), **as_argument(want)).logits
    for given, cache in caches.items():
        logits = loaded(prompt[:, :1].expand(3, -1), **as_argument(cache)).logits
        if given is exact and spec.quantization is not None:
            # Other queries than the prompt's were asked how to fit it, so only about the same is stored.
            for got, own in ((getattr(cache.layers[-1], x), getattr(exact.layers[-1], x)) for x in ("keys", "values")):
                assert (got[:, :, :200] - own).norm() < 0.5 * own.expand_as(got[:, :, :200]).norm()
        else:
            assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
        assert (logits - logits[:1]).abs().max() < 1e-3 and exact.get_seq_length() == 200


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_both_forms_of_a_full_cache_decode_the_same_tokens_after_the_same_prompt(family):
    """Sliding layers cannot take a token back, so that there each form has a cache of its own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family)).eval()
    first, second = bench_generate(model, [parse_cache("full")], context=60, batch=2, steps=3)
    assert (first.cache, second.cache) == ("full, no mask", "full, masked")
    assert first.held == second.held and len(first.timing.samples) == len(second.timing.samples) == 3
    cache = DynamicCache(config=model.config)
    model(torch.zeros(2, 60 + 3 + WARMUP, dtype=torch.long), **as_argument(cache))
    assert first.held == cache_nbytes(cache)
