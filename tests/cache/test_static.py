"""A cache of fixed size (``max_length``): its steps leave what those of a cache that grows leave."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.attention.steps import NewToken
from logquant.cache.static import StaticLayer
from logquant.compat import as_argument
from logquant.rule import RULES
from tests.helpers.masks import pad_mask
from tests.helpers.models import family_config, tiny_model

MAX_LENGTH = 512
FIRST_EVICTION = 305
"""The first token after the padded prompt below that finds another page."""


@pytest.fixture(scope="module")
def model():
    made = tiny_model()
    made.set_attn_implementation("logquant")
    return made


def feed(model, cache, ids: Tensor, mask: Tensor | None, cuts: list[int]) -> Tensor:
    """Logits of every token, fed in pieces that end at ``cuts``."""
    out, start = [], int(cache.get_seq_length())
    for end in cuts:
        seen = None if mask is None else mask[:, :end]
        with torch.no_grad():
            out.append(model(ids[:, start:end], attention_mask=seen, **as_argument(cache)).logits)
        start = end
    return torch.cat(out, 1)


def near(got: Tensor, want: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether they differ by less than so much of the largest number."""
    return bool((got - want).abs().max() < tolerance * want.abs().max())


def same_tokens(a: LogQuantCache, b: LogQuantCache) -> None:
    a.commit()
    b.commit()
    for one, other in zip(a.layers, b.layers, strict=True):
        assert one.rows.packed_counts == other.rows.packed_counts
        positions = [x.held.layout.positions(torch.device("cpu")).expand(2, -1) for x in (one, other)]
        assert torch.equal(*positions)


def equal_words(a: LogQuantCache, b: LogQuantCache) -> float:
    """The share of the words of pages, codes and scales, that are the same in both."""
    same, words = 0, 0
    for one, other in zip(a.layers, b.layers, strict=True):
        pages = [
            [x.held.storage.pages[row, :, : slots.packed // 64] for row, slots in enumerate(x.rows.each(2))]
            for x in (one, other)
        ]
        for p, q in zip(*pages, strict=True):
            same, words = same + int((p == q).sum()), words + p.numel()
    return same / words


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_are_those_of_a_cache_that_grows(model, ids, rule, bits, padded):
    """From a prompt that overflows the window, and through two evictions."""
    mask = torch.cat([pad_mask([260, 215], "left"), torch.ones(2, 240, dtype=torch.long)], 1) if padded else None
    cuts = [260, *range(261, 421)]
    fixed, grows = (
        LogQuantCache(model.config, rule=rule, bits=bits, max_length=MAX_LENGTH),
        LogQuantCache(model.config, rule=rule, bits=bits),
    )
    got, want = (feed(model, cache, ids, mask, cuts) for cache in (fixed, grows))
    seen = torch.ones(2, 420, dtype=torch.bool) if mask is None else mask[:, :420].bool()
    until = seen & (torch.arange(420) < FIRST_EVICTION)
    assert near(got[until], want[until])
    # The caches add in another order, so that a number between two codes may become the other one.
    assert near(got[seen], want[seen], 1e-3 if bits == 8 else 0.1)
    assert fixed.get_seq_length() == grows.get_seq_length() == 420
    same_tokens(fixed, grows)
    assert equal_words(fixed, grows) > 0.999
    assert fixed.layers[0].steps.lengths.tolist() == [
        [slots.packed // 64, slots.exact] for slots in fixed.layers[0].rows.each(2)
    ]


@pytest.mark.parametrize("rule", RULES)
def test_a_short_prompt_grows_into_its_first_pages(ids, rule):
    """Its bits are allocated by the newest 64 queries, all of which came one by one."""
    model = tiny_model(head_dim=64)
    model.set_attn_implementation("logquant")
    fixed, grows = LogQuantCache(model.config, rule=rule, max_length=MAX_LENGTH), LogQuantCache(model.config, rule=rule)
    got, want = (feed(model, cache, ids, None, [1, *range(2, 230)]) for cache in (fixed, grows))
    assert near(got, want)
    same_tokens(fixed, grows)
    assert torch.equal(fixed.layers[1].held.advice.key_map, grows.layers[1].held.advice.key_map)


def test_chunks_crops_copies_and_files_between_steps(model, ids, tmp_path):
    fixed, grows = LogQuantCache(model.config, bits=8, max_length=MAX_LENGTH), LogQuantCache(model.config, bits=8)
    both = fixed, grows
    for cuts in ([200, *range(201, 231)], [250, *range(251, 259)]):
        got, want = (feed(model, cache, ids, None, cuts) for cache in both)
        assert near(got, want)
    for cache in both:
        cache.commit()  # the last token's own weights count, then, as those of a step do
        cache.crop(-28)
    got, want = (feed(model, cache, ids, None, list(range(231, 240))) for cache in both)
    assert near(got, want)

    twin, again = copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))
    fixed.save(tmp_path / "cache")
    loaded = LogQuantCache.load(tmp_path / "cache", model, max_length=MAX_LENGTH)
    grown = LogQuantCache.load(tmp_path / "cache", model)
    grows.save(tmp_path / "other")
    from_other = LogQuantCache.load(tmp_path / "other", model, max_length=300)
    cuts = list(range(240, 300))
    want = feed(model, grows, ids, None, cuts)
    before = [x.clone() for x in twin.layers[0].dense()]
    for cache in (fixed, again, loaded, grown, from_other):
        got = feed(model, cache, ids, None, cuts)
        assert near(got, want)
    assert all(torch.equal(a, b) for a, b in zip(before, twin.layers[0].dense(), strict=True)), "a copy is a copy"
    got = feed(model, twin, ids, None, cuts)
    assert near(got, want)


def test_rows_are_repeated_and_selected_between_steps(model, ids):
    fixed, grows = LogQuantCache(model.config, bits=8, max_length=MAX_LENGTH), LogQuantCache(model.config, bits=8)
    for cache in (fixed, grows):
        feed(model, cache, ids, None, [240, *range(241, 250)])
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
    rows = ids[[1, 0, 1, 0]]
    got, want = (feed(model, cache, rows, None, list(range(250, 300))) for cache in (fixed, grows))
    assert near(got, want)


def test_generate_gives_the_same_tokens(model, ids):
    mask = pad_mask([200, 120], "left")
    options = dict(attention_mask=mask, max_new_tokens=90, do_sample=False, pad_token_id=0)
    for more in ({}, {"num_beams": 2}):
        got, want = (
            model.generate(
                ids[:, :200], **as_argument(LogQuantCache(model.config, bits=8, max_length=n)), **options, **more
            )
            for n in (300, None)
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_other_attention_takes_steps_too(ids, implementation, padded):
    """With "sdpa" as with "logquant"; with "eager" over dequantised tensors of all positions."""
    other = tiny_model()
    other.set_attn_implementation(implementation)
    mask = torch.cat([pad_mask([200, 150], "left"), torch.ones(2, 240, dtype=torch.long)], 1) if padded else None
    fixed, grows = (LogQuantCache(other.config, LogQuantConfig.paper(), max_length=n) for n in (400, None))
    for cache in (fixed, grows):
        cache.set_padding(mask)
    got, want = (feed(other, cache, ids, mask, [200, *range(201, 301)]) for cache in (fixed, grows))
    real = slice(None) if mask is None else mask[:, :300].bool()
    assert near(got[real], want[real])
    assert not fixed.layers[0].pending or fixed.layers[0].taken > 0


def test_steps_with_gradients_go_the_way_of_a_cache_that_grows(model, ids):
    fixed, grows = (LogQuantCache(model.config, bits=8, max_length=n) for n in (400, None))
    for implementation in ("logquant", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        start = int(fixed.get_seq_length())
        for cache in (fixed, grows):
            feed(
                model,
                cache,
                ids,
                None,
                [start + 200 if start == 0 else start + 1, start + 202 if start == 0 else start + 2],
            )
        at = int(fixed.get_seq_length())
        got, want = (model(ids[:, at : at + 1], **as_argument(cache)).logits for cache in (fixed, grows))
        assert got.requires_grad
        assert near(got, want)
        for cache in (fixed, grows):
            cache.crop(-1)
    model.set_attn_implementation("logquant")


@pytest.mark.parametrize("then", ["step", "generate"])
def test_cropped_to_nothing_it_begins_anew(model, ids, then):
    fixed, grows = (LogQuantCache(model.config, bits=8, max_length=n) for n in (400, None))
    outs = []
    for cache in (fixed, grows):
        feed(model, cache, ids, None, [210, 211])
        cache.crop(-211)
        assert cache.get_seq_length() == 0
        if then == "step":
            outs.append(feed(model, cache, ids[:, 5:], None, [1, 2, 3, 100, 101]))
        else:
            options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
            outs.append(model.generate(ids[:, 7:190], **as_argument(cache), **options).float())
    assert near(*outs)


@pytest.mark.parametrize("make", [LogQuantConfig.paper, LogQuantConfig.small, LogQuantConfig.fine])
def test_presets(ids, make):
    model = tiny_model(head_dim=64)
    model.set_attn_implementation("logquant")
    fixed, grows = (LogQuantCache(model.config, make(), max_length=n) for n in (400, None))
    got, want = (feed(model, cache, ids, None, [200, *range(201, 300)]) for cache in (fixed, grows))
    assert near(got, want)


def test_queries_that_became_unknown_are_heard_again(model, ids):
    fixed, grows = (LogQuantCache(model.config, max_length=n) for n in (400, None))
    for cache in (fixed, grows):
        feed(model, cache, ids, None, [250, 251])
        cache.commit()
        cache.crop(-60)
    fixed, grows = copy.deepcopy(fixed), copy.deepcopy(grows)
    got, want = (feed(model, cache, ids, None, list(range(192, 300))) for cache in (fixed, grows))
    assert near(got, want)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3", "deepseek_v3", "phi3"])
def test_families_with_other_layers_softcaps_and_sinks(ids, family):
    """Sliding layers are of fixed size, too."""
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(family_config(family)).eval()
    other.set_attn_implementation("logquant")
    fixed, grows = LogQuantCache(other.config, bits=8, max_length=300), LogQuantCache(other.config, bits=8)
    assert fixed.is_compileable and not grows.is_compileable
    got, want = (feed(other, cache, ids, None, [200, *range(201, 290)]) for cache in (fixed, grows))
    # An expert may be chosen otherwise where two are as good.
    assert (got - want).abs().flatten(0, 1).amax(-1).median() < 1e-3 * want.abs().max()


# --------------------------------------------------------------------------------------------------------------- limits
def test_a_full_cache_says_so_and_keeps_its_tokens_until_it_is_resized(model, ids):
    cache, grows = LogQuantCache(model.config, bits=8, max_length=250), LogQuantCache(model.config, bits=8)
    feed(model, cache, ids, None, [200, *range(201, 251)])
    for more in (251, 260):
        with pytest.raises(ValueError, match=r"max_length .* 250 positions"):
            feed(model, cache, ids, None, [more])
    assert cache.get_seq_length() == 250
    with pytest.raises(ValueError, match="at least the 250 positions"):
        cache.resize(249)
    cache.resize(400)
    got = feed(model, cache, ids, None, list(range(251, 330)))
    want = feed(model, grows, ids, None, [200, *range(201, 330)])[:, 250:]
    assert near(got, want)
    with pytest.raises(ValueError, match="with a max_length"):
        grows.resize(1000)


@pytest.mark.parametrize("masked", [False, True], ids=["asks for the mask", "has its own mask"])
def test_the_host_looks_once_in_a_window_of_steps(model, ids, masked, monkeypatch):
    """A step that is announced by the mask it asks for is one step, not two; one that has its own is one, too."""
    cache, looks = LogQuantCache(model.config, max_length=MAX_LENGTH), []
    settle = StaticLayer.make_room
    monkeypatch.setattr(StaticLayer, "make_room", lambda layer: looks.append(layer) or settle(layer))
    feed(model, cache, ids, None, [200])
    for end in range(201, 201 + 2 * 64):
        new = torch.zeros(len(ids), 1, 1, end) if masked else None
        with torch.no_grad():
            model(ids[:, end - 1 : end], attention_mask=new, **as_argument(cache))
    assert looks.count(cache.layers[0]) <= 6


@pytest.mark.parametrize(
    "options",
    [
        {"recall": "both(pages=0.25)"},
        {"prune": "keydiff(keep=0.5)"},
        {"evict": "corm(window=256)", "rule": "recent", "window": 128},
    ],
)
def test_what_does_not_go_with_it_is_refused(model, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} does not go with max_length"):
        LogQuantCache(model.config, **options, max_length=100)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        LogQuantCache(model.config, max_length=0)


def test_a_step_without_room_changes_nothing(model, ids):
    """As in a compiled loop that never calls ``make_room``."""
    cache = LogQuantCache(model.config, max_length=MAX_LENGTH)
    feed(model, cache, ids, None, [300])
    layer = cache.layers[0]
    batch, heads, _, dim = layer.held.storage.window_k.shape
    new, query = torch.ones(batch, heads, 1, dim), torch.ones(batch, 4, 1, dim)

    def step() -> None:
        token, _ = layer.step(new, new)
        assert isinstance(token.kv_view, NewToken)
        token.kv_view.attend(AttentionCall(query, None, 1.0))

    room = 3 * 64 + 4 - layer.rows.exact
    for _ in range(room):
        step()
    with pytest.raises(RuntimeError, match="make_room"):
        step()
    assert layer.length == 300 + room
    assert layer.make_room() == 64
    step()


def test_a_forward_pass_that_ended_early_is_noticed_and_taken_back(model, ids):
    """Under the rule attention what the token gave to others would go on to count."""
    cache, grows = (LogQuantCache(model.config, bits=8, rule="log", max_length=n) for n in (MAX_LENGTH, None))
    for each in (cache, grows):
        feed(model, each, ids, None, [300, 301])
    before = cache.get_seq_length()
    new = torch.ones(2, 2, 1, 32)
    with torch.no_grad():
        token, _ = cache.update(new, new, 0)
    token.kv_view.attend(AttentionCall(torch.ones(2, 4, 1, 32), None, 1.0))
    assert before == 301, "a number, not what becomes of it"
    with pytest.raises(RuntimeError, match="rewind"):
        feed(model, cache, ids, None, [303])
    assert cache.rewind() == 301
    got, want = (feed(model, each, ids, None, list(range(302, 330))) for each in (cache, grows))
    assert near(got, want)


@pytest.mark.parametrize("look", [lambda c: c.nbytes, lambda c: c.commit(), copy.deepcopy, lambda c: c.report()])
def test_whoever_looks_leaves_the_next_step_as_it_was(model, ids, look):
    cache, grows = LogQuantCache(model.config, bits=8, max_length=MAX_LENGTH), LogQuantCache(model.config, bits=8)
    feed(model, cache, ids, None, [300])
    feed(model, grows, ids, None, [300])
    for end in range(301, 400):
        got, want = (feed(model, each, ids, None, [end]) for each in (cache, grows))
        assert near(got, want)
        look(cache)


def test_a_layer_that_shares_the_keys_of_another_attends_to_the_token_once_more(model, ids):
    cache = LogQuantCache(model.config, max_length=MAX_LENGTH)
    feed(model, cache, ids, None, [300])
    layer = cache.layers[0]
    batch, heads, _, dim = layer.held.storage.window_k.shape
    call = AttentionCall(torch.randn(batch, 4, 1, dim), None, 0.2)
    token, _ = layer.step(torch.randn(batch, heads, 1, dim), torch.randn(batch, heads, 1, dim))
    first, second = token.kv_view.attend(call), token.kv_view.attend(call)
    assert torch.equal(first, second) and layer.length == 301


# ---------------------------------------------------------------------------------------------------------------- bytes
def bytes_of(config: LogQuantConfig, batch: int, length: int, **shape: Any) -> int:
    """Pages and window for ``length`` positions, and what steps go by, of a layer."""
    heads, group, dim = shape["heads"], shape["group"], shape["dim"]
    fmt = config.page_format(dim)
    slots, pages = config.sinks + 3 * config.window, (length - config.sinks) // config.window - 2
    window = heads * slots * 2 * dim * 4
    positions, counted = 4 * (pages * 64 + slots), 4 * heads * slots
    queries = 4 * heads * group * dim * 4
    return batch * (heads * pages * fmt.nbytes + window + positions + counted + queries + 8 + 8)


def test_bytes_are_those_of_max_length(model, ids):
    config = LogQuantConfig()
    cache = LogQuantCache(model.config, config, max_length=MAX_LENGTH)
    feed(model, cache, ids, None, [300, 301])
    layer = cache.layers[0]
    own = layer.held.chosen.nbytes + layer.held.advice.nbytes
    assert layer.nbytes - own == bytes_of(config, 2, MAX_LENGTH, heads=2, group=2, dim=32)
