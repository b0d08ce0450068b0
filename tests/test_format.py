"""The page: packing, quantising and dequantising, on the reference that defines them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logquant.format import BITS, PARAM_BITS, PageFormat
from logquant.ops import reference
from logquant.ops.reference import words
from logquant.ops.reference.hadamard import hadamard
from logquant.ops.reference.words import pack_words, unpack_words
from tests.helpers.strategies import column_map, formats, tokens


@given(bits=st.sampled_from(BITS), seed=st.integers(0, 2**31), words=st.integers(1, 9))
def test_packing_round_trip(bits, seed, words):
    codes = torch.randint(0, 2**bits, (3, words * 32 // bits), generator=torch.Generator().manual_seed(seed))
    packed = pack_words(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (3, words)
    assert torch.equal(unpack_words(packed, bits), codes.int())


@pytest.mark.parametrize("bits", BITS)
def test_elements_pair_up_in_the_halves_of_a_word(bits):
    """(word >> bits * i) & mask gives elements 2i and 2i + 1 as two 16-bit lanes (csrc/format.h)."""
    codes = torch.arange(32 // bits) % 2**bits
    word = pack_words(codes, bits).item()
    for i in range(16 // bits):
        lanes = (word >> (bits * i)) & ((2**bits - 1) * 0x00010001)
        assert (lanes & 0xFFFF, lanes >> 16) == (codes[2 * i], codes[2 * i + 1])


def test_size_of_the_common_page():
    fmt = PageFormat(128)
    assert (fmt.words, fmt.nbytes, fmt.bits_per_element) == (1280, 5120, 2.5)


@given(fmt=formats(searched=False), seed=st.integers(0, 2**31))
def test_error_of_a_round_trip_is_at_most_half_a_step(fmt, seed):
    k, v = tokens(fmt, seed, batch=1, heads=2, count=2 * fmt.page_tokens)
    key_map = column_map(fmt, seed, batch=1, heads=2)
    keys, values = reference.dequantize(reference.quantize(k, v, fmt, key_map=key_map), fmt, key_map=key_map)
    columns = torch.zeros(1, 2, fmt.head_dim).scatter_add_(-1, (key_map >> 2).long(), torch.ones(key_map.shape))
    levels = (2 ** (fmt.key_bits * columns) - 1).unsqueeze(2)
    pages = k.unflatten(2, (-1, fmt.page_tokens))
    spread = (pages.amax(3) - pages.amin(3)).repeat_interleave(fmt.page_tokens, 2)
    # fp16 rounding of scale and zero comes on top of half a step; a channel without columns is its mean.
    rounding = 2e-3 * (spread + k.abs())
    assert ((keys - k).abs() <= spread / levels.clamp_min(1) * torch.where(levels > 0, 0.5, 1.0) + rounding).all()
    groups = v.unflatten(3, (-1, fmt.value_group))
    spread = (groups.amax(4) - groups.amin(4)).repeat_interleave(fmt.value_group, 3)
    assert ((values - v).abs() <= spread / (2**fmt.value_bits - 1) * 0.5 + 2e-3 * (spread + v.abs())).all()


def test_quantised_values_are_fixed_points():
    """What a page stands for quantises to the same page: nothing drifts if tokens pass through twice."""
    fmt = PageFormat(64)
    k, v = (torch.randint(0, 4, (1, 2, 64, 64)).float() * 0.5 - 1 for _ in range(2))
    pages = reference.quantize(k, v, fmt)
    assert torch.equal(reference.quantize(*reference.dequantize(pages, fmt), fmt), pages)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("param_bits", PARAM_BITS)
def test_a_non_finite_element_makes_its_group_nan_and_nothing_else(poison, param_bits):
    fmt = PageFormat(64, value_group=32, key_param_bits=param_bits, value_param_bits=param_bits)
    k, v = torch.randn(1, 1, 128, 64), torch.randn(1, 1, 128, 64)
    k[0, 0, 70, 5] = poison
    v[0, 0, 70, 5] = poison
    keys, values = reference.dequantize(reference.quantize(k, v, fmt), fmt)
    expected = torch.zeros(1, 1, 128, 64, dtype=torch.bool)
    expected[0, 0, 64:, 5] = True
    assert torch.equal(keys.isnan(), expected)
    expected.zero_()[0, 0, 70, :32] = True
    assert torch.equal(values.isnan(), expected)


def test_parameters_saturate():
    fmt = PageFormat(16)
    k = torch.full((1, 1, 64, 16), 1e6)
    k[:, :, ::2] = -1e6
    keys, _ = reference.dequantize(reference.quantize(k, k, fmt), fmt)
    assert keys.isfinite().all()
    assert keys.min() == -65504 and keys.max() == -65504 + 3 * 65504


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(head_dim=100), "head_dim must be a multiple of 16 up to 1024, got 100"),
        (dict(head_dim=0), "head_dim must be a multiple of 16"),
        (dict(head_dim=64, value_dim=2048), "value_dim must be a multiple of 16 up to 1024, got 2048"),
        (dict(head_dim=64, page_tokens=48), "page_tokens must be 32, 64 or 128, got 48"),
        (dict(head_dim=64, key_bits=3), "key_bits must be 2, 4 or 8, got 3"),
        (dict(head_dim=64, value_bits=16), "value_bits must be 2, 4 or 8, got 16"),
        (dict(head_dim=64, key_columns=24), "key_columns must be a multiple of 16 up to 256, got 24"),
        (dict(head_dim=64, key_bits=8, key_columns=80), "key_columns must be a multiple of 16 up to 64, got 80"),
        (
            dict(head_dim=64, value_group=24),
            r"value_group must be a multiple of 16 that divides value_dim \(64\), got 24",
        ),
        (dict(head_dim=64, value_group=48), "value_group must be a multiple of 16"),
        (dict(head_dim=64, fine_values=8), "fine_values must be 0 but with .* value_param_bits 8"),
        (dict(head_dim=64, value_param_bits=8, fine_values=16), "fine_values must be 0, 4 or 8, got 16"),
        (dict(head_dim=64, value_param_bits=8, page_tokens=32, fine_values=4), "0 but with page_tokens 64"),
        (dict(head_dim=64, value_param_bits=8, value_bits=4, fine_values=8), "0 but with .* value_bits 2"),
        (dict(head_dim=80, value_param_bits=8, fine_values=8), "a value_group that is a multiple of 32, got 8"),
        (dict(head_dim=96, value_param_bits=8, fine_values=4), "0 or 8 unless value_dim is a multiple of 64, got 4"),
    ],
)
def test_bad_formats(fields, message):
    with pytest.raises(ValueError, match=message):
        PageFormat(**fields)


@given(fmt=formats(), seed=st.integers(0, 2**31), weighted=st.booleans())
def test_searched_parameters_lose_less_than_the_range_does(fmt, seed, weighted):
    """The search starts from the range of the elements, so it never ends with a larger weighted error."""
    searched = dataclasses.replace(fmt, key_param_bits=8, value_param_bits=8)
    k, v = tokens(fmt, seed, batch=1, heads=2, count=2 * fmt.page_tokens)
    key_map = column_map(fmt, seed, batch=1, heads=2)
    weights = torch.rand(1, 2, 2 * fmt.page_tokens, generator=torch.Generator().manual_seed(seed)) + 0.1
    options = {"key_weights": weights} if weighted else {}
    keys, values = reference.dequantize(
        reference.quantize(k, v, searched, key_map=key_map, **options), searched, key_map=key_map
    )
    loss = ((keys - k) ** 2 * (weights[..., None] if weighted else 1)).unflatten(2, (-1, fmt.page_tokens)).sum(3)

    columns = torch.zeros(1, 2, fmt.head_dim).scatter_add_(-1, (key_map >> 2).long(), torch.ones(key_map.shape))
    levels = (2 ** (fmt.key_bits * columns) - 1)[:, :, None, None]
    x = k.unflatten(2, (-1, fmt.page_tokens))
    low, high = x.amin(3, keepdim=True), x.amax(3, keepdim=True)
    # By up to half a step of the scale's byte and of the zero's; wider where the zero needs a larger scale.
    lift = 2 ** (fmt.key_bits * columns - 2).clamp_min(0)[:, :, None, None]
    scale = torch.maximum(
        (high - low) / levels.clamp_min(1) * 2 ** (1 / 16), low.abs() * (8 / 127) * 2 ** (1 / 8) / lift
    )
    step = scale / 2 + torch.relu(high - low - levels * scale) + scale * lift / 8
    bound = fmt.page_tokens * (step**2).squeeze(3) * (weights.max() if weighted else 1)
    has_columns = (levels > 0).squeeze(3).expand_as(loss)
    assert (loss <= bound)[has_columns].all()
    groups = v.unflatten(3, (-1, fmt.value_group)).abs()
    block = searched.hadamard_block
    step = groups.amax(4) * block**0.5 / (2**fmt.value_bits - 1) * 2 ** (3 / 16)
    error = ((values - v) ** 2).unflatten(3, (-1, fmt.value_group)).mean(4)
    assert (error <= 1.01 * step**2 + 1e-9).all()


@pytest.mark.parametrize(
    ("dim", "places"),
    [(64, (15, 31, 47, 63)), (192, (15, 31, 47, 63)), (96, (14, 15, 30, 31, 46, 47, 62, 63))],
)
def test_fine_values(dim, places):
    """Some tokens of a page lose 20 times less; the others are stored as without them, bit for bit."""
    plain = PageFormat(64, dim, value_group=min(dim, 96), value_param_bits=8)
    fine = dataclasses.replace(plain, fine_values=len(places))
    assert fine.fine_tokens == places and plain.fine_tokens == ()
    k, v = torch.randn(2, 3, 192, 64), torch.randn(2, 3, 192, dim)
    pages = {fmt: reference.quantize(k, v, fmt) for fmt in (plain, fine)}
    error = {
        fmt: (reference.dequantize(pages[fmt], fmt)[1] - v).square().unflatten(2, (-1, 64)).mean((0, 1, 2, 4))
        for fmt in (plain, fine)
    }
    has = torch.zeros(64, dtype=torch.bool)
    has[list(fine.fine_tokens)] = True
    assert torch.equal(error[plain][~has], error[fine][~has])
    assert (error[fine][has] < error[plain][has] / 8).all()


@pytest.mark.parametrize("count", [4, 8])
def test_where_fine_digits_lie(count):
    """A channel has a byte of a word for the last token of each row; for the one before, that two bytes below."""
    fmt = PageFormat(64, value_group=32, value_param_bits=8, fine_values=count)
    v = hadamard(torch.randint(0, 16, (64, 64)) - 7.5, 32)
    page = reference.quantize(torch.zeros(1, 1, 64, 64), v.view(1, 1, 64, 64), fmt)[0, 0, 0]
    low = unpack_words(page[fmt.key_code_words * 64 + 64 :][: 4 * 64].view(4, 64).t(), 2)
    n = 16 // count  # channels that share a word
    high = torch.empty(64, 4, count // 4, dtype=torch.int32)
    for c in range(64):
        word = page[-4 * count :][c // 16 // n * 16 + c % 16]
        for row in range(4):
            for token in range(count // 4):
                high[c, row, token] = word >> (8 * (c // 16 % n) + 2 * row + 16 * token) & 3
    high = high.flatten(1)
    codes = low[:, list(fmt.fine_tokens)] + 4 * high
    _, values = reference.dequantize(page.view(1, 1, 1, -1), fmt)
    rotated = hadamard(values[0, 0], 32)[list(fmt.fine_tokens)].unflatten(-1, (2, 32))
    scales = words.unpack_bytes(page[-4 * count - 32 :][:32].view(2, 16), signed=False)
    assert codes.max() > 12 and codes.min() < 3
    scale = words.byte_scale(scales)[:, list(fmt.fine_tokens)].t()
    assert torch.allclose(rotated / scale.unsqueeze(-1) + 7.5, codes.t().float().unflatten(-1, (2, 32)), atol=1e-4)


def test_a_channel_without_columns_keeps_its_mean():
    fmt = PageFormat(16, key_columns=16, key_param_bits=8)
    key_map = torch.tensor([4 * (i // 2) + i % 2 for i in range(16)], dtype=torch.int16).view(1, 1, -1)
    k = torch.randn(1, 1, 64, 16) + torch.linspace(-300, 300, 16)
    weights = torch.rand(1, 1, 64) + 0.5
    keys, _ = reference.dequantize(
        reference.quantize(k, k, fmt, key_map=key_map, key_weights=weights), fmt, key_map=key_map
    )
    mean = (k * weights[..., None]).sum(2) / weights.sum(2, keepdim=True)
    assert ((keys[:, :, 0] - mean).abs()[..., 8:] <= mean.abs()[..., 8:] / 230).all()
    assert torch.equal(keys[..., 8:], keys[:, :, :1, 8:].expand(-1, -1, 64, -1))


def test_a_rotated_value_is_restored():
    """What rotation spreads over a block comes back in its place."""
    fmt = PageFormat(64, 96, value_bits=8, value_param_bits=8)
    assert (fmt.value_group, fmt.hadamard_block) == (96, 32)
    v = torch.zeros(1, 1, 64, 96)
    v[0, 0, torch.arange(64), torch.arange(64)] = 5.0
    _, values = reference.dequantize(reference.quantize(torch.zeros(1, 1, 64, 64), v, fmt), fmt)
    assert (values - v).abs().max() < 0.1


@pytest.mark.parametrize("block", [16, 32, 64])
def test_the_rotation_is_its_own_inverse(block):
    x = torch.randn(3, 192, dtype=torch.float64)
    assert torch.allclose(hadamard(hadamard(x, block), block), x)
    assert torch.allclose(
        hadamard(x, block).unflatten(-1, (-1, block)).norm(dim=-1), x.unflatten(-1, (-1, block)).norm(dim=-1)
    )


def test_scale_bytes():
    byte = torch.arange(255, dtype=torch.int32)
    scale = words.byte_scale(byte)
    assert torch.allclose(scale.double(), 2 ** ((byte.double() - 160) / 8), rtol=1e-7)
    for borders in (words.SCALE_MIDDLES, words.SCALE_EIGHTHS):
        assert torch.equal(words.scale_byte(scale, borders), byte)
    x = torch.rand(1000).mul(30).sub(19).exp2()
    nearest = words.byte_scale(words.scale_byte(x, words.SCALE_MIDDLES)) / x
    above = words.byte_scale(words.scale_byte(x, words.SCALE_EIGHTHS)) / x
    assert nearest.min() > 2 ** (-1 / 15.9) and nearest.max() < 2 ** (1 / 15.9)
    assert above.min() >= 1 and above.max() < 2 ** (1 / 7.9)
    outside = torch.tensor([0.0, 1e-30, 1e30, torch.inf])
    assert words.scale_byte(outside, words.SCALE_MIDDLES).tolist() == [0, 0, 254, 254]


@pytest.mark.parametrize(
    ("dim", "columns", "group", "block", "bits", "fine"),
    [
        (64, 80, 64, 64, 2.4375, 0),
        (80, 96, 80, 16, 2.375, 0),
        (128, 160, 64, 64, 2.4375, 0),
        (256, 320, 64, 64, 2.4375, 0),
        (64, 80, 64, 64, 2.5, 4),
        (128, 160, 64, 64, 2.5, 4),
        (64, 80, 64, 64, 2.5625, 8),
        (128, 160, 64, 64, 2.5625, 8),
    ],
)
def test_sizes_of_searched_pages(dim, columns, group, block, bits, fine):
    fmt = PageFormat(dim, key_columns=columns, key_param_bits=8, value_param_bits=8, fine_values=fine)
    assert (fmt.value_group, fmt.hadamard_block, fmt.bits_per_element) == (group, block, bits)
    assert all(section % 4 == 0 for section in fmt.sections), "every section starts at a multiple of 16 bytes"


@given(fmt=formats())
def test_fields_round_trip(fmt):
    assert PageFormat.from_fields(fmt.fields()) == fmt


def test_fields_of_version_1():
    """Programs that were exported hold such lists."""
    fields = [1, 64, 64, 64, 2, 2, 80, 64, 8, 8]
    assert PageFormat.from_fields(fields) == PageFormat(64, key_columns=80, key_param_bits=8, value_param_bits=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1, 64], "format must have 10 fields, got 2"),
        ([], "format must have 11 fields, got 0"),
        ([9, 64, 64, 64, 2, 2, 64, 64, 16, 16, 0], "format version must be 1 or 2, got 9"),
        ([1, 64, 64, 64, 2, 2, 64, 64, 4, 16], "key_param_bits must be 8 or 16, got 4"),
        ([1, 64, 64, 64, 2, 2, 64, 64, 8, 12], "value_param_bits must be 8 or 16, got 12"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PageFormat.from_fields(fields)
