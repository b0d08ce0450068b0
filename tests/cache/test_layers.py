"""The setting ``layers``: some layers have settings of their own, and nothing else is different."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.layers_spec import LayersSpec
from logquant.methods.registry import parse_cache
from tests.helpers.layers import contents, random_tokens
from tests.helpers.masks import pad_mask
from tests.helpers.models import family_config, generate, logits_of, tiny_model

SETTING = "1-2(key_columns=1.5;fine_values=8)"
CHANGED = {"key_columns": 1.5, "fine_values": 8}
LAYERS = 4


@pytest.fixture(scope="module")
def model():
    made = tiny_model(num_hidden_layers=LAYERS)
    made.set_attn_implementation("logquant")
    return made


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 255, (2, 400), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("middle(key_columns=1.5;fine_values=8)", LayersSpec("middle", key_columns=1.5, fine_values=8)),
        ("10(key_bits=4)", LayersSpec("10", key_bits=4)),
        ("0-3( value_bits=8; key_bits=4 )", LayersSpec("0-3", key_bits=4, value_bits=8)),
    ],
)
def test_settings_are_read(text, spec):
    assert LayersSpec.parse(text) == spec
    assert parse_cache(f"logquant:layers={text}").quantization == LogQuantConfig(layers=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outer(key_bits=4)", "layers must be 'middle', a number, or two as in '10-24', got 'outer'"),
        ("24-10(key_bits=4)", "layers must be 'middle', a number, or two as in '10-24', got '24-10'"),
        ("-1(key_bits=4)", "layers must be 'middle', a number, or two as in '10-24', got '-1'"),
        ("middle", "layers must say what they change, one of key_bits, value_bits, key_columns, fine_values, got"),
        ("middle(window=64)", "a setting of layers must be one of key_bits, value_bits, key_columns, fine_values, got"),
        ("middle(fine_values=1.5)", "fine_values of layers must be a whole number, got '1.5'"),
        ("middle(key_bits=3)", "key_bits must be 2, 4 or 8, got 3, in layers='middle(key_bits=3)'"),
        ("middle(fine_values=8;value_bits=4)", "fine_values must be 0, or 4 or 8 with rule 'attention'"),
        ("middle(key_columns=5)", "key_columns must be a number above 0, up to 4 (8 / key_bits), got 5.0"),
    ],
)
def test_bad_settings_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LogQuantConfig(layers=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "log"}, "fine_values must be 0, or 4 or 8 with rule 'attention'"),
        ({"prune": "keydiff"}, "fine_values must be 0 with prune"),
        ({"channels": "think"}, "key_columns must be None with channels"),
        ({"layers": 3}, "layers must be a text or None, got 3"),
        (
            {"layers": "middle(value_bits=4)", "prune": "keydiff(bytes=4096)"},
            "prune must be given as a share or in tokens with layers, whose pages differ in bytes, got 'keydiff(",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LogQuantConfig(**{"layers": SETTING} | options)


def test_a_head_dimension_that_the_layers_cannot_hold():
    config = tiny_model(head_dim=48, num_hidden_layers=LAYERS).config
    LogQuantCache(config)
    with pytest.raises(ValueError, match="fine_values"):
        LogQuantCache(config, layers="middle(fine_values=4)")


@given(count=st.integers(1, 200))
def test_the_middle_is_from_a_quarter_to_five_sixths(count):
    spec = LayersSpec("middle", key_bits=4)
    layers = [i for i in range(count) if spec.has(i, count)]
    assert layers == list(range(-(-count // 4), -(-5 * count // 6)))


def test_layers_by_number():
    config = LogQuantConfig(layers="10-24(value_bits=4)")
    assert [i for i in range(30) if config.of_layer(i, 30).value_bits == 4] == list(range(10, 25))
    with pytest.raises(ValueError, match="layers must be of a model's 24, from 0 to 23, got '10-24'"):
        config.of_layer(7, 24)
    assert LogQuantConfig(layers="3(value_bits=4)").of_layer(3, 8) == LogQuantConfig(value_bits=4)


def test_keys_of_other_bits_have_the_columns_of_those():
    def columns(layers, **options):
        return LogQuantConfig(layers=layers, **options).of_layer(0, 1).key_columns

    assert columns("0(key_bits=4)") == LogQuantConfig(key_bits=4).key_columns == 1
    assert columns("0(key_bits=2)", bits=4) == LogQuantConfig().key_columns == 1.25
    assert columns("0(key_bits=4;key_columns=1.5)") == 1.5
    assert columns("0(key_bits=2)", key_columns=2) == 2, "they are of as many bits as the others"
    assert columns("0(key_bits=4)", channels="think(ratio=0.5)") == 0.5


def test_what_is_said_to_fine_holds_in_all_layers():
    middle = "middle(key_columns=1.5;fine_values=8)"
    assert LogQuantConfig.fine(window=128) == LogQuantConfig(window=128, layers=middle)
    assert LogQuantConfig.fine(key_columns=2) == LogQuantConfig(key_columns=2, layers="middle(fine_values=8)")
    assert LogQuantConfig.fine(key_bits=8) == LogQuantConfig(key_bits=8, layers="middle(fine_values=8)")
    assert LogQuantConfig.fine(fine_values=4) == LogQuantConfig(fine_values=4, layers="middle(key_columns=1.5)")
    assert LogQuantConfig.fine(fine_values=0, bits=4) == LogQuantConfig(bits=4)
    assert LogQuantConfig.fine(layers=None) == LogQuantConfig()
    assert LogQuantConfig.fine(channels="think").of_layer(1, 2).key_columns == 0.6


def test_layers_without_full_attention_may_be_of_any_dimension():
    config = family_config("gemma3_text")  # heads of 16 channels, which hold no fine values; layer 2 alone is full
    LogQuantCache(config, layers="0-1(fine_values=8)")
    with pytest.raises(ValueError, match="fine_values must be 0 but"):
        LogQuantCache(config, layers="2(fine_values=8)")


@pytest.mark.parametrize("options", [{}, {"max_length": 640}, {"recall": "both(pages=0.5;skip=0)"}], ids=str)
@pytest.mark.parametrize(
    ("layers", "changes"),
    [
        (SETTING, CHANGED),
        ("1-2(key_bits=4;value_bits=8)", {"key_bits": 4, "value_bits": 8}),
    ],
)
def test_a_layer_holds_what_it_holds_where_all_have_its_settings(model, layers, changes, options):
    mixed, plain, changed = (LogQuantCache(model.config, **options | own) for own in ({"layers": layers}, {}, changes))
    k, v = random_tokens(600, heads=2 * LAYERS, dim=32, value_dim=32)
    q = torch.randn(1, 4 * LAYERS, 600, 32, generator=torch.Generator().manual_seed(1))
    tokens = [[x.chunk(LAYERS, 1)[i] for x in (q, k, v)] for i in range(LAYERS)]

    def fed(cache) -> list[list[Tensor]]:
        """Of each layer what it says last, and what it holds."""
        for first, last in ((0, 500), *((t, t + 1) for t in range(500, 600))):
            outs = []
            for i, of_layer in enumerate(tokens):
                q, k, v = (x[:, :, first:last] for x in of_layer)
                keys, _ = cache.update(k, v, i)
                outs.append(keys.kv_view.attend(AttentionCall(q, None, 32**-0.5)))
        return [[out, *contents(layer)] for out, layer in zip(outs, cache.layers, strict=True)]

    got, as_plain, as_changed = map(fed, (mixed, plain, changed))
    for i, want in enumerate([as_plain[0], *as_changed[1:3], as_plain[3]]):
        assert all(torch.equal(*pair) for pair in zip(got[i], want, strict=True)), i
    assert got[1][1].shape != as_plain[1][1].shape


def test_a_model_of_fixed_size_decodes_as_one_that_grows(model, ids):
    fixed, grows = (LogQuantCache(model.config, layers=SETTING, max_length=n) for n in (512, None))
    steps = [250, *[1] * 100]
    got, want = (logits_of(model, cache, ids[:1, :350], steps, "logquant") for cache in (fixed, grows))
    assert torch.allclose(got, want, atol=1e-3 * float(want.abs().max()))
    check_layers_differ(fixed)


def test_rows_of_a_padded_batch_are_as_if_alone(model, ids):
    mask = pad_mask([300, 211], "left")
    cache = LogQuantCache(model.config, layers=SETTING)
    batch = generate(model, ids[:, :300], cache, attention_mask=mask)
    check_layers_differ(cache)
    for row, real in enumerate(mask.bool()):
        alone = generate(model, ids[row : row + 1, :300][:, real], LogQuantCache(model.config, layers=SETTING))
        assert torch.equal(batch[row, 300:], alone[0, int(real.sum()) :])


def test_beams_follow_their_rows(model, ids):
    order = torch.tensor([1, 0, 1])
    taken, fed = (LogQuantCache(model.config, layers=SETTING) for _ in range(2))
    logits_of(model, taken, ids, [300, *[1] * 20], "logquant")
    taken.reorder_cache(order)
    logits_of(model, fed, ids[order], [300, *[1] * 20], "logquant")
    check_layers_differ(taken)
    got, want = (logits_of(model, cache, ids[order, 320:], [1] * 70, "logquant") for cache in (taken, fed))
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))


def test_cropped_and_copied_it_goes_on_as_before(model, ids):
    cache = LogQuantCache(model.config, layers=SETTING)
    logits_of(model, cache, ids[:1], [300, *[1] * 40], "logquant")
    check_layers_differ(twin := copy.deepcopy(cache))
    wants = logits_of(model, cache, ids[:1, 340:], [1] * 40, "logquant")
    logits_of(model, twin, ids[1:, 340:], [3], "logquant")
    twin.crop(-3)
    got = logits_of(model, twin, ids[:1, 340:], [1] * 40, "logquant")
    assert torch.allclose(got, wants, atol=1e-4 * float(wants.abs().max()))


def test_stores_are_made_together_for_layers_with_the_same_settings(model):
    cache = LogQuantCache(model.config, layers=SETTING)
    for _ in range(2):
        left = []
        for i in range(LAYERS):
            k, v = random_tokens(500, dim=32, value_dim=32, seed=i)
            keys, _ = cache.update(k, v, i)
            keys.kv_view.attend(AttentionCall(torch.cat([k, k], 1), None, 1.0))
            left.append(len(cache._shared.allocator._stores))
        assert left == [0, 1, 0, 0]
        check_layers_differ(cache)
        cache.reset()


def check_layers_differ(cache: LogQuantCache) -> None:
    """The layers that :data:`SETTING` names have larger pages than the others, and hold some."""
    words = [layer.held.storage.pages.shape[3] for layer in cache.layers]
    assert words[0] == words[3] < words[1] == words[2] and all(layer.rows.packed for layer in cache.layers)


def test_the_report_tells_the_bytes_of_each_layer(model, ids):
    cache = LogQuantCache(model.config, layers=SETTING)
    logits_of(model, cache, ids, [400], "logquant")
    held = [layer.nbytes for layer in cache.report()]
    assert held[0] == held[3] < held[1] == held[2]
