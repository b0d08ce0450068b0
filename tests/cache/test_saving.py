"""Saving and loading: what comes back is what was saved, and what does not fit is refused."""

from __future__ import annotations

import copy
import json
import pickle
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from logquant import LogQuantCache
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from tests.helpers.layers import contents
from tests.helpers.masks import pad_mask
from tests.helpers.models import family_config, generate, logits_of, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, 400), generator=torch.Generator().manual_seed(0))


def filled(model, ids, **options) -> LogQuantCache:
    cache = LogQuantCache(model.config, **options)
    mask = pad_mask([300, 211], "left")
    with torch.no_grad():
        model(ids[:, :300], attention_mask=mask, **as_argument(cache))
    return cache


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 4, "rule": "recent", "window": 32},
        {"key_bits": 8},
        {"rule": "log"},
        {"recall": "both(skip=1)"},
        {"layers": "middle(key_bits=4;fine_values=8)"},
    ],
    ids=str,
)
def test_a_loaded_cache_is_the_saved_one(model, ids, tmp_path, options):
    cache = filled(model, ids, **options)
    cache.save(tmp_path / "cache", model)
    loaded = LogQuantCache.load(tmp_path / "cache", model)
    assert loaded.quantization == cache.quantization
    assert ("layers" in options) == (cache.layers[0].format != cache.layers[1].format)
    mask = torch.cat([pad_mask([300, 211], "left"), torch.ones(2, 100, dtype=torch.long)], 1)
    for layer, want in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(layer.held.layout.positions(ids.device), want.held.layout.positions(ids.device))
        assert all(torch.equal(a, b) for a, b in zip(layer.dense(), want.dense(), strict=True))
    outputs = [generate(model, ids, c, attention_mask=mask) for c in (cache, loaded)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("rule", ["log", "attention"])
def test_a_loaded_cache_is_cropped_as_the_saved_one(model, ids, tmp_path, rule):
    """Also to a length at which it needs more exact tokens than a file holds."""
    cache = filled(model, ids, rule=rule)
    cache.save(tmp_path / "cache", model)
    loaded = LogQuantCache.load(tmp_path / "cache", model)
    for each in (cache, loaded):
        each.crop(-45)
    for layer, want in zip(loaded.layers, cache.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.dense(), want.dense(), strict=True))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "lfm2", "qwen3_next"])
def test_layers_of_other_kinds_are_saved_too(tmp_path, family, ids):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family)).eval()
    cache = LogQuantCache(model.config)
    logits_of(model, cache, ids[:1], [250, 1], "eager")
    cache.save(tmp_path / "cache")
    loaded = LogQuantCache.load(tmp_path / "cache", model.config)
    outputs = [logits_of(model, c, ids[:1, 251:], [1] * 20, "eager") for c in (cache, loaded)]
    assert torch.equal(*outputs)


def test_an_empty_cache_and_one_that_was_reset(model, tmp_path, ids):
    cache = filled(model, ids)
    cache.reset()
    for c in (cache, LogQuantCache(model.config)):
        c.save(tmp_path / "cache")
        assert LogQuantCache.load(tmp_path / "cache", model).get_seq_length() == 0


def test_the_file_is_safetensors_and_describes_itself(model, ids, tmp_path):
    cache = filled(model, ids)
    cache.save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", "pt") as file:
        described = json.loads(file.metadata()["logquant_cache"])
        assert {"layers.0.pages", "layers.0.window_k", "layers.1.window_v", "real"} <= set(file.keys())
    assert described["version"] == 1 and described["settings"]["bits"] == 2
    used = sum(t.nbytes for layer in cache.layers for t in contents(layer))
    used += sum(layer.held.advice.queries.nbytes + layer.held.chosen.nbytes for layer in cache.layers)
    assert used < (tmp_path / "cache").stat().st_size < used + 10_000


@pytest.mark.parametrize("change", [{"rope_theta": 5000.0}, {"num_hidden_layers": 3}, {"head_dim": 64}], ids=str)
def test_another_model_is_refused(model, ids, tmp_path, change):
    filled(model, ids).save(tmp_path / "cache")
    changed = copy.deepcopy(model.config)
    if "rope_theta" in change:
        changed.rope_parameters = changed.rope_parameters | change
    else:
        changed.update(change)
    with pytest.raises(ValueError, match="was made by another model: its config differs"):
        LogQuantCache.load(tmp_path / "cache", changed)


def test_other_weights_are_refused_where_they_are_known(model, ids, tmp_path):
    filled(model, ids).save(tmp_path / "cache", model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="was made by another model: its weights differs"):
        LogQuantCache.load(tmp_path / "cache", other)
    assert LogQuantCache.load(tmp_path / "cache", other.config).get_seq_length() == 300


def rewritten(path, **described) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = json.loads(metadata["logquant_cache"]) | described
    save_file(load_file(path), path, {"logquant_cache": json.dumps(changed)})


DAMAGES = [
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged or no safetensors file"),
    (lambda path: path.write_bytes(path.read_bytes()[:20]), "is damaged or no safetensors file"),
    (lambda path: path.write_bytes(b""), "is damaged or no safetensors file"),
    (lambda path: path.write_bytes(b"\xff" * 1000), "is damaged or no safetensors file"),
    (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x55" * 9), "its contents are not those that were saved"),
    (lambda path: save_file(load_file(path), path), "holds no LogQuant cache"),
    (lambda path: save_file(load_file(path), path, {"logquant_cache": "["}), "its description cannot be read"),
    (lambda path: rewritten(path, version=2), "has version 2 of the file format; this logquant reads version 1"),
    (lambda path: rewritten(path, rows={"columns": 7, "slots": [[7, 7]]}), "are not those that were saved"),
    (lambda path: rewritten(path, settings={"window": 32}), "are not those that were saved"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_damaged_file_is_refused(model, ids, tmp_path, damage, message):
    path = tmp_path / "cache"
    filled(model, ids).save(path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        LogQuantCache.load(path, model)


def test_no_file(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing"):
        LogQuantCache.load(tmp_path / "nothing", model)


def test_a_full_disk_leaves_the_old_file_and_the_cache(model, ids, tmp_path):
    path, cache = tmp_path / "cache", filled(model, ids)
    cache.save(path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written|File too large"):
            cache.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["cache"]
    cache.save(path)
    assert path.read_bytes() == old


def test_a_cache_pickles_as_tensors_do(model, ids):
    cache = filled(model, ids)
    twin = pickle.loads(pickle.dumps(cache))
    mask = torch.cat([pad_mask([300, 211], "left"), torch.ones(2, 100, dtype=torch.long)], 1)
    assert torch.equal(*(generate(model, ids, c, attention_mask=mask) for c in (cache, twin)))


def test_moving_to_a_device_moves_every_tensor(model, ids):
    torch.manual_seed(0)
    gemma = AutoModelForCausalLM.from_config(family_config("gemma2")).eval()
    cache = LogQuantCache(gemma.config)
    logits_of(gemma, cache, ids, [250, 1], "eager")
    assert cache.to("cpu") is cache
    moved = copy.deepcopy(cache).to("meta")
    for layer in moved.layers:
        if not isinstance(layer, LogQuantLayer):
            tensors = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        else:
            storage, queries = layer.held.storage, layer.held.advice.queries
            held = [storage.window_k, storage.window_v, storage.pages, layer.held.advice.key_map]
            tensors = [t for t in (*held, queries and queries.query) if t is not None]
        assert len(tensors) >= 3 and all(t.device.type == "meta" for t in tensors)
        assert layer.device.type == "meta"


def test_offloaded_pages_come_back_for_the_next_eviction(model, ids):
    """What ``Cache(offloading=True)`` does on a GPU: to the CPU after a layer's update, back before its next one."""
    caches = [LogQuantCache(model.config) for _ in range(2)]
    for step in [300, *[1] * 80]:
        first = caches[0].get_seq_length()
        for cache in caches:
            with torch.no_grad():
                model(ids[:, first : first + step], **as_argument(cache))
        for layer in caches[0].layers:
            layer.prefetch()
            layer.offload()
    for layer, want in zip(*(c.layers for c in caches), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.dense(), want.dense(), strict=True))


def test_report(model, ids):
    cache = filled(model, ids, bits=2)
    lines = cache.report()
    assert [line.layer for line in lines] == [0, 1] and {line.kind for line in lines} == {"LogQuantLayer"}
    assert all(line.exact + line.packed == 300 + 211 for line in lines)
    assert [line.packed for line in lines] == [sum(s.packed for s in layer.rows.slots) for layer in cache.layers]
    assert sum(line.nbytes for line in lines) == sum(layer.nbytes for layer in cache.layers)
    layer = cache.layers[0]
    assert lines[0].bits_per_element == 8 * layer.nbytes / (511 * 2 * 64)
