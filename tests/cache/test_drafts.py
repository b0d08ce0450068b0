"""Speculative decoding: drafts see, and leave in the cache, what they would if they came one by one. At 2 bits, too."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

import logquant
from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from tests.helpers.backends import on
from tests.helpers.layers import PLAIN, row_contents
from tests.helpers.masks import causal_mask, pad_mask
from tests.helpers.models import tiny_model

TOKENS, HEADS, GROUP, DIM = 480, 1, 2, 64
SETTINGS = [
    pytest.param({"rule": "log"}, id="log"),
    pytest.param({"rule": "attention"}, id="attention"),
    pytest.param({"rule": "log", "recall": "both(pages=0.4;skip=0)"}, id="recall"),
    pytest.param(PLAIN, id="paper"),
]


def attend(layer: LogQuantLayer, start: int, states: tuple[Tensor, ...], padding: Tensor | None) -> Tensor:
    q, k, v = states
    keys, _ = layer.update(k, v)
    mask = None if padding is None else causal_mask(padding[:, : start + k.shape[2]], k.shape[2])
    return keys.kv_view.attend(AttentionCall(q, mask, DIM**-0.5, causal=mask is None))


def assert_same(layer: LogQuantLayer, other: LogQuantLayer) -> None:
    """Bit for bit."""
    layer.commit(), other.commit()
    assert torch.equal(layer.held.layout.positions(layer.device), other.held.layout.positions(layer.device))
    for row in range(layer.batch_size):
        assert all(torch.equal(a, b) for a, b in zip(row_contents(layer, row), row_contents(other, row), strict=True))
    if layer.held.advice.key_map is not None and layer.rows.packed:
        assert torch.equal(layer.held.advice.key_map, other.held.advice.key_map)


@pytest.mark.parametrize(("backend", "bits"), [("reference", 2), ("compiled", 2), ("compiled", 8)])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(("prompt", "longest"), [(40, 8), (260, 8), (260, 100)])
def test_drafts_see_and_leave_what_they_would_one_by_one(backend, bits, settings, padded, prompt, longest):
    """Chunks of any length, of which any number of tokens are taken back, up to several evictions at a time."""
    if "recall" in settings:
        longest = min(longest, 8)  # more than 16 tokens at once read all pages (docs/generate.md)
    choose, noise = random.Random(prompt + longest), torch.Generator().manual_seed(bits)
    shapes = [(2, heads, TOKENS, DIM) for heads in (HEADS * GROUP, HEADS, HEADS)]
    states = [torch.randn(shape, generator=noise) for shape in shapes]
    config = LogQuantConfig(bits=bits, **settings)
    drafted, single = LogQuantLayer(config), LogQuantLayer(config)
    padding = None
    if padded:
        later = torch.ones(2, TOKENS + 2 * longest, dtype=torch.long)
        padding = torch.cat([pad_mask([prompt, prompt - 37], "left"), later], 1)

    def part(start: int, end: int, wrong: int = 0) -> tuple[Tensor, ...]:
        others = [torch.randn(*x.shape[:2], wrong, DIM, generator=noise) for x in states]
        return tuple(torch.cat([x[:, :, start:end], y], 2) for x, y in zip(states, others, strict=True))

    def draft(start: int, end: int) -> Tensor:
        wrong = choose.randint(0, longest)
        out = attend(drafted, start, part(start, end, wrong), padding)
        drafted.crop(-wrong)
        return out[:, :, : end - start]

    with on(backend):
        attend(single, 0, part(0, prompt), padding)
        drafted.activate_past_recording()
        draft(0, prompt)
        assert_same(drafted, single)
        start = prompt
        while start < TOKENS:
            end = min(TOKENS, start + choose.randint(1, longest))
            got = draft(start, end)
            want = torch.cat([attend(single, t, part(t, t + 1), padding) for t in range(start, end)], 2)
            # Beyond 16 queries keys and values are dequantised, which rounds otherwise.
            assert torch.allclose(got, want, atol=1e-3 if longest > 16 else 1e-6)
            single.crop(0)
            assert_same(drafted, single)
            start = end
    assert single.rows.packed >= 5 * config.window


# ------------------------------------------------------------------------------------------------------------ in models
def continued(model, ids: Tensor, count: int, cache: LogQuantCache | None = None, **options) -> Tensor:
    """Tokens of ``generate``, from a cache that the model makes by itself if there is none."""
    given = {} if cache is None else as_argument(cache)
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), **given, **settings | options)[:, ids.shape[1] :]
    assert ids.shape[1] == count
    return ids


# How many layers the assistant has, and how many tokens follow. With two all its drafts are taken, so most of what the
# cache holds was computed for several tokens at a time: the same up to the last bit of a float32, until that makes some
# number another 2-bit code, and a random model other tokens.
SPECULATION = {"prompt_lookup": (0, 400), "assistant": (1, 400), "perfect_assistant": (2, 70)}


@pytest.mark.parametrize("implementation", ["logquant", "sdpa"])
@pytest.mark.parametrize("kind", SPECULATION)
@pytest.mark.parametrize("rule", ["log", "attention"])
def test_speculative_decoding_at_2_bits_gives_what_greedy_decoding_gives(implementation, kind, rule):
    """Over several evictions, and with drafts that come together with the prompt."""
    layers, count = SPECULATION[kind]
    if rule == "attention":  # the last bit also decides which tokens leave: a random model goes its own way sooner
        count = min(count, 100)
    options = {"prompt_lookup_num_tokens": 6}
    if layers:
        options = {"assistant_model": tiny_model(num_hidden_layers=layers), "num_assistant_tokens": 5}
    model = tiny_model()
    logquant.enable(model, rule=rule)
    model.set_attn_implementation(implementation)
    ids = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    assert torch.equal(continued(model, ids, count, **options), continued(model, ids, count))


@pytest.mark.slow
def test_speculative_decoding_of_a_real_model(smollm2, smollm2_tokenizer, data_dir):
    """With prompt lookup, and with the same model as assistant, so that nearly all of its drafts are taken."""
    text = (data_dir / "dev/books/frankenstein_84.txt").read_text()[3000:4200]
    ids = smollm2_tokenizer(f"{text}\n\nAgain, word for word:\n\n{text[:60]}", return_tensors="pt").input_ids
    kinds = [
        {"prompt_lookup_num_tokens": 8},
        {"assistant_model": copy.deepcopy(smollm2), "num_assistant_tokens": 5},
    ]
    plain, *speculative = (LogQuantCache(smollm2.config) for _ in range(1 + len(kinds)))
    logquant.enable(smollm2)
    try:
        want = continued(smollm2, ids, 130, plain)
        for options, cache in zip(kinds, speculative, strict=True):
            assert torch.equal(continued(smollm2, ids, 130, cache, **options), want), options.keys()
    finally:
        logquant.disable(smollm2)
    assert plain.layers[0].rows.packed >= 64 * ((ids.shape[1] + 130 - 4 - 3 * 64) // 64) >= 3 * 64
    assert all(cache.nbytes < 1.1 * plain.nbytes for cache in speculative)
