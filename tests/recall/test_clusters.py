"""``order=clusters``: the pages of a prompt are clusters of its tokens, of each KV head its own."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from logquant import LogQuantCache, LogQuantConfig, ops
from logquant.attention.call import AttentionCall
from logquant.attention.view import KVView
from logquant.cache import commit
from logquant.cache.layer import LogQuantLayer
from logquant.format import fine_tokens
from logquant.methods.registry import parse_cache
from logquant.ops import reference
from logquant.plan import sequence_nbytes
from logquant.recall.clusters import clusters
from logquant.rule import split_positions
from tests.helpers.layers import PLAIN
from tests.helpers.models import family_config, generate, logits_of, tiny_model
from tests.helpers.padded import PaddedBatch
from tests.helpers.recall import attention
from tests.helpers.refused import check_dense_attention, check_masks

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, LEFT = 700, 512
ORDER = "both(pages=0.4;skip=0;order=clusters)"


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 255, (2, TOKENS + 100), generator=torch.Generator().manual_seed(0))


def spread(keys: Tensor, order: Tensor, page_tokens: int) -> Tensor:
    """How far keys are from the mean of their page, ``[B, H]``."""
    pages = keys.gather(2, order[..., None].expand_as(keys)).unflatten(2, (-1, page_tokens))
    return (pages - pages.mean(3, keepdim=True)).square().mean((2, 3, 4))


def clusters_of(keys: Tensor, page_tokens: int) -> Tensor:
    """Of all tokens."""
    return clusters(keys, torch.arange(keys.shape[2]).expand(keys.shape[:3]), page_tokens)


# ------------------------------------------------------------------------------------------------------ which clusters
@given(
    pages=st.integers(0, 13),
    page_tokens=st.sampled_from([32, 64]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    special=st.sampled_from([None, 0.0, torch.inf, torch.nan]),
)
def test_each_token_is_in_one_page_and_a_row_in_those_it_is_in_alone(pages, page_tokens, batch, seed, special):
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, 2, pages * page_tokens, 16, generator=random).bfloat16()
    if special is not None:
        keys[:, :, :: 1 + seed % 40, seed % 16] = special
    order = clusters_of(keys, page_tokens)
    assert torch.equal(order.sort(-1).values, torch.arange(pages * page_tokens).expand_as(order))
    by_page = order.unflatten(2, (pages, page_tokens))
    assert torch.equal(by_page, by_page.sort(-1).values)
    assert torch.equal(torch.cat([clusters_of(row[None], page_tokens) for row in keys]), order)


@pytest.mark.parametrize("wild", [None, 1e20, torch.inf, torch.nan])
@pytest.mark.parametrize("pages", [2, 3, 5, 8, 11])
def test_groups_that_are_there_are_found(pages, wild):
    """Tokens of as many groups as pages, mixed, each head otherwise, among others that are not meant; perhaps with a
    number in them that is out of all proportion."""
    random = torch.Generator().manual_seed(pages)
    middles = 10 * torch.randn(1, 3, pages, 1, 32, generator=random)
    keys = (middles + torch.randn(1, 3, pages, 64, 32, generator=random)).flatten(2, 3)
    mixed = torch.rand(1, 3, pages * 64, generator=random).argsort(-1)
    keys = torch.cat([torch.randn(1, 3, 10, 32, generator=random), keys.gather(2, mixed[..., None].expand_as(keys))], 2)
    if wild is not None:
        keys[:, :, 40, 7] = wild
    order = clusters(keys, torch.arange(10, 10 + pages * 64).expand(1, 3, -1), 64) - 10
    group = mixed.gather(2, order).unflatten(2, (pages, 64)) // 64
    strangers = (group != group.mode(-1, keepdim=True).values).sum((2, 3))
    assert (strangers <= (0 if wild is None else 2 * pages)).all()


def test_pages_of_clusters_are_narrower_than_pages_of_neighbours():
    random = torch.Generator().manual_seed(0)
    steps = torch.randn(1, 2, 64 * 12, 24, generator=random)
    for keys in (steps, steps / 4 + steps[:, :, :128].repeat(1, 1, 6, 1)):  # of any kind, and what comes again
        neighbours = torch.arange(64 * 12).expand(1, 2, -1)
        assert (spread(keys, clusters_of(keys, 64), 64) < 0.95 * spread(keys, neighbours, 64)).all()


def test_a_long_prompt_is_worked_on_head_by_head(monkeypatch):
    keys = torch.randn(2, 4, 64 * 7, 16, generator=torch.Generator().manual_seed(0))
    want = clusters_of(keys, 64)
    monkeypatch.setattr("logquant.recall.clusters._AT_ONCE", 1)
    assert torch.equal(clusters_of(keys, 64), want)


# ---------------------------------------------------------------------------------------------------- what caches hold
@pytest.fixture
def asked(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Of every layer the keys among which clusters were made, and the tokens in their order."""
    seen: list[tuple[Tensor, Tensor]] = []

    def made(keys: Tensor, tokens: Tensor, page_tokens: int) -> Tensor:
        seen.append((keys, clusters(keys, tokens, page_tokens)))
        return seen[-1][1]

    monkeypatch.setattr(commit, "clusters", made)
    return seen


def fed(config: LogQuantConfig, *steps: int) -> tuple[LogQuantLayer, Tensor, Tensor]:
    """A layer after a prompt and so many tokens more, and all keys and values."""
    layer, total = LogQuantLayer(config), sum(steps)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, total, 64, generator=random) for heads in (4, 2, 2))
    first = 0
    for n in steps:
        part = slice(first, first + n)
        handle, _ = layer.update(k[:, :, part], v[:, :, part])
        handle.kv_view.attend(AttentionCall(q[:, :, part], None, 0.2, causal=True))
        first += n
    layer.commit()
    return layer, k, v


@pytest.mark.parametrize("rule", ["recent", "log"])
@pytest.mark.parametrize("bits", [2, 8])
def test_pages_are_those_of_the_clusters(asked, bits, rule):
    """And what leaves later comes after them, in the order of time."""
    config = LogQuantConfig(**PLAIN | {"rule": rule, "bits": bits, "recall": ORDER})
    layer, k, v = fed(config, TOKENS, *[1] * 80)
    ((keys, order),) = asked
    prompt, later = split_positions(TOKENS + 80, 64, rule)[0].long().split([LEFT, 128])
    assert torch.equal(keys, k[:, :, :TOKENS]) and torch.equal(
        order.sort(-1).values, prompt.sort().values.expand_as(order)
    )
    moved = (x.gather(2, order[..., None].expand(-1, -1, -1, 64)) for x in (k, v))
    want = [reference.quantize(*moved, layer.format), reference.quantize(k[:, :, later], v[:, :, later], layer.format)]
    assert torch.equal(layer.held.storage.used_pages(layer.rows), torch.cat(want, 2))
    positions = layer.rows.positions(torch.device("cpu"))[0, : LEFT + 128]
    assert torch.equal(positions, torch.cat([torch.zeros(LEFT, dtype=torch.int32), later.int()]))


@pytest.mark.parametrize("fine_values", [0, 4, 8])
def test_within_a_page_come_first_those_that_count_most(asked, monkeypatch, fine_values):
    """As under the rule ``attention`` in the order of time; those with fine values, where their format has them."""
    counted: list[Tensor] = []
    by_head = commit.importance_by_head

    def weighed(given: Tensor, values: Tensor) -> Tensor:
        counted.append(given.sqrt() * values.norm(dim=-1))
        return by_head(given, values)

    monkeypatch.setattr(commit, "importance_by_head", weighed)
    layer, k, _ = fed(LogQuantConfig(recall=ORDER, key_bits=8, fine_values=fine_values), TOKENS)
    ((_, order),), (weight,) = asked, counted
    fine = fine_tokens(fine_values)
    places = torch.tensor([*fine, *(t for t in range(64) if t not in fine)])
    pages = order.unflatten(2, (-1, 64))
    want = torch.empty_like(pages)
    ranks = weight.gather(2, order).unflatten(2, (-1, 64)).argsort(dim=-1, descending=True, stable=True)
    want[..., places] = pages.gather(3, ranks)
    keys, _ = ops.dequantize(layer.held.storage.used_pages(layer.rows), layer.format, key_map=layer.held.advice.key_map)
    held = k.gather(2, want.flatten(2)[..., None].expand_as(keys))
    assert len(fine) == fine_values and (keys - held).abs().max() < 0.05


@pytest.mark.parametrize("rule", ["recent", "log", "attention"])
@pytest.mark.parametrize("prune", [None, "keydiff(keep=0.5)"])
def test_attention_is_that_over_what_is_there(monkeypatch, ids, rule, prune):
    """Where all pages are read."""
    model, compared, compute = tiny_model(), [], KVView.compute

    def computed(view: KVView, call: AttentionCall) -> Tensor:
        out, queries = compute(view, call), call.query.shape[2]
        if not view.plain:
            want = attention(view, call, torch.ones(2, 2, queries, view.pages.shape[2], dtype=torch.bool))
            assert torch.allclose(out.double(), want, rtol=1e-3, atol=3e-3)
            compared.append(queries)
        return out

    monkeypatch.setattr(KVView, "compute", computed)
    cache = LogQuantCache(model.config, rule=rule, prune=prune, recall="means(pages=1;order=clusters)")
    logits_of(model, cache, ids, [TOKENS, 1, 3, 20, 30], "logquant")
    assert compared == [1, 1, 3, 3, 20, 20, 30, 30]


def test_at_8_bits_all_pages_give_what_they_give_in_the_order_of_time(ids):
    model, outputs = tiny_model(), []
    for order in ("time", "clusters"):
        cache = LogQuantCache(model.config, bits=8, rule="recent", recall=f"both(pages=1;order={order})")
        outputs.append(logits_of(model, cache, ids[:, :720], [TOKENS, *[1] * 20], "logquant")[:, -20:])
    error = (outputs[0] - outputs[1]).abs().max()
    assert 0 < error < 0.05 * outputs[0].abs().max()


@pytest.mark.parametrize("name", ["recent", "logquant:fine_values=8", "log:window=32,bits=4"])
def test_bytes_are_those_of_the_plan_and_of_the_order_of_time(ids, name):
    model = tiny_model()
    held = []
    for order in ("time", "clusters"):
        spec = parse_cache(name).replace(recall=f"both(pages=0.5;order={order})")
        cache = spec.make(model.config)
        logits_of(model, cache, ids[:1], [TOKENS], "logquant")
        assert cache.nbytes == sequence_nbytes(spec, model.config, TOKENS, 4)
        held.append(cache.nbytes)
    assert held[0] == held[1]


# ----------------------------------------------------------------------------------------------- rows, masks and moves
@pytest.mark.parametrize("rule", ["recent", "attention"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_holds_and_reads_what_it_does_alone(side, rule):
    config = LogQuantConfig(rule=rule, recall=ORDER)
    PaddedBatch(side, [1, 1, 3, 20, *[1] * 60]).check(lambda: LogQuantLayer(config))


@pytest.mark.parametrize("rule", ["recent", "attention"])
def test_beams_copies_and_files(ids, tmp_path, rule):
    model = tiny_model()
    cache = LogQuantCache(model.config, rule=rule, recall=ORDER)
    logits_of(model, cache, ids, [TOKENS], "logquant")
    cache.save(tmp_path / "cache")
    twin, loaded = copy.deepcopy(cache), LogQuantCache.load(tmp_path / "cache", model)
    assert loaded.quantization == cache.quantization and loaded.layers[0].rows.slots[0].by_head == (LEFT, LEFT)
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    later = ids[:, TOKENS : TOKENS + 80]
    want, *others = (logits_of(model, c, later, [1] * 80, "logquant") for c in (cache, twin, loaded))
    assert all(torch.equal(want, other) for other in others)
    got = logits_of(model, swapped, later.flip(0), [1] * 80, "logquant")
    assert torch.allclose(want, got.flip(0), atol=1e-4)


@pytest.mark.parametrize("rule", ["recent", "attention"])
def test_drafts_give_what_greedy_decoding_gives(ids, rule):
    model = tiny_model(num_hidden_layers=3)
    model.set_attn_implementation("logquant")
    prompt = ids[:1, :30].repeat(1, 20)
    outputs = [
        generate(model, prompt, LogQuantCache(model.config, rule=rule, recall=ORDER), **options)
        for options in ({}, {"prompt_lookup_num_tokens": 4})
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("rule", ["recent", "log", "attention"])
def test_crop_takes_back_what_came_after_the_prompt_alone(ids, rule):
    model = tiny_model()
    cache = LogQuantCache(model.config, rule=rule, recall=ORDER)
    logits_of(model, cache, ids, [TOKENS], "logquant")
    want = [layer.held.storage.used_pages(layer.rows).clone() for layer in cache.layers]
    logits_of(model, cache, ids[:, TOKENS:], [1, 30, *[1] * 40], "logquant")
    with pytest.raises(ValueError, match="tokens of a prompt of which clusters were made: 512 had left the window"):
        cache.crop(-71 - 70)
    assert cache.get_seq_length() == TOKENS + 71
    cache.crop(-71)
    for layer, pages in zip(cache.layers, want, strict=True):
        assert torch.equal(layer.held.storage.used_pages(layer.rows), pages)
    cache.crop(-TOKENS)
    assert cache.get_seq_length() == 0 and cache.layers[0].rows.complete


def test_what_needs_tokens_in_their_places_is_refused(ids):
    model = tiny_model()
    cache = LogQuantCache(model.config, recall=ORDER)
    message = "order=clusters have each KV head choose among the tokens of a prompt"
    check_dense_attention(model, cache, ids[:, :TOKENS], message)
    check_masks(cache.layers[0])


def test_a_model_that_computes_with_what_the_cache_returns_is_refused(ids):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config("deepseek_v3")).eval()
    cache = LogQuantCache(model.config, recall=ORDER)
    with pytest.raises(RuntimeError, match="in a model that computes nothing itself with what the cache returns"):
        logits_of(model, cache, ids, [TOKENS], "logquant")


def test_a_prompt_that_stays_exact_and_what_comes_later_keep_their_order(ids):
    model, outputs = tiny_model(), []
    for order in ("time", "clusters"):
        cache = LogQuantCache(model.config, recall=f"both(pages=0.5;skip=0;order={order})")
        outputs.append(logits_of(model, cache, ids[:, :400], [190, 150, *[1] * 60], "logquant"))
    assert torch.equal(*outputs) and cache.layers[0].rows.complete


def test_another_order_is_refused():
    message = "cache 'logquant:recall=both(order=size)': order of recall must be time or clusters, got 'size'"
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        parse_cache("logquant:recall=both(order=size)")
