"""CORM within caches and models: what leaves the window stays if a query has named it, in whole pages of each head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import logquant
from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.attention.view import KVView
from logquant.cache import ragged
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from logquant.eviction.corm import choose
from logquant.eviction.spec import EvictSpec
from logquant.methods.registry import parse_cache
from logquant.plan import sequence_nbytes
from tests.helpers.corm import attention, named, softmax
from tests.helpers.layers import PLAIN
from tests.helpers.masks import pad_mask
from tests.helpers.models import generate, logits_of, tiny_model
from tests.helpers.padded import PaddedBatch
from tests.helpers.prompts import Prompt, record_prompts
from tests.helpers.refused import check_masks

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 700
# Of 700 tokens, 512 leave the window.
LEFT = 512
SETTINGS = {"rule": "recent", "evict": "corm(window=4)"}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 255, (2, TOKENS + 100), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompts(monkeypatch) -> list[Prompt]:
    return record_prompts(monkeypatch)


@pytest.fixture
def chosen(monkeypatch) -> list[tuple[Tensor, ...]]:
    """Of every choice: what each token that leaves was named last, which are packed, pages, and how many are kept."""
    seen: list[tuple[Tensor, ...]] = []

    def choice(told: Tensor, *args: int) -> tuple[Tensor, ...]:
        seen.append((told, *choose(told, *args)))
        return seen[-1][1:]

    monkeypatch.setattr(ragged, "choose", choice)
    return seen


def check_choice(named: Tensor, least: int, index: Tensor, pages: Tensor, kept: Tensor) -> None:
    """Each head packs all tokens named by query ``least`` or later, and fills the last page with those named last."""
    for told, own, count, alive in zip(named[0], index[0], pages[0].tolist(), kept[0].tolist(), strict=True):
        alive_set = set((told >= least).nonzero().flatten().tolist())
        packed = own[: 64 * count].tolist()
        assert len(alive_set) == alive and count == -(-alive // 64) and packed == sorted(set(packed))
        assert alive_set <= set(packed)
        dropped = set(range(len(told))) - set(packed)
        if dropped and len(packed) > alive:
            fill = set(packed) - alive_set
            assert min((told[i], i) for i in fill) > max((told[i], i) for i in dropped)


# ------------------------------------------------------------------------------------------------------- what stays
def check_prompt(model, ids: Tensor, queries: int, prompts, chosen, **settings) -> None:
    cache = LogQuantCache(model.config, rule="recent", evict=f"corm(window={queries})", **settings)
    logits_of(model, cache, ids, [ids.shape[1]], "logquant")
    assert len(prompts) == len(chosen) == model.config.num_hidden_layers
    for layer, prompt, (told, index, pages, kept) in zip(cache.layers, prompts, chosen, strict=True):
        left, tokens = told.shape[2], ids.shape[1]
        want = named(softmax(prompt.queries, prompt.keys, queries, layer.held.advice.fmt.head_dim**-0.5), told.shape[1])
        sinks = cache.quantization.sinks
        assert torch.equal(told.long(), want[:, :, sinks : sinks + left])
        for row in range(len(told)):
            check_choice(
                *(x[row : row + 1] for x in (told,)),
                tokens - queries,
                index[row : row + 1],
                pages[row : row + 1],
                kept[row : row + 1],
            )
        assert torch.equal(layer.held.ragged.counts, pages.int()) and torch.equal(layer.held.ragged.kept, kept.int())


@pytest.mark.parametrize("window", [3, 128])
def test_every_layer_and_head_keeps_what_the_rule_keeps(prompts, chosen, ids, window):
    check_prompt(tiny_model(num_hidden_layers=3), ids[:, :TOKENS], window, prompts, chosen)
    if window == 3:
        assert len({int(n) for _, _, pages, _ in chosen for n in pages.flatten()}) > 1


@pytest.mark.slow
def test_so_does_a_real_model(smollm2, smollm2_tokenizer, data_dir, prompts, chosen):
    text = (data_dir / "dev/books/frankenstein_84.txt").read_text()[:8000]
    ids = smollm2_tokenizer(text, return_tensors="pt").input_ids[:, :1500]
    check_prompt(smollm2, ids, 256, prompts, chosen, window=128)


@pytest.mark.parametrize("implementation", ["logquant", "sdpa"])
def test_steps_attend_to_what_is_held_and_tokens_leave_as_their_messages_say(monkeypatch, chosen, ids, implementation):
    """One token, several, and more than the operator takes at once; two of them span an eviction."""
    model, compared, compute = tiny_model(num_hidden_layers=1), [], KVView.compute
    told: list[Tensor] = []

    def computed(view: KVView, call: AttentionCall) -> Tensor:
        out = compute(view, call)
        if not view.plain:
            want, weights = attention(view, call)
            assert torch.allclose(out, want, rtol=1e-3, atol=3e-3)
            compared.append(call.query.shape[2])
            asked, slots = weights.shape[-2:]
            weights = weights[..., -4:, :]
            number = torch.arange(view.length - weights.shape[-2], view.length)
            by_heads = (weights >= 1 / (number + 1)[:, None]).unflatten(1, (2, -1)).any(2)
            own = torch.where(by_heads, number[:, None], -1).amax(2)
            before = torch.nn.functional.pad(view.ragged.named.long(), (0, asked), value=-1)
            told.append(torch.maximum(before, own))
            assert slots == before.shape[2]
        return out

    monkeypatch.setattr(KVView, "compute", computed)
    cache = LogQuantCache(model.config, **PLAIN | SETTINGS)
    logits_of(model, cache, ids[:, : TOKENS + 99], [TOKENS, 1, 3, 20, *[1] * 40, 30, *[1] * 5], implementation)
    cache.commit()
    assert compared[:3] == [1, 3, 20] and 30 in compared and len(chosen) > 2
    first = 0
    for given, *found in chosen[1:]:
        # What the newest tokens and those before have named, when tokens left.
        first = next(i for i in range(first, len(told)) if torch.equal(told[i][:, :, : given.shape[2]], given.long()))
        assert found[1].max() <= given.shape[2] // 64
        first += 1
    last = cache.layers[0].held.ragged.named
    assert torch.equal(last.long(), told[-1][:, :, -last.shape[2] :])


def test_off_is_bit_for_bit_what_it_was_and_all_kept_nearly(ids):
    model = tiny_model()
    outputs = []
    for settings in ({}, {"evict": None}, {"evict": "corm(window=128)"}):
        cache = LogQuantCache(model.config, rule="recent", **settings)
        outputs.append(logits_of(model, cache, ids[:, :720], [TOKENS, *[1] * 20], "logquant"))
    assert torch.equal(outputs[0], outputs[1])
    assert cache.layers[0].held.ragged.counts.eq(LEFT // 64 + 1).all(), "all are named by one of 128 queries"
    assert torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_bytes_are_those_of_the_pages_that_heads_have(ids):
    model = tiny_model()
    cache = LogQuantCache(model.config, **SETTINGS)
    plain = LogQuantCache(model.config, rule="recent")
    for c in (cache, plain):
        logits_of(model, c, ids, [TOKENS], "logquant")
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        held, fmt, exact = layer.held.ragged, layer.format, TOKENS - LEFT
        pages, most = int(held.counts.sum()), int(held.counts.max())
        dropped = 2 * 2 * (LEFT // 64) - pages
        table, named, counts = 4 * 2 * 2 * most, 4 * 2 * 2 * exact, 2 * 4 * 2 * 2
        assert cache.report()[0].packed == round(int(cache.layers[0].held.ragged.counts.sum()) * 64 / 2)
        assert dropped and layer.nbytes == other.nbytes - dropped * fmt.nbytes + table + named + counts
        # What rounding to pages costs: less than a page a head.
        assert ((held.counts * 64 - held.kept) < 64).all() and (held.counts * 64 >= held.kept).all()
    with pytest.raises(ValueError, match="cache must be one without evict"):
        sequence_nbytes(parse_cache("recent:window=128,evict=corm"), model.config, 1000, 4)


def test_modes_of_torch_and_autocast_change_nothing(ids):
    """Whoever calls the model, and in whatever order; messages are computed as they are without autocast."""
    model = tiny_model()
    model.set_attn_implementation("logquant")
    caches = [LogQuantCache(model.config, **SETTINGS) for _ in range(2)]
    for cache, modes in zip(caches, ((torch.no_grad,) * 5, (torch.inference_mode, torch.no_grad) * 3), strict=True):
        first = 0
        for n, mode in zip([TOKENS, 1, 3, 60, 1], modes, strict=False):
            with mode():
                model(ids[:, first : first + n], **as_argument(cache))
            first += n
        cache.commit()
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.held.ragged.pool, other.held.ragged.pool)
    q, k, v = (4 * torch.randn(1, n, 400, 32, generator=torch.Generator().manual_seed(0)) for n in (4, 2, 2))
    named = []
    for enabled in (False, True):
        layer = LogQuantLayer(LogQuantConfig(**SETTINGS))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            handle, _ = layer.update(k, v)
            handle.kv_view.attend(AttentionCall(q, None, 0.2, causal=True))
            layer.commit()
        named.append(layer.held.ragged.named)
    assert torch.equal(*named)


# -------------------------------------------------------------------------------------------------- rows and masks
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_keeps_what_it_keeps_alone(side):
    def compare(batch: LogQuantLayer, row: int, alone: LogQuantLayer) -> None:
        assert torch.equal(batch.held.ragged.counts[row], alone.held.ragged.counts[0])

    factors = torch.arange(1, 9)  # some heads look at more tokens than others
    padded = PaddedBatch(side, [1, 1, 3, 20, *[1] * 90], heads=4, factors=factors)
    batch = padded.check(lambda: LogQuantLayer(LogQuantConfig(**SETTINGS)), compare)
    assert batch.held.ragged.counts[0].unique().numel() > 2


def test_a_mask_that_hides_tokens_is_refused(ids):
    model = tiny_model()
    cache = LogQuantCache(model.config, **SETTINGS)
    logits_of(model, cache, ids, [TOKENS], "logquant")
    check_masks(cache.layers[0])


def test_sinks_and_softcaps():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 400, 32, generator=random) for n in (4, 2, 2))
    layer, sinks = LogQuantLayer(LogQuantConfig(**SETTINGS)), torch.randn(4, generator=random)
    for part in (slice(0, 390), slice(390, 400)):
        handle, _ = layer.update(k[:, :, part], v[:, :, part])
        view = handle.kv_view
        call = AttentionCall(q[:, :, part], None, 0.2, 5.0, None, True)
        plain = view.attend(call) if view.plain else view.compute(call)
    out = view.compute(call._replace(sinks=sinks))
    share = torch.sigmoid(view.lse - sinks[None, :, None])
    assert torch.allclose(out, plain * share[..., None], atol=1e-5)


# ------------------------------------------------------------------------------------------ caches that move and stay
def test_a_text_of_which_nothing_has_left_yet_is_saved_too(ids, tmp_path):
    model = tiny_model()
    cache = LogQuantCache(model.config, **SETTINGS)
    logits_of(model, cache, ids, [30], "logquant")
    cache.save(tmp_path / "cache")
    loaded = LogQuantCache.load(tmp_path / "cache", model)
    for each in (cache, loaded):
        logits_of(model, each, ids[:, 30:], [TOKENS - 30], "logquant")
    for one, other in zip(cache.layers, loaded.layers, strict=True):
        one.commit()
        other.commit()
        assert torch.equal(one.held.ragged.pool, other.held.ragged.pool) and one.rows.packed > 0


def test_beams_copies_and_files(ids, tmp_path):
    model = tiny_model()
    mask = torch.cat([pad_mask([TOKENS, 500], "left"), torch.ones(2, 100, dtype=torch.long)], 1)
    cache = LogQuantCache(model.config, **SETTINGS)
    logits_of(model, cache, ids, [TOKENS], "logquant", mask)
    cache.save(tmp_path / "cache")
    twin, loaded = copy.deepcopy(cache), LogQuantCache.load(tmp_path / "cache", model)
    assert loaded.quantization == cache.quantization
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    model.set_attn_implementation("logquant")

    def go_on(cache: LogQuantCache, later: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [
                    model(later[:, i : i + 1], attention_mask=mask[:, : TOKENS + i + 1], **as_argument(cache)).logits
                    for i in range(90)
                ],
                1,
            )

    later = ids[:, TOKENS:]
    want = go_on(cache, later, mask)
    assert torch.equal(want, go_on(twin, later, mask)) and torch.equal(want, go_on(loaded, later, mask))
    assert torch.allclose(want, go_on(swapped, later.flip(0), mask.flip(0)).flip(0), atol=1e-4)
    prompt = ids[:1, :30].repeat(1, 20)
    greedy = generate(model, prompt, LogQuantCache(model.config, **SETTINGS))
    assert generate(model, prompt, LogQuantCache(model.config, **SETTINGS), num_beams=3).shape == greedy.shape
    logquant.enable(model, **SETTINGS)
    again = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    assert torch.equal(again, greedy)


def test_files_that_do_not_fit_are_refused(ids):
    model = tiny_model(num_hidden_layers=1)
    cache = LogQuantCache(model.config, **SETTINGS)
    logits_of(model, cache, ids, [TOKENS], "logquant")
    layer = cache.layers[0]
    tensors, described = layer.state()
    for name in ("pool", "counts", "kept", "named"):
        for broken in (None, tensors[f"evict.{name}"][:1], tensors[f"evict.{name}"].float()):
            given = {key: t for key, t in tensors.items() if key != f"evict.{name}"}
            if broken is not None:
                given[f"evict.{name}"] = broken
            with pytest.raises(ValueError, match="pool, counts, kept and named of evict"):
                LogQuantLayer(cache.quantization).restore(layer.rows, given, described)


def test_crop_takes_back_exact_tokens_alone(ids):
    model = tiny_model()
    cache = LogQuantCache(model.config, **SETTINGS)
    logits_of(model, cache, ids, [TOKENS], "logquant")
    twin = copy.deepcopy(cache)
    later = ids[:, TOKENS:]
    logits_of(model, cache, later, [1, 2], "logquant")
    with pytest.raises(ValueError, match="crop must not bring back tokens that have left the window, of which evict"):
        cache.crop(-3 - 100)
    assert cache.get_seq_length() == TOKENS + 3
    cache.crop(-2)
    outputs = [
        logits_of(model, c, later[:, skip:], portions, "logquant")
        for c, skip, portions in ((cache, 1, [1] * 9), (twin, 0, [1] * 10))
    ]
    assert torch.equal(outputs[0], outputs[1][:, 1:]), "what came with the last forward pass leaves no trace"
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0 and cache.layers[0].held.ragged.pool.shape[0] == 0
    again = logits_of(model, cache, ids, [TOKENS, 1], "logquant")
    assert torch.equal(again, logits_of(model, LogQuantCache(model.config, **SETTINGS), ids, [TOKENS, 1], "logquant"))


# ------------------------------------------------------------------------------------------------------ what is refused
def test_what_needs_all_tokens_is_refused(ids):
    model = tiny_model()
    cache = LogQuantCache(model.config, **SETTINGS)
    with pytest.raises(RuntimeError, match="tell its queries, and has not"):
        logits_of(model, cache, ids, [TOKENS, 1], "eager")
    cache.reset()
    logits_of(model, cache, ids, [TOKENS], "logquant")
    with pytest.raises(RuntimeError, match="there are no keys and values of all positions"):
        cache.layers[0].keys  # noqa: B018
    with pytest.raises(ValueError, match="none may be speculative"):
        cache.activate_past_recording()
    with pytest.raises(ValueError, match="cannot be offloaded"):
        cache.layers[0].offload()
    model.set_attn_implementation("logquant")
    with pytest.raises(RuntimeError, match="evict computes no gradients"):
        model(ids[:, TOKENS : TOKENS + 1], **as_argument(cache))
    cache.rewind()
    assert logits_of(model, cache, ids[:, TOKENS:], [1, 20], "sdpa").isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evict": "corm", "rule": "log", "window": 128}, "rule must be 'recent' with evict"),
        (
            {"evict": "corm", "window": 64},
            "window must be 128 or more with corm, lest tokens leave before they are old",
        ),
        ({"evict": "corm(window=8)", "prune": "keydiff"}, "prune must be None with evict"),
        ({"evict": "corm(window=8)", "recall": "both"}, "recall must be None with evict"),
        ({"evict": "corm(window=0)"}, "window of evict must be a positive number of queries, got 0"),
        ({"evict": "h2o"}, "rule of evict must be 'corm', got 'h2o'"),
        ({"evict": "corm(keep=2)"}, "a setting of evict must be one of window, got keep"),
        ({"evict": 5}, "evict must be a text or None, got 5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        LogQuantConfig(**{"rule": "recent"} | settings)
    assert EvictSpec.parse("corm") == EvictSpec("corm", 256)
