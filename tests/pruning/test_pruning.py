"""Pruning within caches and models: what stays of a prompt is what the papers' rules keep, and all counts with it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import logquant
from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.attention.view import KVView
from logquant.cache import commit
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from logquant.methods.registry import parse_cache
from logquant.ops import reference
from logquant.plan import sequence_nbytes
from logquant.pruning.prompt import choose
from logquant.rule import split_positions
from tests.helpers.layers import PLAIN
from tests.helpers.masks import pad_mask
from tests.helpers.models import generate, logits_of, tiny_model
from tests.helpers.padded import PaddedBatch
from tests.helpers.prompts import Prompt, record_prompts
from tests.helpers.pruning import SCORES, are_best, with_budget
from tests.helpers.recall import attention
from tests.helpers.refused import check_dense_attention, check_masks

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 700
# Of 700 tokens, 512 leave the window; 350 and 200 that stay are 188 exact ones and 3 or 1 of 8 pages.
LEFT, EXACT = 512, 188


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 255, (2, TOKENS + 100), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompts(monkeypatch) -> list[Prompt]:
    return record_prompts(monkeypatch)


@pytest.fixture
def kept(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Of every choice the tokens that left the window ``[1 or B, N]``, and those of them that stay ``[B, H, n]``."""
    seen: list[tuple[Tensor, Tensor]] = []

    def chosen(pruner, prompt, leaving: Tensor, count: int) -> Tensor:
        best = choose(pruner, prompt, leaving, count)
        every = leaving.long()[:, None].expand(*best.shape[:2], -1)
        seen.append((leaving.long().expand(len(best), -1), every.gather(2, best)))
        return best

    monkeypatch.setattr(commit, "choose", chosen)
    return seen


# ------------------------------------------------------------------------------------------------------- what stays
@pytest.mark.parametrize("rule", ["recent", "log", "attention"])
@pytest.mark.parametrize("pruner", SCORES)
def test_every_layer_and_head_keeps_what_the_rule_keeps(prompts, kept, ids, pruner, rule):
    model = tiny_model(num_hidden_layers=3, num_attention_heads=8)
    cache = LogQuantCache(model.config, rule=rule, prune=with_budget(pruner, "keep=0.5"))
    logits_of(model, cache, ids, [TOKENS], "logquant")
    assert len(prompts) == len(kept) == 3
    for layer, prompt, (leaving, stays) in zip(cache.layers, prompts, kept, strict=True):
        scores = SCORES[pruner](prompt)
        assert stays.shape == (2, 2, 192) and leaving.shape == (2, LEFT)
        exact = layer.held.layout.positions(torch.device("cpu"))[:, layer.rows.packed :].long().expand(2, -1)
        for row in range(2):
            assert sorted(torch.cat([leaving[row], exact[row]]).tolist()) == list(range(TOKENS))
            assert are_best(stays[row], leaving[row], scores[row])


@pytest.mark.slow
@pytest.mark.parametrize("pruner", SCORES)
def test_so_does_a_real_model(smollm2, smollm2_tokenizer, data_dir, prompts, kept, pruner):
    text = (data_dir / "dev/books/frankenstein_84.txt").read_text()[:8000]
    ids = smollm2_tokenizer(text, return_tensors="pt").input_ids[:, :1500]
    cache = LogQuantCache(smollm2.config, rule="recent", prune=with_budget(pruner, "keep=0.25"))
    logits_of(smollm2, cache, ids, [1500], "logquant")
    assert len(prompts) == len(kept) == smollm2.config.num_hidden_layers
    for prompt, (leaving, stays) in zip(prompts, kept, strict=True):
        assert stays.shape == (1, 3, 64 * math.ceil((0.25 * 1500 - 156) / 64)) and leaving.shape == (1, 1344)
        assert are_best(stays[0], leaving[0], SCORES[pruner](prompt)[0])


@pytest.mark.parametrize("rule", ["recent", "log"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pages_are_those_of_the_tokens_that_stay(prompts, kept, ids, bits, rule):
    """In the rule's order; the tokens that decoding evicts come after them, the same in all heads."""
    model = tiny_model()
    cache = LogQuantCache(model.config, **PLAIN | {"rule": rule, "bits": bits, "prune": "snapkv(keep=0.5)"})
    logits_of(model, cache, ids, [TOKENS, *[1] * 80], "logquant")
    cache.commit()
    for layer, prompt, (_, stays) in zip(cache.layers, prompts, kept, strict=True):
        assert layer.rows.packed == 3 * 64 + 2 * 64
        k, v = (x.gather(2, stays[..., None].expand(-1, -1, -1, 32)) for x in (prompt.keys, prompt.values))
        want = reference.quantize(k, v, layer.format)
        assert torch.equal(layer.held.storage.used_pages(layer.rows)[:, :, :3], want)
        order = split_positions(TOKENS, 64, rule)[0]
        for head in stays.flatten(0, 1):
            assert torch.equal(head, order[torch.isin(order, head.int())].long())
        positions = layer.rows.positions(torch.device("cpu"))[0]
        packed, exact = split_positions(TOKENS + 80, 64, rule)
        assert torch.equal(positions, torch.cat([torch.zeros(192, dtype=torch.int32), packed[LEFT:], exact]))


@pytest.mark.parametrize("options", [{}, {"recall": "both(pages=0.5;skip=0)"}, {"channels": "think(ratio=0.5)"}])
@pytest.mark.parametrize("rule", ["recent", "log", "attention"])
def test_attention_is_that_over_what_is_there(monkeypatch, ids, rule, options):
    """One token, several, and more than the fused operator takes, in one call; with recall, those that read all."""
    model, compared, compute = tiny_model(), [], KVView.compute

    def computed(view: KVView, call: AttentionCall) -> Tensor:
        out, queries = compute(view, call), call.query.shape[2]
        if not view.plain and ("recall" not in options or queries > 16):
            want = attention(view, call, torch.ones(2, 2, queries, view.pages.shape[2], dtype=torch.bool))
            assert torch.allclose(out.double(), want, rtol=1e-3, atol=3e-3)
            compared.append(queries)
        return out

    monkeypatch.setattr(KVView, "compute", computed)
    cache = LogQuantCache(model.config, rule=rule, prune="keydiff(keep=0.5)", **options)
    logits_of(model, cache, ids, [TOKENS, 1, 3, 20, 30], "logquant")
    assert compared == ([20, 20, 30, 30] if "recall" in options else [1, 1, 3, 3, 20, 20, 30, 30])


def test_off_and_all_are_bit_for_bit_what_they_were(ids):
    model = tiny_model()
    for rule in ("recent", "attention"):
        outputs = []
        for prune in (None, "snapkv(keep=1)", "keydiff(tokens=700)", "streaming(bytes=1000000)"):
            cache = LogQuantCache(model.config, rule=rule, prune=prune)
            outputs.append(logits_of(model, cache, ids[:, :720], [TOKENS, *[1] * 20], "logquant"))
        assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_a_prompt_that_stays_exact_is_not_pruned_and_neither_is_what_comes_later(ids):
    model, outputs = tiny_model(), []
    for prune in (None, "snapkv(tokens=1)"):
        cache = LogQuantCache(model.config, prune=prune)
        outputs.append(logits_of(model, cache, ids[:, :400], [190, 150, *[1] * 60], "logquant"))
    assert torch.equal(*outputs)


# -------------------------------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize(
    ("budget", "pages"),
    [("keep=0.5", 3), ("keep=0.25", 1), ("keep=0.6", 4), ("tokens=350", 3), ("tokens=1", 1), ("bytes=4000", 3)],
)
@pytest.mark.parametrize("name", ["recent", "logquant", "logquant:bits=4,recall=means(skip=1)", "log:window=32"])
def test_bytes_held_are_those_of_the_plan(ids, budget, pages, name):
    model, prune = tiny_model(), f"keydiff({budget})"
    spec = parse_cache(name).replace(prune=prune)
    plain = parse_cache(name).quantization
    cache = spec.make(model.config)
    logits_of(model, cache, ids[:1], [TOKENS], "logquant")
    assert cache.nbytes == sequence_nbytes(spec, model.config, TOKENS, 4)
    if name == "recent":
        fmt = plain.page_format(32)
        assert cache.layers[0].rows.packed == 64 * pages
        full = sequence_nbytes(parse_cache(name), model.config, TOKENS, 4)
        assert full - cache.nbytes == 2 * 2 * (LEFT // 64 - pages) * fmt.nbytes
        if budget.startswith("bytes"):
            assert pages == 4000 // fmt.nbytes


def test_a_layer_that_does_not_know_its_pages_takes_no_bytes():
    with pytest.raises(ValueError, match="prune must be given keep or tokens where the size of a page is not known"):
        LogQuantLayer(LogQuantConfig(prune="keydiff(bytes=4000)"))


def test_bytes_are_refused_where_pages_are_not_those_of_the_configuration():
    layer = LogQuantCache(tiny_model().config, prune="keydiff(bytes=4000)").layers[0]
    with pytest.raises(ValueError, match="where a layer's pages have 1408 bytes, not the 1152 that follow"):
        layer.update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 48))
    assert not layer.is_initialized


# -------------------------------------------------------------------------------------------------- rows and masks
@pytest.mark.parametrize("rule", ["recent", "attention"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pruner", SCORES)
def test_a_padded_row_keeps_what_it_keeps_alone(pruner, side, rule):
    config = LogQuantConfig(rule=rule, prune=with_budget(pruner, "keep=0.5"))
    PaddedBatch(side, [1, 1, 3, 20, *[1] * 60]).check(lambda: LogQuantLayer(config))


def test_a_mask_that_hides_tokens_is_refused(ids):
    model = tiny_model()
    cache = LogQuantCache(model.config, prune="keydiff")
    logits_of(model, cache, ids, [TOKENS], "logquant")
    check_masks(cache.layers[0])


@pytest.mark.parametrize("pruner", ["snapkv", "keydiff"])
def test_what_needs_all_tokens_is_refused(ids, pruner):
    model = tiny_model()
    cache = LogQuantCache(model.config, rule="recent", prune=pruner)
    check_dense_attention(model, cache, ids[:, :TOKENS], "tell its queries, and has not")
    assert logits_of(model, cache, ids[:, TOKENS:], [1, 20], "sdpa").isfinite().all()


def test_sdpa_gives_what_logquant_gives(ids):
    model = tiny_model()
    outputs = [
        logits_of(model, LogQuantCache(model.config, prune="snapkv"), ids[:, :740], [TOKENS, *[1] * 20, 20], name)
        for name in ("logquant", "sdpa")
    ]
    assert torch.allclose(*outputs, atol=1e-4)


# ------------------------------------------------------------------------------------------ caches that move and stay
@pytest.mark.parametrize("rule", ["recent", "attention"])
def test_beams_copies_and_files(ids, tmp_path, rule):
    model = tiny_model()
    mask = torch.cat([pad_mask([TOKENS, 500], "left"), torch.ones(2, 100, dtype=torch.long)], 1)
    cache = LogQuantCache(model.config, rule=rule, prune="snapkv(keep=0.5)", recall="both(pages=0.5;skip=0)")
    logits_of(model, cache, ids, [TOKENS], "logquant", mask)
    cache.save(tmp_path / "cache")
    twin, loaded = copy.deepcopy(cache), LogQuantCache.load(tmp_path / "cache", model)
    assert loaded.quantization == cache.quantization and loaded.layers[0].rows.slots[1].by_head == (320, 128)
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    model.set_attn_implementation("logquant")

    def go_on(cache: LogQuantCache, later: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [
                    model(later[:, i : i + 1], attention_mask=mask[:, : TOKENS + i + 1], **as_argument(cache)).logits
                    for i in range(80)
                ],
                1,
            )

    later = ids[:, TOKENS:]
    want = go_on(cache, later, mask)
    assert torch.equal(want, go_on(twin, later, mask)) and torch.equal(want, go_on(loaded, later, mask))
    assert torch.allclose(want, go_on(swapped, later.flip(0), mask.flip(0)).flip(0), atol=1e-4)


@pytest.mark.parametrize("rule", ["recent", "log", "attention"])
def test_generation_with_drafts_gives_what_greedy_decoding_gives(ids, rule):
    model = tiny_model(num_hidden_layers=3)
    model.set_attn_implementation("logquant")
    prompt = ids[:1, :30].repeat(1, 20)
    outputs = [
        generate(model, prompt, LogQuantCache(model.config, rule=rule, prune="snapkv(keep=0.5)"), **options)
        for options in ({}, {"prompt_lookup_num_tokens": 4})
    ]
    assert torch.equal(*outputs)
    beams = generate(model, prompt, LogQuantCache(model.config, rule=rule, prune="snapkv(keep=0.5)"), num_beams=3)
    assert beams.shape == outputs[0].shape
    # An enabled model says which of the tokens that come with the prompt are drafts: they see it pruned.
    logquant.enable(model, rule=rule, prune="snapkv(keep=0.5)")
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False}
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=4, **options), outputs[0])


@pytest.mark.parametrize("rule", ["recent", "log", "attention"])
def test_crop_takes_back_what_came_after_the_prompt_and_nothing_that_was_dropped(ids, rule):
    model = tiny_model()
    cache = LogQuantCache(model.config, rule=rule, prune="snapkv(keep=0.5)")
    logits_of(model, cache, ids, [TOKENS], "logquant")
    before, twin = copy.deepcopy(cache), copy.deepcopy(cache)
    later = ids[:, TOKENS:]
    logits_of(model, cache, later, [1, 30, *[1] * 40], "logquant")
    with pytest.raises(ValueError, match="crop must not bring back tokens of a prompt of which prune has dropped 320"):
        cache.crop(-71 - 70)
    assert cache.get_seq_length() == TOKENS + 71
    cache.crop(-71)
    assert cache.get_seq_length() == TOKENS and cache.layers[0].rows.packed == 192
    for got, want in zip(cache.layers, before.layers, strict=True):
        pages = [layer.held.storage.used_pages(layer.rows) for layer in (got, want)]
        assert torch.equal(*pages)
    # Within the newest tokens nothing is left of what was taken back.
    logits_of(model, twin, later, [5], "logquant")
    twin.crop(-5)
    outputs = [logits_of(model, c, later, [1, 1], "logquant") for c in (before, twin)]
    assert torch.allclose(*outputs, atol=1e-5)
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0
    again = logits_of(model, cache, ids, [TOKENS, 1], "logquant")
    assert torch.equal(
        again, logits_of(model, LogQuantCache(model.config, cache.quantization), ids, [TOKENS, 1], "logquant")
    )


def test_gradients_do_not_flow_through_what_is_packed_or_dropped(ids):
    model = tiny_model(num_hidden_layers=1)
    model.set_attn_implementation("logquant")
    cache = LogQuantCache(model.config, rule="recent", prune="keydiff")
    model(ids[:, :TOKENS], **as_argument(cache))
    out = model(ids[:, TOKENS : TOKENS + 2], **as_argument(cache)).logits
    with pytest.raises(RuntimeError, match="no gradient flows through quantised tokens"):
        out.sum().backward()
