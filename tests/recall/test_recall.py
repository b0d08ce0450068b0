"""Recall within caches and models: what is read is what the papers' rules choose, and the rest is as it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from logquant import LogQuantCache, LogQuantConfig, ops
from logquant.attention.call import AttentionCall
from logquant.attention.view import KVView
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from logquant.methods.registry import parse_cache, parse_caches
from logquant.recall import CHOOSERS
from logquant.recall.reading import Reading
from logquant.recall_spec import CHOOSERS as NAMES
from logquant.recall_spec import RecallSpec
from tests.helpers.backends import on
from tests.helpers.masks import pad_mask
from tests.helpers.models import family_config, generate, logits_of, tiny_model
from tests.helpers.padded import PaddedBatch
from tests.helpers.recall import attention, chosen_pages, means_of

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 700


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 255, (2, TOKENS + 100), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch) -> list[tuple[KVView, AttentionCall, Tensor, list[Tensor]]]:
    """Every attention of few queries: the view, the call, its output and the tables of pages that were read."""
    seen: list[tuple[KVView, AttentionCall, Tensor, list[Tensor]]] = []
    tables: list[Tensor] = []
    compute, choose = KVView.compute, Reading.tables

    def computed(view: KVView, call: AttentionCall) -> Tensor:
        tables.clear()
        out = compute(view, call)
        if call.query.shape[2] < 10:
            seen.append((view, call, out, list(tables)))
        return out

    def chosen(self: Reading, *args: object) -> Tensor:
        tables.append(choose(self, *args))
        return tables[-1]

    monkeypatch.setattr(KVView, "compute", computed)
    monkeypatch.setattr(Reading, "tables", chosen)
    return seen


# ---------------------------------------------------------------------------------------------- what is read of pages
@pytest.mark.parametrize("rule", ["log", "attention"])
@pytest.mark.parametrize("chooser", NAMES)
def test_every_layer_and_head_reads_what_the_rule_chooses(calls, ids, chooser, rule):
    model = tiny_model(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
    cache = LogQuantCache(model.config, rule=rule, recall=f"{chooser}(pages=0.4;skip=1)")
    logits_of(model, cache, ids, [TOKENS, 1, 3, 1], "logquant")
    assert len(calls) == 12
    for i, (view, call, out, tables) in enumerate(calls):
        skipped = i % 4 == 0
        assert view.pages.shape[2] == 8 and len(tables) == (not skipped)
        if skipped:
            continue
        want = chosen_pages(RecallSpec(chooser, 0.4), view, call.query, call.scale)
        assert want.sum(-1).unique().tolist() == [3]
        got = torch.zeros_like(want).scatter_(-1, tables[0].long(), True)
        assert torch.equal(got, want)
        assert torch.allclose(out.double(), attention(view, call, want), rtol=1e-3, atol=3e-3)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_sinks_and_softcaps(calls, ids, family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family)).eval()
    cache = LogQuantCache(model.config, recall="bounds(pages=0.4;skip=0)")
    logits_of(model, cache, ids, [TOKENS, 1, 2], "logquant")
    own = [c for c in calls if c[3]]
    assert own
    for view, call, out, _ in own:
        assert (call.sinks is not None) == (family == "gpt_oss") and bool(call.softcap) == (family == "gemma2")
        want = chosen_pages(RecallSpec("bounds", 0.4), view, call.query, call.scale)
        assert torch.allclose(out.double(), attention(view, call, want), rtol=1e-3, atol=3e-3)


def test_means_are_those_of_the_keys_as_they_came(ids):
    layer = LogQuantLayer(LogQuantConfig(rule="attention", recall="means(skip=0)"))
    keys = torch.randn(2, 2, 600, 32, generator=torch.Generator().manual_seed(0)) + 1
    for part in keys.split([500, *[1] * 100], 2):
        handle, _ = layer.update(part, part)
        handle.kv_view.attend(AttentionCall(part, None, 1.0, causal=True))
    layer.commit()
    index, pages = layer.held.storage.index, layer.rows.packed // 64
    assert pages == 7 and index.pages == pages
    at = layer.held.layout.positions(keys.device)[:, : layer.rows.packed].long()
    packed = keys.gather(2, at[:, None, :, None].expand(-1, 2, -1, 32)).unflatten(2, (-1, 64))
    want = packed.mean(3)
    assert ((means_of(index, pages) - want).abs() <= want.abs().amax(-1, keepdim=True) / 253).all()


def test_off_and_all_pages_are_bit_for_bit_what_they_were(ids):
    model, outputs = tiny_model(num_hidden_layers=3), []
    for recall in (None, "both(pages=1)", "both(tokens=1000)", "both(skip=3)"):
        cache = LogQuantCache(model.config, recall=recall)
        outputs.append(logits_of(model, cache, ids[:, :720], [TOKENS, *[1] * 20], "logquant"))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_many_queries_read_all(ids):
    model, outputs = tiny_model(), []
    for recall in (None, "both(skip=0)"):
        cache = LogQuantCache(model.config, recall=recall)
        outputs.append(logits_of(model, cache, ids[:, : TOKENS + 17], [TOKENS, 17], "logquant"))
    assert torch.equal(*outputs)


# -------------------------------------------------------------------------------------------------- rows and masks
@pytest.mark.parametrize("rule", ["log", "attention"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_reads_what_it_reads_alone(side, rule):
    config = LogQuantConfig(rule=rule, recall="both(pages=0.4;skip=0)")
    PaddedBatch(side, [1, 1, 3, *[1] * 60]).check(lambda: LogQuantLayer(config))


def test_a_mask_that_hides_tokens_has_its_row_read_all_pages(calls, ids):
    model = tiny_model()
    cache = LogQuantCache(model.config, recall="bounds(pages=0.4;skip=0)")
    logits_of(model, cache, ids, [TOKENS], "logquant")
    mask = torch.ones(2, 1, 1, TOKENS + 1, dtype=torch.bool)
    mask[0, :, :, 100] = False
    biased = torch.zeros(2, 1, 1, TOKENS + 1)
    biased[1, :, :, 5] = -1.0
    for given, row in ((mask, 0), (biased, 1)):
        layer, calls[:] = copy.deepcopy(cache.layers[0]), []
        q, k = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 1, 32)
        handle, _ = layer.update(k, k)
        view = handle.kv_view
        out = view.attend(AttentionCall(q, given, 0.2))
        view.recall = None
        full = view.compute(AttentionCall(q, given, 0.2))
        assert torch.allclose(out[row], full[row], atol=1e-5)
        assert not torch.allclose(out[1 - row], full[1 - row], atol=1e-4)


# ------------------------------------------------------------------------------------------ caches that move and stay
def test_beams_copies_and_files(ids, tmp_path):
    model = tiny_model(num_hidden_layers=3)
    mask = torch.cat([pad_mask([TOKENS, 500], "left"), torch.ones(2, 40, dtype=torch.long)], 1)
    cache = LogQuantCache(model.config, recall="both(pages=0.4;skip=1)")
    logits_of(model, cache, ids, [TOKENS], "logquant", mask)
    cache.save(tmp_path / "cache")
    twin, loaded = copy.deepcopy(cache), LogQuantCache.load(tmp_path / "cache", model)
    assert loaded.quantization.recall == cache.quantization.recall
    for each in (twin, loaded):
        for layer, want in zip(each.layers, cache.layers, strict=True):
            own, other = layer.held.storage.index, want.held.storage.index
            assert (own is None) == (other is None) == (layer._index == 0)
            for row, slots in enumerate(layer.rows.slots):
                for a, b in zip(own or (), other or (), strict=True):
                    assert torch.equal(a[row, :, : slots.packed // 64], b[row, :, : slots.packed // 64])
    later = ids[:, TOKENS : TOKENS + 30]
    outputs = [_steps(model, c, later, mask) for c in (cache, twin, loaded)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    swapped = LogQuantCache.load(tmp_path / "cache", model)
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert torch.allclose(_steps(model, swapped, later.flip(0), mask.flip(0)).flip(0), outputs[0], atol=1e-4)


def _steps(model, cache: LogQuantCache, ids: Tensor, mask: Tensor) -> Tensor:
    model.set_attn_implementation("logquant")
    with torch.no_grad():
        return torch.cat(
            [
                model(ids[:, i : i + 1], attention_mask=mask[:, : TOKENS + i + 1], **as_argument(cache)).logits
                for i in range(ids.shape[1])
            ],
            1,
        )


def test_a_file_without_means_is_refused(ids):
    model = tiny_model(num_hidden_layers=1)
    cache = LogQuantCache(model.config)
    logits_of(model, cache, ids, [TOKENS], "logquant")
    layer = LogQuantLayer(LogQuantConfig(recall="means(skip=0)"))
    tensors, described = cache.layers[0].state()
    with pytest.raises(ValueError, match=r"no mean keys do not fit pages \[2, 2, 8\] of keys with 32 channels"):
        layer.restore(cache.layers[0].rows, tensors, described)
    assert not layer.is_initialized


def test_bytes_are_those_of_a_mean_key_a_page(ids):
    model = tiny_model(num_hidden_layers=3)
    held = {}
    for recall in (None, "bounds", "means", "both(skip=0)"):
        cache = LogQuantCache(model.config, recall=recall)
        logits_of(model, cache, ids, [TOKENS], "logquant")
        held[recall] = cache.nbytes
    layer = 2 * 2 * (32 + 4) * 8  # two rows of two KV heads, 8 pages
    assert held["bounds"] == held[None]
    assert held["means"] == held[None] + 1 * layer and held["both(skip=0)"] == held[None] + 3 * layer


def test_generation_with_drafts_gives_what_greedy_decoding_gives(ids):
    model = tiny_model(num_hidden_layers=3)
    model.set_attn_implementation("logquant")
    prompt = ids[:1, :30].repeat(1, 20)
    outputs = [
        generate(model, prompt, LogQuantCache(model.config, recall="both(pages=0.4;skip=0)"), **options)
        for options in ({}, {"prompt_lookup_num_tokens": 4})
    ]
    assert torch.equal(*outputs)
    beams = generate(model, prompt, LogQuantCache(model.config, recall="both(pages=0.4)"), num_beams=3)
    assert beams.shape == outputs[0].shape


# ------------------------------------------------------------------------------------------------------- settings
def test_choosers_are_those_that_settings_name():
    assert tuple(CHOOSERS) == NAMES


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("both", RecallSpec()),
        ("means(pages=0.5)", RecallSpec("means", pages=0.5)),
        ("bounds(tokens=512; skip=0)", RecallSpec("bounds", tokens=512, skip=0)),
    ],
)
def test_settings_are_read(text, spec):
    assert RecallSpec.parse(text) == spec
    (cache,) = parse_caches(f"logquant:bits=4,recall={text}")
    assert cache.quantization == LogQuantConfig(bits=4, recall=text)
    assert cache.quantization.recall_spec(spec.skip) == spec
    assert spec.skip == 0 or cache.quantization.recall_spec(spec.skip - 1) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("newest", "chooser of recall must be both or means or bounds, got 'newest'"),
        ("both(pages=0)", "pages of recall must be a share above 0, up to 1, got 0.0"),
        ("both(pages=nan)", "pages of recall must be a share above 0, up to 1, got nan"),
        ("both(pages=much)", "pages of recall must be a number, got 'much'"),
        ("both(tokens=0)", "tokens of recall must be a positive whole number, got 0"),
        ("both(skip=-1)", "skip of recall must be a whole number of layers, 0 or more, got -1"),
        ("both(skip=1.5)", "skip of recall must be a whole number, got '1.5'"),
        ("both(pages=0.5;tokens=64)", "recall must have either pages or tokens, got both"),
        ("both(share=0.5)", "a setting of recall must be one of pages, tokens, skip, order, got share"),
        ("both(skip=1;skip=2)", "skip of both must be given once"),
        ("both(0.5)", "both needs key=value, got '0.5'"),
        ("both(pages=0.5", "recall must be name or name(key=value;key=value), got 'both(pages=0.5'"),
        ("", "recall must be name or name(key=value;key=value), got ''"),
    ],
)
def test_bad_settings_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(f"cache 'logquant:recall={text}': {message}") + "$"):
        parse_cache(f"logquant:recall={text}")


def test_budgets():
    assert [RecallSpec(pages=0.25).count(n, 64) for n in (1, 2, 6, 63, 504)] == [1, 1, 2, 16, 126]
    assert [RecallSpec(tokens=100).count(n, 64) for n in (1, 2, 63)] == [1, 2, 2]


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("chooser", NAMES)
def test_a_page_that_holds_a_nan_is_read(chooser, backend):
    """The output is then a NaN, as if all pages were read, and not something silently wrong."""
    layer = LogQuantLayer(LogQuantConfig(rule="recent", recall=f"{chooser}(tokens=64;skip=0)"))
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 1, 32, generator=random), torch.randn(1, 2, 600, 32, generator=random)
    k[0, 1, 250, 7] = torch.nan
    with on(backend):
        layer.update(k, k)
        handle, _ = layer.update(k[:, :, :1], k[:, :, :1])
        out = handle.kv_view.attend(AttentionCall(q, None, 0.2))
    assert out[:, :2].isfinite().all() and out[:, 2:].isnan().all()


def test_keys_of_any_size_choose_alike():
    """Pages and queries are in units of the layer's own, and so are the mean keys."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 1, 32, generator=random), torch.randn(1, 2, 600, 32, generator=random)
    outs = []
    for factor in (1.0, 2.0**-14):
        layer = LogQuantLayer(LogQuantConfig(recall="both(tokens=128;skip=0)"))
        layer.update(k * factor, k)
        handle, _ = layer.update(k[:, :, :1] * factor, k[:, :, :1])
        outs.append(handle.kv_view.attend(AttentionCall(q, None, 0.2 / factor)))
    assert torch.allclose(*outs, atol=1e-5)


def test_page_scores_are_bounds_of_what_dequantised_keys_score():
    random = torch.Generator().manual_seed(0)
    for param_bits, columns in ((8, 1.25), (8, 1.0), (16, 0.75)):
        fmt = LogQuantConfig(param_bits=param_bits, key_columns=columns).page_format(64)
        k = torch.randn(1, 2, 640, 64, generator=random)
        entries = torch.tensor([4 * (i % 64) + i // 64 for i in range(fmt.key_columns)], dtype=torch.int16)
        options = {"key_map": entries[None, None]} if fmt.needs_map else {}
        pages = ops.quantize(k, k, fmt, **options)
        keys = ops.dequantize(pages, fmt, **options)[0].unflatten(2, (-1, 64))
        q = torch.randn(1, 4, 3, 64, generator=random)
        scores = 0.125 * torch.einsum("bhgld,bhptd->bhglpt", q.unflatten(1, (2, 2)), keys).amax(-1).flatten(1, 2)
        assert (ops.page_scores(q, pages, fmt, scale=0.125, **options) >= scores - 1e-4).all()
