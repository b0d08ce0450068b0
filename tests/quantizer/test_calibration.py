"""Calibration: column maps that a model has once for all sequences, and files that do not fit it."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import logquant
from logquant import LogQuantCache, LogQuantConfig, files
from logquant.cache.sizes import head_nbytes
from logquant.cli import app
from logquant.compat import as_argument
from logquant.eval import evaluate
from logquant.files import fingerprint
from logquant.methods.registry import parse_cache, parse_caches
from logquant.quantizer import columns
from logquant.quantizer.calibrate import LEAST_TOKENS, calibrate
from logquant.quantizer.calibration import Calibration
from logquant.quantizer.feedback import Attention
from logquant.quantizer.queries import MAP_QUERIES
from tests.helpers.masks import pad_mask
from tests.helpers.models import family_config, save_tiny_model, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, DIM = 2, 64


@pytest.fixture(scope="module")
def model():
    return tiny_model(head_dim=DIM)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, 400), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def calibration(model):
    texts = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(1))
    return calibrate(model, texts)


@pytest.fixture
def path(calibration, tmp_path):
    calibration.save(tmp_path / "calibration")
    return tmp_path / "calibration"


def filled(model, ids, mask=None, **options) -> LogQuantCache:
    cache = LogQuantCache(model.config, **options)
    with torch.no_grad():
        model(ids, attention_mask=mask, **as_argument(cache))
    return cache


def maps_of(cache: LogQuantCache) -> list[torch.Tensor]:
    return [layer.held.advice.key_map for layer in cache.layers]


# --------------------------------------------------------------------------------------------------- what it is made of
def test_scores_are_the_sum_of_what_points_of_texts_say(model, calibration):
    """The first such point is where a cache with the same tokens would say it."""
    texts = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(1))
    want: dict[int, torch.Tensor] = {}
    for text in texts:
        cache = filled(model, text[None, :LEAST_TOKENS], window=128)
        leaving = torch.arange(4, 4 + 128, 2, dtype=torch.int32)[None]
        for i, layer in enumerate(cache.layers):
            assert layer.rows.packed == 0 and layer.held.advice.queries.query.shape[2] == MAP_QUERIES
            attention = Attention(layer.held.advice.queries, layer.held.storage.window_k[:, :, :LEAST_TOKENS], leaving)
            want[i] = want.get(i, 0) + attention.key_scores(64)[0]
    tensors, described = calibration.state()
    assert sorted(tensors) == [f"layers.{i}.key_scores" for i in want] and described["tokens"] == 600
    for i, score in want.items():
        torch.testing.assert_close(tensors[f"layers.{i}.key_scores"], score)
    assert calibration.layers == [0, 1] and "2 layers, 600 tokens" in repr(calibration)


def test_only_full_attention_is_calibrated():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config("gemma2")).eval()
    full = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    assert calibrate(model, [torch.arange(280) % 64]).layers == full and 0 < len(full) < model.config.num_hidden_layers
    with pytest.raises(ValueError, match="texts must be at least one"):
        calibrate(model, [])
    with pytest.raises(ValueError, match=r"texts must be token ids \[length\], at least 260, got \[259\]"):
        calibrate(model, [torch.zeros(259, dtype=torch.long)])


# --------------------------------------------------------------------------------------------------------------- in use
def test_every_sequence_has_the_same_maps_from_the_start(model, ids, calibration):
    fmt = LogQuantConfig().page_format(DIM)
    scores = [score for _, score in sorted(calibration.state()[0].items())]
    want = [columns.allocate(score, fmt) for score in scores]
    cache, other = (filled(model, x, calibration=calibration, rule="log") for x in (ids[:, :100], ids[:1].flip(1)))
    assert cache.layers[0].rows.packed == 0 < other.layers[0].rows.packed
    for each in (cache, other):
        for got, layer_map in zip(maps_of(each), want, strict=True):
            assert torch.equal(got, layer_map.expand_as(got))
            assert got.shape == (len(got), HEADS, fmt.key_columns)
            assert len(got.untyped_storage()) == layer_map.nbytes
    assert [a.data_ptr() for a in maps_of(cache)] == [b.data_ptr() for b in maps_of(other)], "there is one tensor"
    own = filled(model, ids[:1].flip(1), rule="log")
    assert not torch.equal(maps_of(own)[0], maps_of(other)[0])
    maps = 2 * HEADS * fmt.key_columns * 2
    assert own.nbytes - other.nbytes == maps
    config = other.quantization
    assert other.nbytes == 2 * HEADS * head_nbytes(config, 400, DIM, itemsize=4, query_heads=2)


def test_crop_leaves_the_maps_of_a_fresh_run(model, ids, calibration):
    """Without calibration the longer text would have chosen them."""
    cropped = filled(model, ids, calibration=calibration)
    cropped.crop(-100)
    fresh = filled(model, ids[:, :300], calibration=calibration)
    assert all(torch.equal(a, b) for a, b in zip(maps_of(cropped), maps_of(fresh), strict=True))
    chosen, alone = filled(model, ids), filled(model, ids[:, :300])
    chosen.crop(-100)
    assert not all(torch.equal(a, b) for a, b in zip(maps_of(chosen), maps_of(alone), strict=True))


def test_rows_of_a_padded_batch_have_the_maps_too(model, ids, calibration):
    cache = filled(model, ids, pad_mask([400, 250], "left"), calibration=calibration)
    alone = filled(model, ids[1:, 150:], calibration=calibration)
    assert all(torch.equal(a[1:], b) for a, b in zip(maps_of(cache), maps_of(alone), strict=True))
    before = [layer.dense() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.to("cpu")
    for layer, dense in zip(cache.layers, before, strict=True):
        assert layer.held.advice.key_map.shape[0] == 4 and layer.held.advice.key_map.stride(0) == 0
        for got, want in zip(layer.dense(), dense, strict=True):
            assert torch.equal(got, want[[1, 1, 0, 0]])


def test_copies_files_and_resets_keep_it(model, ids, calibration, tmp_path):
    cache = filled(model, ids, calibration=calibration)
    cache.save(tmp_path / "cache")
    loaded = LogQuantCache.load(tmp_path / "cache", model)
    twins = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), loaded]
    assert not any("key_map" in name for name in load_file(tmp_path / "cache"))
    for twin in twins:
        assert twin.quantization == cache.quantization and hash(twin.quantization) == hash(cache.quantization)
        for layer, want in zip(twin.layers, cache.layers, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(layer.dense(), want.dense(), strict=True))
    fresh = filled(model, ids[:, :300], calibration=calibration)
    for twin in (cache, *twins):
        twin.reset()
        with torch.no_grad():
            model(ids[:, :300], **as_argument(twin))
        for layer, want in zip(twin.layers, fresh.layers, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(layer.dense(), want.dense(), strict=True))


def test_generate_and_eval_take_it(model, ids, path):
    logquant.enable(model, calibration=path)
    try:
        out = model.generate(ids[:1, :300], max_new_tokens=5, return_dict_in_generate=True, use_cache=True)
        assert out.past_key_values.quantization.calibration == Calibration.load(path)
    finally:
        logquant.disable(model)
    specs = parse_caches(f"log,log:calibration={path},recent:calibration={path},window=32")
    assert [spec.quantization.calibration is None for spec in specs] == [True, False, False]
    own, calibrated, recent = evaluate(model, ids, specs, prefill=300, chunk=33)
    assert 0 < sum(calibrated.kl) < 2 * sum(own.kl) and sum(recent.kl) > 0
    assert own.bits_per_element > calibrated.bits_per_element == LogQuantConfig().page_format(DIM).bits_per_element
    assert parse_cache(f"logquant:calibration={path}").replace(window=32).quantization.calibration is not None


# ------------------------------------------------------------------------------------------------------------- refusals
def rewritten(path, **described) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = json.loads(metadata["logquant_calibration"]) | described
    save_file(load_file(path), path, {"logquant_calibration": json.dumps(changed)})


DAMAGES = [
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged or no safetensors file"),
    (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x55" * 9), "its contents are not those that were saved"),
    (lambda path: save_file(load_file(path), path), "holds no LogQuant calibration"),
    (lambda path: rewritten(path, version=2), "has version 2 of the file format; this logquant reads version 1"),
    (lambda path: rewritten(path, tokens=7), "are not those that were saved"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_damaged_file_is_refused(model, path, damage, message):
    damage(path)
    with pytest.raises(ValueError, match=message):
        LogQuantCache(model.config, calibration=path)
    with pytest.raises(ValueError, match=message):
        parse_cache(f"logquant:calibration={path}")


def test_a_description_that_lacks_something_is_refused(path):
    tensors, described = Calibration.load(path).state()
    files.write(path, "calibration", tensors, {"version": described["version"], "tokens": 3})
    with pytest.raises(ValueError, match=r"must have model and tokens, lacks \['model'\]"):
        Calibration.load(path)


def test_files_of_another_kind_are_refused(model, ids, path, tmp_path):
    filled(model, ids).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="holds no LogQuant calibration"):
        Calibration.load(tmp_path / "cache")
    with pytest.raises(ValueError, match="holds no LogQuant cache"):
        LogQuantCache.load(path, model)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        LogQuantCache(model.config, calibration=tmp_path / "nothing")


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"head_dim": 128}, {"hidden_size": 128}], ids=str)
def test_another_model_is_refused(path, change):
    other = tiny_config(**{"head_dim": DIM} | change)
    with pytest.raises(ValueError, match="calibration was made for another model: its config differs"):
        LogQuantCache(other, calibration=path)


def test_what_does_not_fit_is_named(model, calibration):
    tensors, described = calibration.state()
    scores = [tensors[f"layers.{i}.key_scores"] for i in (0, 1)]
    less = Calibration({0: scores[0]}, described["model"], 1)
    with pytest.raises(ValueError, match=r"calibration must have statistics of every layer .* lacks \[1\]"):
        LogQuantCache(model.config, calibration=less)
    narrow = Calibration(dict(enumerate(s[:1] for s in scores)), fingerprint(model.config), 1)
    cache = LogQuantCache(model.config, calibration=narrow)
    states = torch.zeros(1, HEADS, 3, DIM)
    for _ in range(2):
        with pytest.raises(ValueError, match="layer 0 is of keys of 1 heads and dim 64, got 2 heads and dim 64"):
            cache.update(states, states, 0)
        assert not cache.layers[0].is_initialized and cache.get_seq_length() == 0
    for bad in (scores[0].double(), scores[0][0], -scores[0], scores[0] / 0):
        with pytest.raises(ValueError, match=r"key_scores of layer 0 must be float32 \[heads, head_dim\], finite"):
            Calibration({0: bad}, {}, 1)
    with pytest.raises(ValueError, match="calibration must be None where key_columns is 1 and allocate_bits False"):
        LogQuantConfig(bits=4, calibration=calibration)
    with pytest.raises(ValueError, match="calibration must be a Calibration, the path of its file, or None, got 3"):
        LogQuantConfig(calibration=3)


# --------------------------------------------------------------------------------------------------------- command line
def test_the_command_writes_what_caches_take(tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model")
    texts = [tmp_path / name for name in ("a.txt", "b.txt")]
    for text, words in zip(texts, ("a tale of two cities ", "bleak house "), strict=True):
        text.write_text(words * 30)
    runner = CliRunner(env={"COLUMNS": "200"})
    output = tmp_path / "made.safetensors"
    args = ["calibrate", *map(str, texts), "--model", str(model), "--output", str(output), "--tokens", "400"]
    result = runner.invoke(app, [*args, "--json", str(tmp_path / "json")], catch_exceptions=False)
    assert result.exit_code == 0 and f"{output}: 760 tokens" in result.output
    assert json.loads((tmp_path / "json").read_text())["layers"] == [0, 1]
    assert Calibration.load(output).tokens == 760
    caches = f"logquant:key_columns=1.5,calibration={output},full"
    args = ["eval", *map(str, texts), "--model", str(model), "--caches", caches, "--prefill", "200", "--tokens", "40"]
    result = runner.invoke(app, [*args, "--json", str(tmp_path / "json")], catch_exceptions=False)
    assert result.exit_code == 0 and "full" in result.output
    result = runner.invoke(app, ["calibrate", str(texts[0]), "--output", str(tmp_path / "no" / "where")])
    assert result.exit_code == 2 and "there is no directory" in result.output
