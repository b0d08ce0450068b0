"""The compiled kernels: ``torch.ops.logquant.*``, where torch's dispatcher takes those of the tensors' device.

The schemas are in csrc/ops.cpp. What an operator needs of Python stands here beside the call: its fake, which gives
``torch.compile`` the shapes and dtypes of results, and a fallback to :mod:`logquant.ops.reference` for devices that
have no kernels. Both are registered when the extension is loaded, which is on first use: ``import logquant`` is quick.

Arguments are those of the reference, in the order of the schemas, for torch takes longer over named ones.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..format import PageFormat
from . import reference


@functools.cache
def extension_error() -> str | None:
    """Why the compiled extension cannot be used, or None if it can."""
    try:
        importlib.import_module("logquant._C")
    except ImportError as error:
        return f"the compiled extension logquant._C cannot be loaded ({error}); reinstall logquant with a C++ compiler"
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"logquant::{name}", fake)
        torch.library.impl(f"logquant::{name}", "CompositeExplicitAutograd")(_fallback(name))
    return None


@torch.compiler.assume_constant_result
def is_loaded() -> bool:
    """Whether the compiled extension can be used: loading it is not for a compiler to trace."""
    return extension_error() is None


def has_cuda_kernels() -> bool:
    """Whether the extension was built with CUDA kernels, for whatever architecture."""
    return extension_error() is None and torch._C._dispatch_has_kernel_for_dispatch_key("logquant::attend", "CUDA")


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def quantize(k: Tensor, v: Tensor, fmt: PageFormat, *args: Any, **kwargs: Any) -> Tensor:
    pages: Tensor = torch.ops.logquant.quantize.default(k, v, fmt.fields(), *args, **kwargs)
    return pages


def _fake_quantize(k: Tensor, v: Tensor, fields: list[int], index: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    fmt = PageFormat.from_fields(fields)
    tokens = k.shape[2] if index is None else index.shape[1]
    return k.new_empty((*k.shape[:2], tokens // fmt.page_tokens, fmt.words), dtype=torch.int32)


def dequantize(
    pages: Tensor, fmt: PageFormat, dtype: torch.dtype = torch.float32, key_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    both: tuple[Tensor, Tensor] = torch.ops.logquant.dequantize.default(pages, fmt.fields(), dtype, key_map)
    return both


def _fake_dequantize(
    pages: Tensor, fields: list[int], dtype: torch.dtype, key_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    fmt = PageFormat.from_fields(fields)
    batch, heads, page_count, _ = pages.shape
    shape = (batch, heads, page_count * fmt.page_tokens)
    return (
        pages.new_empty((*shape, fmt.head_dim), dtype=dtype),
        pages.new_empty((*shape, fmt.value_dim), dtype=dtype),
    )


def evict_(window_k: Tensor, window_v: Tensor, pages: Tensor, fmt: PageFormat, *args: Any, **kwargs: Any) -> None:
    torch.ops.logquant.evict_.default(window_k, window_v, pages, fmt.fields(), *args, **kwargs)


def _fake_evict_(*_: Any, **__: Any) -> None:
    return None


def attend(
    q: Tensor, pages: Tensor, window_k: Tensor, window_v: Tensor, fmt: PageFormat, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    results: tuple[Tensor, Tensor, Tensor] = torch.ops.logquant.attend.default(
        q, pages, window_k, window_v, fmt.fields(), *args, **kwargs
    )
    return results


def _fake_attend(
    q: Tensor,
    pages: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    fields: list[int],
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
    attention: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    value_dim = PageFormat.from_fields(fields).value_dim
    given = (0,) if attention is None else window_k.shape[:3]
    return (
        q.new_empty((*q.shape[:3], value_dim)),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(given, dtype=torch.float32),
    )


def decode_step_(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # The format is the twelfth argument.
    fmt, *others = args[10:]
    out: Tensor = torch.ops.logquant.decode_step_.default(q, *args[:10], fmt.fields(), *others, **kwargs)
    return out


def _fake_decode_step_(q: Tensor, *args: Any, **_: Any) -> Tensor:
    value_dim = PageFormat.from_fields(args[10]).value_dim
    return q.new_empty((*q.shape[:3], value_dim))


def page_scores(
    q: Tensor, pages: Tensor, fmt: PageFormat, scale: float, *args: Tensor | None, **kwargs: Tensor | None
) -> Tensor:
    scores: Tensor = torch.ops.logquant.page_scores.default(q, pages, fmt.fields(), scale, *args, **kwargs)
    return scores


def _fake_page_scores(q: Tensor, pages: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], pages.shape[2]), dtype=torch.float32)


def choose_pages(
    scores: Tensor, counts: Tensor, heads: int, most: int, *args: Tensor | None, **kwargs: Tensor | None
) -> Tensor:
    pages: Tensor = torch.ops.logquant.choose_pages.default(scores, counts, heads, most, *args, **kwargs)
    return pages


def _fake_choose_pages(scores: Tensor, _: Tensor, heads: int, most: int, *__: Any, **___: Any) -> Tensor:
    return scores.new_empty((scores.shape[0], heads, scores.shape[2], most), dtype=torch.int32)


def choose_leaving(weight: Tensor, first: int, last: int, count: int, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    both: tuple[Tensor, Tensor] = torch.ops.logquant.choose_leaving.default(weight, first, last, count, ranks)
    return both


def _fake_choose_leaving(weight: Tensor, first: int, last: int, count: int, *_: Any) -> tuple[Tensor, Tensor]:
    rows, slots = weight.shape
    leaving = weight.new_empty((rows, count), dtype=torch.int32)
    return leaving, leaving.new_empty((rows, slots - count))


# Where there is no kernel, a few of torch do as well.
_PLAIN = ("choose_pages", "choose_leaving")
_FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _fake_quantize,
    "dequantize": _fake_dequantize,
    "evict_": _fake_evict_,
    "attend": _fake_attend,
    "decode_step_": _fake_decode_step_,
    "page_scores": _fake_page_scores,
    "choose_pages": _fake_choose_pages,
    "choose_leaving": _fake_choose_leaving,
}


def _fallback(name: str) -> Callable[..., Any]:
    """What the dispatcher runs where the tensors' device has no kernel for an operator."""
    function = getattr(reference, name)
    if name in _PLAIN:
        return function  # type: ignore[no-any-return]
    schema = getattr(torch.ops.logquant, name).default._schema
    at = [argument.name for argument in schema.arguments].index("format")

    def run(*args: Any, **kwargs: Any) -> Any:
        warn_once(f"logquant has no kernels for {args[0].device.type!r} tensors and runs in plain torch")
        return function(*args[:at], PageFormat.from_fields(args[at]), *args[at + 1 :], **kwargs)

    return run
