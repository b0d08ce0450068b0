"""What is left of dropped tokens within caches and models: attention joins it as the paper states it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.attention.view import KVView
from logquant.cache import commit, ragged
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from logquant.eviction.corm import choose as choose_named
from logquant.files import fingerprint, write
from logquant.methods.registry import parse_cache
from logquant.plan import sequence_nbytes
from logquant.pruning.prompt import choose
from logquant.residual import KINDS
from logquant.residual.trained import Trained
from logquant.residual_spec import RESIDUALS
from tests.helpers.models import generate, logits_of, tiny_config, tiny_model
from tests.helpers.padded import PaddedBatch
from tests.helpers.prompts import Prompt, record_prompts
from tests.helpers.residual import attention, features, write_features

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 700
PRUNE = "keydiff(keep=0.4)"


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 255, (2, TOKENS + 100), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def less(tmp_path_factory) -> str:
    """Of the tiny model of two layers."""
    return write_features(tmp_path_factory.mktemp("less") / "less.safetensors", tiny_config())


@pytest.fixture
def prompts(monkeypatch) -> list[Prompt]:
    return record_prompts(monkeypatch)


@pytest.fixture
def dropped(monkeypatch) -> list[Tensor]:
    """Of every prompt that is pruned, bool ``[B, H, T]``: which tokens are dropped."""
    seen: list[Tensor] = []

    def chosen(pruner, prompt, leaving: Tensor, count: int) -> Tensor:
        best = choose(pruner, prompt, leaving, count)
        gone = torch.zeros(prompt.keys.shape[:3], dtype=torch.bool)
        for row, head in ((row, head) for row in range(len(gone)) for head in range(gone.shape[1])):
            own = leaving[row if len(leaving) > 1 else 0].long()
            gone[row, head, own] = True
            gone[row, head, own[best[row, head]]] = False
        seen.append(gone)
        return best

    monkeypatch.setattr(commit, "choose", chosen)
    return seen


# ------------------------------------------------------------------------------------------------ what attention gives
@pytest.mark.parametrize("rule", ["recent", "attention"])
def test_every_layer_and_head_joins_what_was_dropped(monkeypatch, tmp_path, ids, prompts, dropped, rule):
    """One token, several, and more than the operator takes at once, in one call."""
    model, compute = tiny_model(num_hidden_layers=3, num_attention_heads=8), KVView.compute
    setting = write_features(tmp_path / "less", model.config)
    compared: list[tuple[int, int]] = []

    def computed(view: KVView, call: AttentionCall) -> Tensor:
        out = compute(view, call)
        if not view.plain:
            layer = view.layer._index
            gone, prompt = dropped[layer], prompts[layer]
            pairs = [
                [(prompt.keys[i, h, gone[i, h]], prompt.values[i, h, gone[i, h]]) for h in range(2)] for i in range(2)
            ]
            want, share = attention(view, call, features(model.config, layer), pairs)
            assert share > 1e-4
            assert torch.allclose(out.double(), want, rtol=1e-3, atol=3e-3)
            compared.append((layer, call.query.shape[2]))
        return out

    monkeypatch.setattr(KVView, "compute", computed)
    cache = LogQuantCache(model.config, rule=rule, prune=PRUNE, residual=setting)
    logits_of(model, cache, ids, [TOKENS, 1, 3, 20], "logquant")
    assert compared == [(layer, n) for n in (1, 3, 20) for layer in range(3)]


@pytest.mark.parametrize("units", [1.0, 2.0**14])
@pytest.mark.parametrize("sinks", [False, True])
def test_so_does_a_layer_that_evicts(monkeypatch, less, sinks, units):
    chosen: list[tuple[Tensor, Tensor]] = []

    def choice(*args) -> tuple[Tensor, Tensor, Tensor]:
        index, pages, kept = choose_named(*args)
        chosen.append((index, pages))
        return index, pages, kept

    monkeypatch.setattr(ragged, "choose", choice)
    config = LogQuantConfig(rule="recent", evict="corm(window=1)", residual=less)
    random, layer = torch.Generator().manual_seed(0), LogQuantLayer(config)
    total = 420
    q, k, v = (torch.randn(1, n, total, 32, generator=random) for n in (4, 2, 2))
    v, sink = v * units, torch.randn(4, generator=random) if sinks else None
    gone = torch.zeros(2, total, dtype=torch.bool)
    compared, first = 0, 0
    with torch.no_grad():
        for n in [330, 1, 3, 20, *[1] * 66]:
            came = slice(first, first + n)
            handle, _ = layer.update(k[:, :, came], v[:, :, came])
            call = AttentionCall(q[:, :, came], None, 0.3, 0.0, sink, n > 1)
            view, left = handle.kv_view, 4
            for index, pages in chosen:
                for head in range(2):
                    count = 64 if left > 4 else 192
                    gone[head, left : left + count] = True
                    gone[head, left + index[0, head, : 64 * int(pages[0, head])]] = False
                left += count
            out = view.attend(call)
            if not view.plain:
                net = features(tiny_config(), 0)
                want, share = attention(view, call, net, [[(k[0, h, gone[h]], v[0, h, gone[h]]) for h in range(2)]])
                assert torch.allclose(out.double() / units, want / units, rtol=1e-3, atol=3e-3) and share > 1e-4
                compared += 1
            first += n
    assert len(chosen) == 2 and gone.any(1).all() and compared == 69


def test_off_and_before_anything_is_dropped_it_is_bit_for_bit_as_ever(ids, less):
    model = tiny_model()
    for settings in ({"prune": PRUNE}, {"rule": "recent", "evict": "corm(window=1)"}):
        outputs = [
            logits_of(model, LogQuantCache(model.config, **settings | own), ids, portions, "logquant")
            for portions in ([150, *[1] * 20], [TOKENS, 1, 20])
            for own in ({}, {"residual": None}, {"residual": less})
        ]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[3], outputs[4]) and not torch.allclose(outputs[3], outputs[5], atol=1e-2)


def test_a_layer_without_features_drops_as_ever(ids, tmp_path):
    """The keys and values of the second layer come from what the first attends to."""
    model = tiny_model()
    setting = write_features(tmp_path / "less", model.config, layers=[1])
    caches = [LogQuantCache(model.config, prune=PRUNE, residual=own) for own in (None, setting)]
    outs = [logits_of(model, cache, ids, [TOKENS, 3], "logquant") for cache in caches]
    assert not torch.equal(*outs)
    plain, own = (cache.layers[1].held.storage for cache in caches)
    exact = caches[0].layers[1].rows.exact
    assert torch.equal(plain.pages, own.pages)
    assert torch.equal(plain.window_k[:, :, :exact], own.window_k[:, :, :exact])


@pytest.mark.parametrize("rank", [4, 8])
def test_bytes_are_those_of_the_sums(ids, tmp_path, rank):
    model = tiny_model()
    setting = write_features(tmp_path / "less", model.config, layers=[1], rank=rank)
    plain = LogQuantCache(model.config, prune=PRUNE)
    cache = LogQuantCache(model.config, prune=PRUNE, residual=setting)
    for each in (plain, cache):
        logits_of(model, each, ids[:1], [TOKENS], "logquant")
    assert cache.layers[0].nbytes == plain.layers[0].nbytes
    assert cache.layers[1].nbytes - plain.layers[1].nbytes == 2 * rank * (32 + 1) * 4
    spec = parse_cache(f"logquant:prune={PRUNE},residual={setting}")
    assert sequence_nbytes(spec, model.config, TOKENS, 4) == cache.nbytes


def test_modes_of_torch_and_autocast_change_nothing(less):
    random, outs = torch.Generator().manual_seed(0), []
    q, k, v = (torch.randn(1, n, 500, 32, generator=random) for n in (4, 2, 2))
    for mode, enabled in ((torch.no_grad, False), (torch.inference_mode, False), (torch.no_grad, True)):
        layer = LogQuantLayer(LogQuantConfig(prune=PRUNE, residual=less))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for i, part in enumerate((slice(0, 490), slice(490, 491), slice(491, 500))):
                with mode() if i < 2 else torch.no_grad():
                    handle, _ = layer.update(k[:, :, part], v[:, :, part])
                    out = handle.kv_view.attend(AttentionCall(q[:, :, part], None, 0.2, causal=True))
        outs.append(out)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


# ------------------------------------------------------------------------------------------- rows, copies and files
@pytest.mark.parametrize("settings", [{"prune": PRUNE}, {"rule": "recent", "evict": "corm(window=1)"}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_as_if_alone(less, side, settings):
    def compare(batch: LogQuantLayer, row: int, alone: LogQuantLayer) -> None:
        sums, own = (layer.held.storage.residual.sums for layer in (batch, alone))
        assert torch.allclose(sums[row], own[0], rtol=1e-4, atol=1e-4)

    config = LogQuantConfig(**settings, residual=less)
    batch = PaddedBatch(side, [1, 3, 20, *[1] * 50]).check(lambda: LogQuantLayer(config), compare, atol=1e-4)
    sums = batch.held.storage.residual.sums
    assert sums[0].any() and not sums[2].any()


@pytest.mark.parametrize("settings", [{"prune": PRUNE}, {"rule": "recent", "evict": "corm(window=1)"}])
def test_beams_copies_files_and_crops(ids, tmp_path, less, settings):
    model = tiny_model()
    cache = LogQuantCache(model.config, **settings, residual=less)
    logits_of(model, cache, ids, [TOKENS], "logquant")
    cache.save(tmp_path / "cache")
    twin, loaded = copy.deepcopy(cache), LogQuantCache.load(tmp_path / "cache", model)
    swapped, cropped = copy.deepcopy(cache), copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    logits_of(model, cropped, ids[:, TOKENS + 50 :], [3], "logquant")
    cropped.crop(-3)
    later, portions = ids[:, TOKENS:], [1, 3, 20, *[1] * 60]
    want = logits_of(model, cache, later, portions, "logquant")
    for other in (twin, loaded, cropped):
        assert torch.equal(want, logits_of(model, other, later, portions, "logquant"))
    assert torch.allclose(want, logits_of(model, swapped, later.flip(0), portions, "logquant").flip(0), atol=1e-4)
    cache.crop(-cache.get_seq_length())
    fresh = LogQuantCache(model.config, **settings, residual=less)
    again = [logits_of(model, each, ids.flip(0), [TOKENS, 3], "logquant") for each in (cache, fresh)]
    assert torch.equal(*again)
    prompt = ids[:1, :30].repeat(1, 20)
    one = generate(model, prompt, LogQuantCache(model.config, **settings, residual=less))
    many = generate(model, prompt, LogQuantCache(model.config, **settings, residual=less), num_beams=3)
    assert one.shape == many.shape


def test_drafts_get_what_tokens_get_one_by_one(ids, less):
    model = tiny_model()
    outputs = []
    for drafts in (False, True):
        cache = LogQuantCache(model.config, rule="recent", prune=PRUNE, residual=less)
        logits_of(model, cache, ids, [TOKENS], "logquant")
        if drafts:
            cache.activate_past_recording()
        outputs.append(logits_of(model, cache, ids[:, TOKENS:], [60] if drafts else [1] * 60, "logquant"))
    assert torch.allclose(*outputs, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "residual must be None without prune or evict, for whose dropped tokens it stands, got 'less"),
        ({"prune": PRUNE, "recall": "both"}, "recall must be None with residual, which is weighed against all"),
        ({"prune": PRUNE, "residual": "less"}, "file of residual must be what logquant train-residual has written"),
        ({"prune": PRUNE, "residual": "gru(file=x)"}, "kind of residual must be 'less', got 'gru'"),
        ({"prune": PRUNE, "residual": "less(rank=8)"}, "a setting of residual must be one of file, got rank"),
        ({"prune": PRUNE, "residual": 5}, "residual must be a text, what is trained, or None, got 5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LogQuantConfig(**{"residual": "less(file=less.safetensors)"} | settings)


def test_what_does_not_fit_is_refused(ids, less, tmp_path):
    model, config = tiny_model(), LogQuantConfig(prune=PRUNE, residual=less)
    with pytest.raises(ValueError, match="residual was made for another model"):
        LogQuantCache(tiny_config(num_hidden_layers=3), config)
    with pytest.raises(ValueError, match="keys of 2 heads and dim 32, got 3 heads and dim 32"):
        LogQuantLayer(config).update(torch.randn(1, 3, 9, 32), torch.randn(1, 3, 9, 32))
    with pytest.raises(ValueError, match="prune does not go with max_length"):
        LogQuantCache(model.config, config, max_length=2048)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere, which residual names"):
        LogQuantCache(model.config, prune=PRUNE, residual=f"less(file={tmp_path / 'nowhere'})")
    cache = LogQuantCache(model.config, config)
    logits_of(model, cache, ids, [TOKENS], "logquant")
    with pytest.raises(RuntimeError, match="residual computes no gradients"):
        model(ids[:, TOKENS : TOKENS + 1], **as_argument(cache))
    cache.rewind()
    assert logits_of(model, cache, ids[:, TOKENS:], [1, 20], "sdpa").isfinite().all()


def test_files_that_do_not_fit_are_refused(ids, tmp_path):
    model, path = tiny_model(num_hidden_layers=1), tmp_path / "less"
    setting = write_features(path, model.config)
    cache = LogQuantCache(model.config, prune=PRUNE, residual=setting)
    logits_of(model, cache, ids, [TOKENS], "logquant")
    layer = cache.layers[0]
    tensors, described = layer.state()
    for broken in ({}, {"residual.sums": tensors["residual.sums"][:1]}):
        given = {name: t for name, t in tensors.items() if name != "residual.sums"} | broken
        with pytest.raises(ValueError, match="residual must have float32 sums"):
            LogQuantLayer(cache.quantization).restore(layer.rows, given, described)
    cache.save(tmp_path / "cache")
    net = features(model.config, 0)
    for changed, message in (
        (net._replace(mix=2 * net.mix), "saved with another file of features"),
        (net._replace(mix=net.mix[:1]), "do not fit each other"),
        (net._replace(mix=net.mix.half()), "must be float32"),
        (net._replace(mix=net.mix * torch.inf), "must be finite"),
    ):
        Trained("less", {0: changed}, Trained.load(path).model if message[0] == "s" else {}, {}).save(path)
        with pytest.raises(ValueError, match=message):
            LogQuantCache.load(tmp_path / "cache", model)
        write_features(path, model.config)
    Path(path).write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        LogQuantCache(model.config, prune=PRUNE, residual=setting)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("layers.0.mix", {"kind": ["less"]}, r"kind of residual in .* must be one of less, got \['less'\]"),
        ("layers.0.mix", {"kind": "more"}, "must be one of less, got 'more'"),
        ("mix", {}, "must be called layers.NUMBER.NAME, got 'mix'"),
        ("layers.first.mix", {}, "got 'layers.first.mix'"),
        ("layers.0.mix", {}, "a layer of a residual must have .*, lacks key_in"),
    ],
)
def test_files_of_other_things_are_refused(tmp_path, name, changes, message):
    described = {"version": 1, "kind": "less", "model": {}, "made": {}} | changes
    write(tmp_path / "less", "residual", {name: torch.zeros(1)}, described)
    with pytest.raises(ValueError, match=message):
        Trained.load(tmp_path / "less")


def test_every_kind_that_a_setting_may_name_is_there():
    assert tuple(KINDS) == RESIDUALS


def test_the_file_is_read_once(ids, tmp_path):
    """All layers of a cache have the same nets, whatever becomes of the file."""
    model, path = tiny_model(), tmp_path / "less"
    cache = LogQuantCache(model.config, prune=PRUNE, residual=write_features(path, model.config))
    path.unlink()
    logits_of(model, cache, ids, [TOKENS, 1], "logquant")
    assert copy.deepcopy(cache).quantization == cache.quantization
    cache.save(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="which residual names"):
        LogQuantCache.load(tmp_path / "cache", model)
    unsaved = Trained("less", {0: features(model.config, 0)}, fingerprint(model.config), {})
    with pytest.raises(ValueError, match="residual must be read from a file for a cache to be saved"):
        LogQuantCache(model.config, prune=PRUNE, residual=unsaved).save(tmp_path / "other")
    beyond = Trained("less", {7: features(model.config, 7)}, fingerprint(model.config), {})
    with pytest.raises(ValueError, match=r"among those with full attention, \[0, 1\]; got \[7\]"):
        LogQuantCache(model.config, prune=PRUNE, residual=beyond)


def test_the_sums_are_float32_under_every_default(ids, less):
    model, default = tiny_model(), torch.get_default_dtype()
    cache = LogQuantCache(model.config, prune=PRUNE, residual=less)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert logits_of(model, cache, ids, [TOKENS, 1], "logquant").isfinite().all()
    finally:
        torch.set_default_dtype(default)
    assert cache.layers[0].held.storage.residual.sums.dtype == torch.float32


@pytest.mark.parametrize("heads", [1, 2])
def test_query_heads_may_come_as_queries_of_their_kv_head(tmp_path, heads):
    config = tiny_config(num_key_value_heads=heads)
    layer = LogQuantLayer(LogQuantConfig(prune=PRUNE, residual=write_features(tmp_path / "less", config)))
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 601, 32, generator=random) for n in (4, heads, heads))
    with torch.no_grad():
        keys, _ = layer.update(k[:, :, :600], v[:, :, :600])
        keys.kv_view.attend(AttentionCall(q[:, :, :600], None, 0.2, causal=True))
        keys, _ = layer.update(k[:, :, 600:], v[:, :, 600:])
        call = AttentionCall(q[:, :, 600:], None, 0.2)
        want = keys.kv_view.compute(call)
        folded = call._replace(query=call.query.reshape(1, heads, 4 // heads, 32))
        got = keys.kv_view.compute(folded)
        assert torch.allclose(got.flatten(1, 2), want.flatten(1, 2), atol=1e-5)
        with pytest.raises(ValueError, match="made for 4 query heads, got 8"):
            keys.kv_view.compute(call._replace(query=call.query.repeat(1, 2, 1, 1)))
