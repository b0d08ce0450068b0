"""Bad input to the operators: a clear error that names the argument, and nothing changed. Runs under ASan in CI."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from logquant import ops
from logquant.format import PageFormat

FMT = PageFormat(64)
COLUMNS = PageFormat(64, key_columns=80)
SEARCHED = PageFormat(64, key_param_bits=8, value_param_bits=8)


def tokens(count: int, dim: int = 64, *, batch: int = 2, heads: int = 2, dtype: torch.dtype = torch.float32):
    return torch.ones(batch, heads, count, dim, dtype=dtype)


def pages(count: int, *, fmt: PageFormat = FMT, batch: int = 2, heads: int = 2):
    return torch.zeros(batch, heads, count, fmt.words, dtype=torch.int32)


def int32(*shape: int, value: int = 0):
    return torch.full(shape, value, dtype=torch.int32)


def int16(*shape: int, value: int = 0):
    return torch.full(shape, value, dtype=torch.int16)


def check_error(call: Any, message: str, error: type[Exception] = RuntimeError) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=tokens(64)[0]), r"k must have shape \[batch, heads, tokens, 64\], got \[2, 64, 64\]"),
        (dict(k=tokens(64, 80)), r"k must have shape .* 64\], got \[2, 2, 64, 80\]"),
        (dict(v=tokens(64, 80)), r"v must have shape .* 64\], got \[2, 2, 64, 80\]"),
        (dict(v=tokens(64, heads=1)), r"v must have the first 3 sizes of k, got \[2, 1, 64, 64\] and \[2, 2, 64, 64\]"),
        (dict(v=tokens(128)), "v must have the first 3 sizes of k"),
        (dict(k=tokens(60), v=tokens(60)), "k must have a multiple of 64 tokens, got 60"),
        (dict(k=tokens(64, dtype=torch.float64)), "k must be float32, float16 or bfloat16, got Double"),
        (dict(k=tokens(64).int()), "k must be float32, float16 or bfloat16, got Int"),
        (dict(v=tokens(64, dtype=torch.float16)), "v must have the dtype of k, got Half and Float"),
        (dict(index=int32(64)), r"index must have shape \[2, 0\]"),
        (dict(index=int32(3, 64)), r"index must have shape \[2, 64\] .* got \[3, 64\]"),
        (dict(index=int32(1, 64).long()), "index must be Int, got Long"),
        (dict(index=int32(1, 60)), "index must have a multiple of 64 tokens, got 60"),
        (dict(index=int32(1, 64, value=64)), "index must lie between 0 and 63, got 64"),
        (dict(index=int32(1, 64, value=-1)), "index must lie between 0 and 63, got -1"),
        (dict(fmt=COLUMNS), "key_map is needed: the format has 80 key columns for 64 channels"),
        (dict(fmt=COLUMNS, key_map=int16(1, 1, 64)), r"key_map must have shape \[2, 2, 80\] .* got \[1, 1, 64\]"),
        (dict(fmt=COLUMNS, key_map=int16(3, 1, 80)), r"key_map must have shape \[2, 2, 80\]"),
        (dict(fmt=COLUMNS, key_map=int16(1, 1, 80).int()), "key_map must be Short, got Int"),
        (dict(fmt=COLUMNS, key_map=int16(1, 1, 80, value=256)), "key_map must hold .* channel below 64 .* got 256"),
        (dict(fmt=COLUMNS, key_map=int16(1, 1, 80, value=-4)), "key_map must hold .* got -4 in column 0"),
        (dict(fmt=PageFormat(64, key_bits=8), key_map=int16(1, 1, 64, value=1)), "a digit below 1, got 1"),
        (dict(fmt=COLUMNS, key_map=int16(1, 1, 80)), "key_map must name each digit .* once, got 0 again in column 1"),
        (dict(key_weights=torch.ones(1, 1, 32)), r"key_weights must have shape \[2, 2, 64\] .* got \[1, 1, 32\]"),
        (dict(key_weights=torch.ones(1, 64)), r"key_weights must have shape \[2, 2, 64\]"),
        (dict(key_weights=torch.ones(1, 1, 64).double()), "key_weights must be Float, got Double"),
        (dict(key_weights=torch.ones(1, 1, 128)[..., ::2]), "key_weights must be contiguous in its last dimension"),
        (dict(value_feedback=torch.ones(1, 1, 64, 64)), "value_feedback needs value_param_bits 8, got 16"),
        (
            dict(fmt=SEARCHED, value_feedback=torch.ones(1, 1, 64, 32)),
            r"value_feedback must have shape \[2, 2, 64, 64\] .* got \[1, 1, 64, 32\]",
        ),
        (dict(fmt=SEARCHED, value_feedback=torch.ones(1, 1, 1, 64)), "value_feedback must have 64 tokens, got 1"),
        (dict(fmt=SEARCHED, value_feedback=torch.ones(1, 1, 64, 64).double()), "value_feedback must be Float"),
        (
            dict(fmt=SEARCHED, value_feedback=torch.ones(1, 1, 64, 64).mT),
            "value_feedback must be contiguous in its last",
        ),
    ],
)
def test_quantize(changes, message):
    arguments = dict(k=tokens(64), v=tokens(64), fmt=FMT) | changes
    check_error(lambda: ops.quantize(**arguments), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pages=pages(1)[0]), r"pages must have shape \[batch, heads, pages, 640\], got \[2, 1, 640\]"),
        (dict(pages=pages(1)[..., 1:]), r"pages must have shape .* got \[2, 2, 1, 639\]"),
        (dict(pages=pages(1).float()), "pages must be Int, got Float"),
        (dict(dtype=torch.float64), "dtype must be float32, float16 or bfloat16, got Double"),
        (dict(key_map=int16(1, 1, 80)), r"key_map must have shape \[2, 2, 64\]"),
    ],
)
def test_dequantize(changes, message):
    arguments = dict(pages=pages(1), fmt=FMT) | changes
    check_error(lambda: ops.dequantize(**arguments), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(window_k=tokens(192, 80)), "window_k must have shape"),
        (dict(window_v=tokens(191)), "window_v must have the first 3 sizes of window_k"),
        (dict(window_v=tokens(192, dtype=torch.bfloat16)), "window_v must have the dtype of window_k"),
        (dict(pages=pages(2, heads=1)), "pages must have the first 2 sizes of window_k"),
        (dict(pages=pages(2).long()), "pages must be Int, got Long"),
        (dict(window_k=tokens(64, 192).mT), "window_k is changed in place and must be contiguous in its last dim"),
        (
            dict(window_k=tokens(192, heads=1).expand(2, 2, -1, -1)),
            "window_k is changed in place and must not be expand",
        ),
        (dict(pages=pages(2, batch=1).expand(2, -1, -1, -1)), "pages is changed in place and must not be expanded"),
        (dict(tokens=193), "tokens must lie between 0 and the window's capacity 192, got 193"),
        (dict(tokens=-1), "tokens must lie between 0"),
        (dict(count=0), "count must be a positive multiple of 64, got 0"),
        (dict(count=65), "count must be a positive multiple of 64, got 65"),
        (dict(count=-64), "count must be a positive multiple of 64, got -64"),
        (dict(start=-1), "start, step and count must name slots below 192, got -1, 2 and 64"),
        (dict(start=66), "start, step and count must name slots below 192, got 66, 2 and 64"),
        (dict(step=0), "start, step and count must name slots below 192, got 1, 0 and 64"),
        (dict(step=2**62), "start, step and count must name slots below 192"),
        (dict(count=64 * 2**40), "start, step and count must name slots below 192"),
        (dict(key_weights=torch.ones(1, 1, 192)), r"key_weights must have shape \[2, 2, 64\] .* got \[1, 1, 192\]"),
        (
            dict(fmt=SEARCHED, pages=pages(2, fmt=SEARCHED), value_feedback=torch.ones(1, 1, 192, 64)),
            r"value_feedback must have shape \[2, 2, 64, 64\] .* got \[1, 1, 192, 64\]",
        ),
        (dict(page=2), "page must leave room for 1 pages of 2, got 2"),
        (dict(page=-1), "page must leave room for 1 pages of 2, got -1"),
    ],
)
def test_evict_(changes, message):
    arguments: dict[str, Any] = dict(window_k=tokens(192), window_v=tokens(192), pages=pages(2), fmt=FMT)
    arguments |= dict(page=0, tokens=192, start=1, step=2, count=64) | changes
    before = [arguments[name].clone() for name in ("window_k", "window_v", "pages")]
    check_error(lambda: ops.evict_(**arguments), message)
    for name, tensor in zip(("window_k", "window_v", "pages"), before, strict=True):
        assert torch.equal(arguments[name], tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=tokens(1, 80)), "q must have shape"),
        (dict(q=tokens(1)[0]), r"q must have shape \[batch, heads, tokens, 64\], got \[2, 1, 64\]"),
        (dict(q=tokens(1, dtype=torch.float64)), "q must be float32, float16 or bfloat16, got Double"),
        (dict(q=tokens(1, heads=3)), "q must have a multiple of window_k's 2 heads, got 3"),
        (dict(q=tokens(1, batch=1)), "window_k must have q's batch size 1, got 2"),
        (dict(window_k=tokens(10, dtype=torch.bfloat16)), "window_k must have the dtype of q, got BFloat16 and Float"),
        (dict(window_v=tokens(11)), "window_v must have the first 3 sizes of window_k"),
        (dict(pages=pages(2, heads=1)), "pages must have the first 2 sizes of window_k"),
        (dict(pages=pages(2)[..., 1:]), "pages must have shape"),
        (dict(scale=float("nan")), "scale must be finite, got nan"),
        (dict(softcap=-1.0), "softcap must be 0 or a positive number, got -1"),
        (dict(softcap=float("inf")), "softcap must be 0 or a positive number, got inf"),
        (dict(positions=int32(1, 137)), r"positions must have shape \[2, 138\] .* got \[1, 137\]"),
        (dict(positions=int32(1, 138).long()), "positions must be Int, got Long"),
        (dict(mask=torch.ones(138, dtype=torch.bool)), r"mask must have shape \[2, 4, 1, 0\]"),
        (dict(mask=torch.ones(3, 1, 1, 138, dtype=torch.bool)), r"mask must have shape \[2, 4, 1, 138\]"),
        (dict(mask=torch.ones(1, 2, 1, 138, dtype=torch.bool)), r"mask must have shape \[2, 4, 1, 138\]"),
        (
            dict(mask=torch.ones(1, 1, 1, 138, dtype=torch.int32)),
            "mask must be bool, float32, float16 or bfloat16, got I",
        ),
        (dict(query_positions=int32(1, 2)), r"query_positions must have shape \[2, 1\]"),
        (dict(sinks=torch.ones(2)), r"sinks must have shape \[4\], got \[2\]"),
        (dict(sinks=torch.ones(4).half()), "sinks must be Float, got Half"),
        (dict(lengths=int32(2)), r"lengths must have shape \[2, 2\]"),
        (
            dict(lengths=torch.tensor([[3, 0]]).int()),
            "lengths must be at most 2 pages and 10 window tokens, got 3 and 0",
        ),
        (
            dict(lengths=torch.tensor([[0, 11]]).int()),
            "lengths must be at most 2 pages and 10 window tokens, got 0 and 11",
        ),
        (dict(lengths=int32(1, 2, value=-1)), "lengths must be at most"),
        (dict(page_table=int32(2, 3)), r"pages must have shape \[blocks, heads, 640\], got \[2, 2, 2, 640\]"),
        (dict(pages=pages(2)[0], page_table=int32(1, 3)), r"page_table must have shape \[2, 3\], got \[1, 3\]"),
        (dict(pages=pages(2)[0], page_table=int32(2, 3, value=2)), "page_table must lie between 0 and 1, got 2"),
        (dict(pages=pages(2)[0], page_table=int32(2, 3, value=-1)), "page_table must lie between 0 and 1, got -1"),
        (dict(pages=pages(2)[0][:, :1], page_table=int32(2, 3)), r"pages must have 2 heads, got \[2, 1, 640\]"),
        (dict(key_map=int16(1, 1, 64, value=300)), "key_map must hold"),
    ],
)
def test_attend(changes, message):
    arguments: dict[str, Any] = dict(q=tokens(1, heads=4), pages=pages(2), window_k=tokens(10), window_v=tokens(10))
    arguments |= dict(fmt=FMT, scale=0.125) | changes
    check_error(lambda: ops.attend(**arguments), message)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (torch.ones(2, 2), r"attention must have shape \[2, 2, 0\], got \[2, 2\]"),
        (torch.ones(1, 2, 10), r"attention must have shape \[2, 2, 10\], got \[1, 2, 10\]"),
        (torch.ones(2, 4, 10), r"attention must have shape \[2, 2, 10\], got \[2, 4, 10\]"),  # query heads
        (torch.ones(2, 2, 10).double(), "attention must be Float, got Double"),
        (torch.ones(2, 2, 11), "attention must have at most window_k's 10 slots, got 11"),
    ],
)
def test_attention(attention, message):
    window = tokens(10)
    arguments: dict[str, Any] = dict(q=tokens(1, heads=4), pages=pages(2), window_k=window, window_v=window)
    check_error(lambda: ops.observed_attend(**arguments, fmt=FMT, scale=0.125, attention=attention), message)
    message = "attention must be on cpu like the first argument, got meta"
    elsewhere = attention.to("meta")
    check_error(
        lambda: ops.observed_attend(**arguments, fmt=FMT, scale=0.125, attention=elsewhere), message, ValueError
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "format must have 11 fields, got 0"),
        ([2, 64, 64, 64, 2, 2, 64, 64, 16, 16], "format must have 11 fields, got 10"),
        ([1, 64, 64, 64, 2, 2, 64, 64, 16, 16, 0], "format must have 10 fields, got 11"),
        ([3, 64, 64, 64, 2, 2, 64, 64, 16, 16, 0], "format version must be 1 or 2, got 3"),
        ([1, 65, 64, 64, 2, 2, 64, 64, 16, 16], "head_dim must be a multiple of 16 between 16 and 1024"),
        ([1, 64, 0, 64, 2, 2, 64, 64, 16, 16], "value_dim must be a multiple of 16"),
        ([1, 64, 64, 16, 2, 2, 64, 64, 16, 16], "page_tokens must be 32, 64 or 128"),
        ([1, 64, 64, 64, 3, 2, 64, 64, 16, 16], "key_bits must be 2, 4 or 8"),
        ([1, 64, 64, 64, 2, 1, 64, 64, 16, 16], "value_bits must be 2, 4 or 8"),
        ([1, 64, 64, 64, 2, 2, 60, 64, 16, 16], "key_columns must be a positive multiple of 16"),
        ([1, 64, 64, 64, 8, 2, 80, 64, 16, 16], "key_columns must leave every channel a code of at most 8 bits"),
        ([1, 64, 64, 64, 2, 2, 64, 48, 16, 16], "value_group must be a multiple of 16 that divides value_dim"),
        ([1, 64, 64, 64, 2, 2, 64, 64, 4, 16], "key_param_bits must be 8 or 16"),
        ([2, 64, 64, 64, 2, 2, 64, 64, 8, 8, 16], "fine_values must be 0, 4 or 8"),
        ([2, 64, 64, 32, 2, 2, 64, 64, 8, 8, 4], "fine_values must be 0 but with page_tokens 64"),
        ([2, 64, 64, 64, 2, 4, 64, 64, 8, 8, 8], "fine_values must be 0 but with .* value_bits 2"),
        ([2, 64, 64, 64, 2, 2, 64, 64, 8, 16, 8], "fine_values must be 0 but with .* value_param_bits 8"),
        ([2, 64, 96, 64, 2, 2, 64, 48, 8, 8, 8], "fine_values must be 0 but with .* value_group that is a multiple"),
        ([2, 64, 96, 64, 2, 2, 64, 32, 8, 8, 4], "fine_values must be 0 or 8 unless value_dim is a multiple of 64"),
        ([1, -64, 64, 64, 2, 2, 64, 64, 16, 16], "format fields must lie between 0 and 2"),
        ([1, 2**40, 64, 64, 2, 2, 64, 64, 16, 16], "format fields must lie between 0 and 2"),
    ],
)
def test_formats(fields, message):
    """The compiled operators do not trust that a format came from a PageFormat."""
    check_error(lambda: torch.ops.logquant.quantize(tokens(64), tokens(64), fields), message)


def test_fields_of_version_1():
    """Programs that were exported hold such lists."""
    fields = [1, 64, 64, 64, 2, 2, 64, 64, 16, 16]
    k = tokens(64)
    want = ops.quantize(k, k, FMT)
    assert torch.equal(torch.ops.logquant.quantize(k, k, fields), want)


def test_devices_must_agree():
    elsewhere = tokens(64).to("meta")
    check_error(
        lambda: ops.quantize(tokens(64), elsewhere, FMT),
        "v must be on cpu like the first argument, got meta",
        ValueError,
    )


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("heads", [0, 2])
def test_zero_size_tensors_are_fine(batch, heads):
    """Nothing in, nothing out."""
    k = tokens(0, batch=batch, heads=heads)
    packed = ops.quantize(k, k, FMT)
    assert packed.shape == (batch, heads, 0, FMT.words)
    assert [x.shape for x in ops.dequantize(packed, FMT)] == [k.shape, k.shape]
    if heads:
        out, lse = ops.attend(tokens(1, batch=batch, heads=4), packed, k, k, FMT, scale=1.0)
        assert out.shape == (batch, 4, 1, 64) and not out.any()
        assert lse.shape == (batch, 4, 1) and (lse == -torch.inf).all()
        no_queries, _ = ops.attend(tokens(0, batch=batch, heads=4), packed, k, k, FMT, scale=1.0)
        assert no_queries.shape == (batch, 4, 0, 64)
