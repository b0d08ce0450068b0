"""ThinK: the channels kept are those of its paper, pages are smaller for it, and all else is as it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor

from logquant import LogQuantCache, LogQuantConfig
from logquant.cache.sizes import head_nbytes
from logquant.channels_spec import ChannelsSpec
from logquant.compat import as_argument
from logquant.methods.registry import parse_cache, parse_caches
from logquant.quantizer import think
from logquant.quantizer.calibration import Calibration
from tests.helpers.masks import pad_mask
from tests.helpers.models import generate, logits_of, tiny_model
from tests.helpers.prompts import Prompt, record_prompts

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 500


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 255, (2, TOKENS + 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompts(monkeypatch) -> list[Prompt]:
    return record_prompts(monkeypatch)


def kept(q: Tensor, k: Tensor, drop: int) -> Tensor:
    """The paper's rule, bool ``[B, H, D]``: ``drop`` channels go, the least by mean q^2 (32 queries) times mean k^2."""
    heads = k.shape[1]
    score = q[:, :, -32:].square().mean(2).unflatten(1, (heads, -1)).mean(2) * k.square().mean(2)
    least = score.topk(drop, -1, largest=False).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, least, False)


def channels(key_map: Tensor, dim: int) -> Tensor:
    """Those that have a column, bool ``[B, H, D]``; each has one."""
    assert (key_map % 4 == 0).all()
    found = torch.zeros(*key_map.shape[:2], dim, dtype=torch.bool)
    return found.scatter_(-1, key_map.long() // 4, True)


@pytest.mark.parametrize("rule", ["log", "attention"])
def test_every_layer_and_head_keeps_the_channels_of_the_paper(prompts, ids, rule):
    model = tiny_model(num_hidden_layers=3, num_attention_heads=8)
    cache = LogQuantCache(model.config, rule=rule, channels="think(ratio=0.5)")
    logits_of(model, cache, ids, [TOKENS], "logquant")
    assert len(prompts) == 3
    for layer, prompt in zip(cache.layers, prompts, strict=True):
        assert layer.format.key_columns == 16
        assert torch.equal(channels(layer.held.advice.key_map, 32), kept(prompt.queries, prompt.keys, 16))


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "drop"), [(0.25, 16), (0.4, 32)])
def test_so_does_a_real_model(smollm2, smollm2_tokenizer, data_dir, prompts, ratio, drop):
    text = (data_dir / "dev/books/frankenstein_84.txt").read_text()[:8000]
    ids = smollm2_tokenizer(text, return_tensors="pt").input_ids[:, :1000]
    cache = LogQuantCache(smollm2.config, rule="recent", channels=f"think(ratio={ratio})")
    logits_of(smollm2, cache, ids, [1000], "logquant")
    assert len(prompts) == smollm2.config.num_hidden_layers
    for layer, prompt in zip(cache.layers, prompts, strict=True):
        assert torch.equal(channels(layer.held.advice.key_map, 64), kept(prompt.queries, prompt.keys, drop))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kept_channels_and_values_are_held_as_ever_and_dropped_ones_at_one_level(ids, bits):
    """Min-max pages of keys treat each channel by itself, so nothing but the columns that are not there differs."""
    model, caches = tiny_model(), []
    for options in ({}, {"channels": "think(ratio=0.5)"}):
        plain = {"rule": "recent", "param_bits": 16, "key_columns": None if options else 1.0}
        caches.append(LogQuantCache(model.config, bits=bits, **plain | options))
        logits_of(model, caches[-1], ids, [TOKENS], "logquant")
    for plain, thin in zip(caches[0].layers, caches[1].layers, strict=True):
        (k, v), (thin_k, thin_v) = plain.dense(), thin.dense()
        assert torch.equal(v, thin_v)
        packed = slice(4, 4 + plain.rows.packed)
        keeps = channels(thin.held.advice.key_map, 32)[:, :, None]
        assert torch.equal(k.where(keeps, torch.zeros(())), thin_k.where(keeps, k * 0))
        pages = thin_k[:, :, packed].unflatten(2, (-1, 64))
        same = (pages == pages[:, :, :, :1]).all(3)
        assert same[(~keeps).expand_as(same)].all()
        others = torch.ones(k.shape[2], dtype=torch.bool)
        others[packed] = False
        assert torch.equal(k[:, :, others], thin_k[:, :, others])


def test_until_something_is_packed_nothing_changes(ids):
    model, outputs = tiny_model(), []
    for channels in (None, "think"):
        cache = LogQuantCache(model.config, channels=channels)
        outputs.append(logits_of(model, cache, ids[:, :195], [150, *[1] * 45], "logquant"))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_keeps_what_it_keeps_alone(prompts, ids, side):
    model, lengths = tiny_model(num_hidden_layers=1), [TOKENS, 333]
    cache = LogQuantCache(model.config, rule="log", channels="think(ratio=0.5)")
    logits_of(model, cache, ids, [TOKENS], "logquant", pad_mask(lengths, side))
    got = channels(cache.layers[0].held.advice.key_map, 32)
    for row in range(2):
        alone = prompts[0].row(row)
        assert alone.keys.shape[2] == lengths[row]
        assert torch.equal(got[row : row + 1], kept(alone.queries, alone.keys, 16))


def test_a_short_prompt_chooses_when_its_first_page_is_made(ids):
    model = tiny_model(num_hidden_layers=1)
    cache = LogQuantCache(model.config, rule="recent", channels="think(ratio=0.5)")
    layer = cache.layers[0]
    logits_of(model, cache, ids, [100, *[1] * 96], "logquant")
    assert layer.rows.packed == 0
    # The 196th token takes its place with the next one: a page is made then.
    keys, queries = layer.dense()[0], [layer.held.advice.queries.query, layer.uncommitted.call.query]
    cache.commit()
    assert layer.rows.packed == 64
    assert torch.equal(channels(layer.held.advice.key_map, 32), kept(torch.cat(queries, 2), keys, 16))


def test_bytes_fall_by_the_columns(ids):
    model, held = tiny_model(), {}
    for ratio in (None, 0.5):
        config = LogQuantConfig(bits=4, rule="recent", channels=ratio and f"think(ratio={ratio})")
        cache = LogQuantCache(model.config, config)
        logits_of(model, cache, ids, [TOKENS], "logquant")
        held[ratio] = cache.nbytes
        # Two layers, two rows, two KV heads.
        assert cache.nbytes == 8 * head_nbytes(config, TOKENS, 32, itemsize=4, query_heads=2)
    pages = (TOKENS - 4) // 64 - 2
    # 16 columns of 64 tokens and 4 bits in each page; a map of 16 columns.
    assert held[None] - held[0.5] == 8 * (pages * 16 * 64 * 4 // 8 - 2 * 16)


def test_beams_copies_and_files(ids, tmp_path):
    model = tiny_model()
    cache = LogQuantCache(model.config, channels="think(ratio=0.5)")
    logits_of(model, cache, ids, [TOKENS], "logquant")
    cache.save(tmp_path / "cache")
    twin, loaded = copy.deepcopy(cache), LogQuantCache.load(tmp_path / "cache", model)
    assert loaded.quantization == cache.quantization
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    later, steps = ids[:, TOKENS:], [1] * 60
    model.set_attn_implementation("logquant")

    def go_on(cache: LogQuantCache, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part, **as_argument(cache)).logits for part in ids.split(1, 1)], 1)

    assert later.shape[1] == len(steps)
    want = go_on(cache, later)
    assert torch.equal(want, go_on(twin, later)) and torch.equal(want, go_on(loaded, later))
    assert torch.allclose(want, go_on(swapped, later.flip(0)).flip(0), atol=1e-4)


def test_generation_and_recall_go_along(ids):
    model = tiny_model(num_hidden_layers=3)
    model.set_attn_implementation("logquant")
    prompt = ids[:1, :30].repeat(1, 20)
    options = {"channels": "think(ratio=0.5)", "recall": "both(pages=0.4;skip=0)"}
    outputs = [
        generate(model, prompt, LogQuantCache(model.config, **options), **how)
        for how in ({}, {"prompt_lookup_num_tokens": 4})
    ]
    assert torch.equal(*outputs)


def test_scores_of_what_is_no_number_count_nothing():
    fmt = LogQuantConfig(channels="think(ratio=0.5)").page_format(32)
    scores = torch.arange(32.0).expand(1, 1, -1).clone()
    scores[..., 20] = torch.nan
    assert (think.column_map(scores, fmt) // 4).flatten().tolist() == [15, 16, 17, 18, 19, *range(21, 32)]


# ------------------------------------------------------------------------------------------------------- settings
def test_settings_are_read():
    (cache,) = parse_caches("recent:bits=4,channels=think(ratio=0.25)")
    assert cache.quantization == LogQuantConfig(rule="recent", bits=4, channels="think(ratio=0.25)")
    assert cache.quantization.key_columns == 0.75
    assert LogQuantConfig(channels="think").page_format(128).key_columns == 80
    assert [ChannelsSpec(ratio=r).columns(64) for r in (0.25, 0.4, 0.5, 0.9)] == [48, 32, 32, 16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("channels=random", "rule of channels must be 'think', got 'random'"),
        ("channels=think(ratio=0)", "ratio of channels must be a share above 0, below 1, got 0.0"),
        ("channels=think(ratio=nan)", "ratio of channels must be a share above 0, below 1, got nan"),
        ("channels=think(ratio=x)", "ratio of channels must be a number, got 'x'"),
        ("channels=think(share=0.5)", "a setting of channels must be one of ratio, got share"),
        ("channels=think,key_columns=0.5", "key_columns must be None with channels, which says how many there are"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_cache(f"logquant:{settings}")


def test_what_drops_nothing_or_is_calibrated_is_refused():
    with pytest.raises(ValueError, match="ratio of channels must leave less than 32 channels when rounded"):
        LogQuantCache(tiny_model().config, channels="think(ratio=0.2)")
    with pytest.raises(ValueError, match="calibration must be None with channels"):
        LogQuantConfig(channels="think", calibration=Calibration({}, {}, 0))
