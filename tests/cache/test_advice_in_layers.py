"""The default cache: columns of keys and weights of their errors follow from what the model's queries look at."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.cache.layer import LogQuantLayer
from logquant.cache.sizes import head_nbytes, window_capacity
from logquant.compat import as_argument
from logquant.format import PageFormat
from logquant.ops import reference
from logquant.quantizer import columns, feedback
from logquant.quantizer.queries import MAP_QUERIES, QUERIES, RecentQueries
from logquant.rule import Rule, evicted_slots, split_positions
from tests.helpers.layers import feed, random_tokens, row_contents
from tests.helpers.masks import causal_mask, pad_mask
from tests.helpers.models import tiny_model

PROMPT, STEPS = 300, 130


def layer_and_tokens(batch: int = 1, rule: Rule = "log", **options) -> tuple[LogQuantLayer, Tensor, Tensor, Tensor]:
    """An empty layer, keys and values of 2 heads, and queries of 4."""
    k, v = random_tokens(PROMPT + STEPS, batch=batch)
    k = k * torch.linspace(-3, 3, 64).exp2()
    random = torch.Generator().manual_seed(1)
    q = torch.randn(batch, 4, PROMPT + STEPS, 64, generator=random) * torch.linspace(1, -2, 64).exp2()
    return LogQuantLayer(LogQuantConfig(rule=rule, **options)), q, k, v


def attend(layer: LogQuantLayer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    keys, _ = layer.update(k, v)
    out = keys.kv_view.attend(AttentionCall(q, mask, 0.125, causal=mask is None))
    layer.commit()
    return out


def map_of(layer: LogQuantLayer, q: Tensor, k: Tensor, leaving: Tensor) -> Tensor:
    """The column map that the last of ``q`` choose, ``k`` being the exact keys."""
    newest = RecentQueries.of(q[:, :, -MAP_QUERIES:], None, 0.125, 0.0)
    return columns.allocate(feedback.Attention(newest, k, leaving[None]).key_scores(64), layer.format)


def options_of(layer: LogQuantLayer, q: Tensor, k: Tensor, leaving: Tensor) -> dict[str, Tensor]:
    """What the quantiser is told when the last of ``q`` are the newest queries and ``k`` the exact keys."""
    newest = RecentQueries.of(q[:, :, -QUERIES:], None, 0.125, 0.0)
    part = feedback.Attention(newest, k, leaving[None])[:]
    return {"key_weights": feedback.key_weights(part.mean(2), 64), "value_feedback": feedback.value_feedback(part, 64)}


def test_the_newest_queries_choose_columns_weights_and_feedback():
    layer, q, k, v = layer_and_tokens()
    attend(layer, q[:, :, :PROMPT], k[:, :, :PROMPT], v[:, :, :PROMPT])
    fmt, config = layer.format, layer.config
    packed, exact = split_positions(PROMPT, config.window, config.rule, config.sinks)
    key_map = map_of(layer, q[:, :, :PROMPT], k[:, :, :PROMPT], packed)
    assert torch.equal(layer.held.advice.key_map, key_map)
    options = options_of(layer, q[:, :, :PROMPT], k[:, :, :PROMPT], packed)
    want = reference.quantize(k, v, fmt, index=packed[None], key_map=key_map, **options)
    assert torch.equal(row_contents(layer, 0)[0], want[0])

    # One token at a time: the map stays; queries, the newest of them, are those before and at the eviction.
    for t in range(PROMPT, PROMPT + STEPS):
        before = layer.rows
        attend(layer, q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        if layer.rows.packed == before.packed:
            continue
        exact = before.slots[0].positions()[before.packed :]
        slots = torch.cat([exact, exact.new_tensor([t])]).long()
        leaving = torch.arange(len(slots), dtype=torch.int32)[evicted_slots(config.rule, config.window, config.sinks)]
        options = options_of(layer, q[:, :, : t + 1], k[:, :, slots], leaving)
        added = reference.quantize(k[:, :, slots], v[:, :, slots], fmt, index=leaving[None], key_map=key_map, **options)
        want = torch.cat([want, added], 2)
    assert want.shape[2] == layer.rows.packed // 64 > len(packed) // 64
    assert torch.equal(row_contents(layer, 0)[0], want[0])
    assert torch.equal(layer.held.advice.key_map, key_map)


def test_queries_of_what_is_taken_back_say_nothing():
    """However many drafts were tried and dropped in between, pages are those of the tokens that stayed."""
    straight, q, k, v = layer_and_tokens()
    for layer, drafts in ((straight, 0), (drafted := LogQuantLayer(straight.config), 5)):
        attend(layer, q[:, :, :PROMPT], k[:, :, :PROMPT], v[:, :, :PROMPT])
        if drafts:
            layer.activate_past_recording()
        for t in range(PROMPT, PROMPT + STEPS):
            if drafts:
                part = slice(t - drafts, t)
                attend(layer, -q[:, :, part], -k[:, :, part], -v[:, :, part])
                layer.crop(-drafts)
            attend(layer, q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
            layer.crop(0)
    assert straight.rows.packed == drafted.rows.packed > 128
    for got, want in zip(row_contents(drafted, 0), row_contents(straight, 0), strict=True):
        assert torch.equal(got, want)


def test_without_queries_every_channel_and_token_counts_alike():
    layer, _, k, v = layer_and_tokens()
    layer.update(k, v)
    config = layer.config
    packed, _ = split_positions(PROMPT + STEPS, config.window, config.rule, config.sinks)
    want_map = columns.allocate(columns.variances(k, 128), layer.format)
    want = reference.quantize(k, v, layer.format, index=packed[None], key_map=want_map)
    assert torch.equal(row_contents(layer, 0)[0], want[0]) and torch.equal(layer.held.advice.key_map, want_map)


def test_short_prompts_are_remembered_until_columns_are_chosen():
    layer, q, k, v = layer_and_tokens()
    portions = [100, 60, *[1] * 60]
    for first, last in zip(
        torch.tensor([0, *portions]).cumsum(0).tolist(), torch.tensor(portions).cumsum(0).tolist(), strict=False
    ):
        assert layer.rows.packed == 0 if layer.is_initialized else first == 0
        attend(layer, q[:, :, first:last], k[:, :, first:last], v[:, :, first:last])
        if layer.rows.packed:
            break
    tokens = layer.get_seq_length()
    assert tokens == window_capacity(layer.config)
    leaving = torch.arange(tokens, dtype=torch.int32)[
        evicted_slots(layer.config.rule, layer.config.window, layer.config.sinks)
    ]
    assert torch.equal(layer.held.advice.key_map, map_of(layer, q[:, :, :tokens], k[:, :, :tokens], leaving))
    assert layer.nbytes == 2 * head_nbytes(layer.config, tokens, 64, itemsize=4, decoding=True, query_heads=2), (
        "no more queries are kept than are needed from now on"
    )


def test_every_row_has_its_own_columns_and_takes_them_along():
    layer, q, k, v = layer_and_tokens(batch=3)
    q[1] = q[1].flip(-1)
    mask = pad_mask([PROMPT, 220, 100], "left")
    part = slice(0, PROMPT)
    attend(layer, q[:, :, part], k[:, :, part], v[:, :, part], causal_mask(mask, PROMPT))
    rows = []
    for row, length in enumerate([PROMPT, 220]):
        alone, own = LogQuantLayer(layer.config), slice(PROMPT - length, PROMPT)
        attend(alone, *(x[row : row + 1, :, own] for x in (q, k, v)))
        assert torch.equal(layer.held.advice.key_map[row], alone.held.advice.key_map[0])
        assert all(torch.equal(a, b) for a, b in zip(row_contents(layer, row), row_contents(alone, 0), strict=True))
        rows.append(alone)
    assert not torch.equal(layer.held.advice.key_map[0], layer.held.advice.key_map[1])
    assert layer.rows.slots[2].packed == 0
    twin = copy.deepcopy(layer)
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(layer.held.advice.key_map, torch.stack([twin.held.advice.key_map[i] for i in (1, 1, 0)]))
    assert torch.equal(layer.dense()[0][2], twin.dense()[0][0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 4},
        {"key_columns": 1.5, "rule": "recent"},
        {"param_bits": 16},
        {"key_columns": 1.0, "allocate_bits": True},
        {"key_columns": 1.0, "allocate_bits": True, "param_bits": 16, "rule": "log"},
    ],
    ids=str,
)
def test_implementations_agree_and_files_keep_the_columns(tmp_path, options):
    model = tiny_model(head_dim=64)
    ids = torch.randint(0, 256, (1, 330), generator=torch.Generator().manual_seed(0))
    caches = []
    for implementation in ("logquant", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = LogQuantCache(model.config, **options)
        with torch.no_grad():
            model(ids[:, :300], **as_argument(cache))
            logits = [model(ids[:, t : t + 1], **as_argument(cache)).logits for t in range(300, 330)]
        caches.append((cache, torch.cat(logits, 1)))
    (cache, got), (other, want) = caches
    assert (got - want).abs().max() < 3e-3 * want.abs().max()
    for layer, twin in zip(cache.layers, other.layers, strict=True):
        assert layer.config.has_map(layer.format) == (layer.held.advice.key_map is not None)
        assert layer.held.advice.key_map is None or torch.equal(layer.held.advice.key_map, twin.held.advice.key_map)
    cache.save(tmp_path / "cache", model)
    loaded = LogQuantCache.load(tmp_path / "cache", model)
    for layer, twin in zip(cache.layers, loaded.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.dense(), twin.dense(), strict=True))


def test_the_default_loses_far_less_than_the_paper():
    """Attention of the newest queries over what each cache holds, against exact attention."""
    errors = {}
    for name, options in {"default": {}, "paper": vars(LogQuantConfig.paper())}.items():
        layer, q, k, v = layer_and_tokens(**options)
        exact = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, scale=0.125, enable_gqa=True)
        attend(layer, q[:, :, :-1], k[:, :, :-1], v[:, :, :-1])
        out = attend(layer, q[:, :, -1:], k[:, :, -1:], v[:, :, -1:])
        errors[name] = (out - exact).square().mean().item()
    assert errors["default"] < 0.5 * errors["paper"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_columns": 0}, "key_columns must be a number above 0, up to 4"),
        ({"key_columns": 4.5}, "key_columns must be a number above 0, up to 4 .* got 4.5"),
        ({"key_columns": 2, "key_bits": 8}, "key_columns must be a number above 0, up to 1"),
        ({"key_columns": "1"}, "key_columns must be a number"),
        ({"allocate_bits": 1}, "allocate_bits must be True or False, got 1"),
        ({"param_bits": 12}, "param_bits must be 8 or 16, got 12"),
        ({"fine_values": 8, "rule": "log"}, "fine_values must be 0, or 4 or 8 with rule 'attention', page_tokens 64"),
        ({"fine_values": 2}, "fine_values must be 0, or 4 or 8 .* got 2"),
        ({"fine_values": 8, "bits": 4}, "fine_values must be 0, or 4 or 8 .* value_bits 2"),
        ({"sinks": None}, "sinks must be a whole number"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        LogQuantConfig(**options)


def test_the_paper_is_one_option_away():
    paper = LogQuantConfig.paper()
    assert paper.page_format(128) == PageFormat(128)
    assert (paper.sinks, paper.rule) == (0, "log")
    assert LogQuantConfig.paper(bits=4, rule="recent", sinks=4).page_format(64).bits_per_element == 4.5
    assert LogQuantConfig().page_format(128).bits_per_element <= 2.5
    assert LogQuantConfig.small().page_format(128).bits_per_element <= 2.25


def test_a_layer_of_short_text_feeds_like_any_other():
    layer, _, k, v = layer_and_tokens()
    feed(layer, k, v, [1] * 250)
    assert layer.rows.packed == 64 and layer.format.needs_map
