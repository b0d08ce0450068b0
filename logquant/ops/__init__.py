"""The operators as typed Python functions, and the choice between compiled kernels and plain torch.

A call goes to ``torch.ops.logquant.*`` (schemas: csrc/ops.cpp), where torch's dispatcher picks the kernel of the
tensors' device. A device without kernels, or an installation whose extension cannot be loaded, falls back to
:mod:`logquant.ops.reference` and says so once. :func:`use_backend` chooses by hand.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ..format import PageFormat
from . import reference

__all__ = ["PageFormat", "attend", "dequantize", "evict_", "extension_error", "quantize", "use_backend"]

Backend = Literal["auto", "reference", "cpu"]
_backend: Backend = "auto"


@functools.cache
def extension_error() -> str | None:
    """Why the compiled extension cannot be used, or None if it can."""
    try:
        importlib.import_module("logquant._C")
    except ImportError as error:
        return f"the compiled extension logquant._C cannot be loaded ({error}); reinstall logquant with a C++ compiler"
    _register_fakes()
    _register_fallbacks()
    return None


def has_cuda_kernels() -> bool:
    """Whether the extension was built with CUDA kernels, for whatever architecture."""
    return extension_error() is None and torch._C._dispatch_has_kernel_for_dispatch_key("logquant::attend", "CUDA")


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run the operators on a chosen backend within a ``with`` block.

    Args:
        backend: ``"auto"`` (compiled kernels where the device has them), ``"reference"`` (plain torch), ``"cpu"``
            (compiled, or an error if there are none).

    Raises:
        ValueError: an unknown backend.
        RuntimeError: a compiled backend without the extension.
    """
    global _backend
    if backend not in ("auto", "reference", "cpu"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'cpu', got {backend!r}")
    if backend == "cpu" and (error := extension_error()):
        raise RuntimeError(f"backend 'cpu' is not available: {error}")
    previous, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = previous


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _compiled() -> bool:
    if _backend == "reference":
        return False
    if error := extension_error():
        _warn_once(f"logquant runs in plain torch, which is slow: {error}")
        return False
    return True


def _check_devices(first: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(f"{name} must be on {first.device} like the first argument, got {other.device}")


def quantize(
    k: Tensor,
    v: Tensor,
    fmt: PageFormat,
    *,
    index: Tensor | None = None,
    key_map: Tensor | None = None,
    key_weights: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> Tensor:
    """Quantise tokens into pages; see :func:`logquant.ops.reference.quantize`.

    Args:
        k: keys ``[B, H, T, D]``, float32, float16 or bfloat16.
        v: values ``[B, H, T, Dv]``, same dtype and device.
        fmt: the page format.
        index: int32 ``[1 or B, N]``, the tokens to take; all T without it. N is a multiple of ``fmt.page_tokens``.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.
        key_weights: float32 ``[1 or B, 1 or H, N]``, how much an error of each token's key counts where parameters are
            fitted (``key_param_bits`` 8); 1 without it.
        value_feedback: float32 ``[1 or B, 1 or H, N, page_tokens]``, how much of a token's error each later token of
            its page takes off before it is rounded (``value_param_bits`` 8); nothing without it.

    Returns:
        Pages, int32 ``[B, H, N / page_tokens, words]``.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape, dtype or index.
    """
    _check_devices(k, v=v, index=index, key_map=key_map, key_weights=key_weights, value_feedback=value_feedback)
    if _compiled():
        pages: Tensor = torch.ops.logquant.quantize.default(
            k, v, fmt.fields(), index, key_map, key_weights, value_feedback
        )
        return pages
    return reference.quantize(
        k, v, fmt, index=index, key_map=key_map, key_weights=key_weights, value_feedback=value_feedback
    )


def dequantize(
    pages: Tensor, fmt: PageFormat, *, dtype: torch.dtype = torch.float32, key_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that pages stand for; see :func:`logquant.ops.reference.dequantize`.

    Args:
        pages: int32 ``[B, H, P, words]``.
        fmt: the page format.
        dtype: float32, float16 or bfloat16.
        key_map: the column map the pages were made with.

    Returns:
        Keys ``[B, H, P * page_tokens, D]`` and values ``[B, H, P * page_tokens, Dv]``.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape or dtype.
    """
    _check_devices(pages, key_map=key_map)
    if _compiled():
        both: tuple[Tensor, Tensor] = torch.ops.logquant.dequantize.default(pages, fmt.fields(), dtype, key_map)
        return both
    return reference.dequantize(pages, fmt, dtype=dtype, key_map=key_map)


def evict_(
    window_k: Tensor,
    window_v: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    *,
    page: int,
    tokens: int,
    start: int,
    step: int,
    count: int,
    key_map: Tensor | None = None,
    key_weights: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> None:
    """Move tokens from the window into pages, in place; see :func:`logquant.ops.reference.evict_`.

    Args:
        window_k: ``[B, H, capacity, D]``, changed in place.
        window_v: ``[B, H, capacity, Dv]``, changed in place.
        pages: int32 ``[B, H, P, words]``, changed in place.
        fmt: the page format.
        page: the first page to write.
        tokens: how many slots of the window hold tokens.
        start, step, count: the slots to evict (:func:`logquant.rule.evicted_slots`); count is a multiple of
            ``fmt.page_tokens``.
        key_map, key_weights, value_feedback: as for :func:`quantize`.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape, dtype or slot; nothing has changed then.
    """
    _check_devices(
        window_k,
        window_v=window_v,
        pages=pages,
        key_map=key_map,
        key_weights=key_weights,
        value_feedback=value_feedback,
    )
    if _compiled():
        torch.ops.logquant.evict_.default(
            window_k,
            window_v,
            pages,
            fmt.fields(),
            page,
            tokens,
            start,
            step,
            count,
            key_map,
            key_weights,
            value_feedback,
        )
        return
    reference.evict_(
        window_k,
        window_v,
        pages,
        fmt,
        page=page,
        tokens=tokens,
        start=start,
        step=step,
        count=count,
        key_map=key_map,
        key_weights=key_weights,
        value_feedback=value_feedback,
    )


def attend(
    q: Tensor,
    pages: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    fmt: PageFormat,
    *,
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode attention over packed and exact tokens, one softmax; see :func:`logquant.ops.reference.attend`.

    Args:
        q: queries ``[B, Hq, L, D]``, Hq a multiple of H.
        pages: int32 ``[B, H, P, words]``, or ``[blocks, H, words]`` with a ``page_table``.
        window_k: ``[B, H, N, D]``, dtype of ``q``.
        window_v: ``[B, H, N, Dv]``, dtype of ``q``.
        fmt: the page format.
        scale: factor of the scores, usually ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.
        positions: int32 ``[1 or B, P * page_tokens + N]``, the position of each slot's token; negative where
            a slot is empty.
        mask: ``[1 or B, 1 or Hq, 1 or L, T]``, looked up by position: boolean (True: seen) or an additive float.
        query_positions: int32 ``[1 or B, L]``: a query sees positions up to its own.
        sinks: float32 ``[Hq]``, a logit a head that only adds to the softmax's denominator.
        page_table: int32 ``[B, P]``, the block of each page.
        lengths: int32 ``[1 or B, 2]``: pages and window tokens in use.

    Returns:
        The output ``[B, Hq, L, Dv]`` in q's dtype and the log-sum-exp of its scores, float32 ``[B, Hq, L]``.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape, dtype or index.
    """
    _check_devices(
        q,
        pages=pages,
        window_k=window_k,
        window_v=window_v,
        key_map=key_map,
        positions=positions,
        mask=mask,
        query_positions=query_positions,
        sinks=sinks,
        page_table=page_table,
        lengths=lengths,
    )
    if _compiled():
        out_and_lse: tuple[Tensor, Tensor] = torch.ops.logquant.attend.default(
            q,
            pages,
            window_k,
            window_v,
            fmt.fields(),
            scale,
            softcap,
            key_map,
            positions,
            mask,
            query_positions,
            sinks,
            page_table,
            lengths,
        )
        return out_and_lse
    return reference.attend(
        q,
        pages,
        window_k,
        window_v,
        fmt,
        scale=scale,
        softcap=softcap,
        key_map=key_map,
        positions=positions,
        mask=mask,
        query_positions=query_positions,
        sinks=sinks,
        page_table=page_table,
        lengths=lengths,
    )


# ------------------------------------------------------------------------------- shapes for tracing (torch.compile)
def _register_fakes() -> None:
    @torch.library.register_fake("logquant::quantize")
    def _(k: Tensor, v: Tensor, fields: list[int], index: Tensor | None = None, *others: Any, **kwargs: Any) -> Tensor:
        fmt = PageFormat.from_fields(fields)
        tokens = k.shape[2] if index is None else index.shape[1]
        return k.new_empty((*k.shape[:2], tokens // fmt.page_tokens, fmt.words), dtype=torch.int32)

    @torch.library.register_fake("logquant::dequantize")
    def _(pages: Tensor, fields: list[int], dtype: torch.dtype, key_map: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fmt = PageFormat.from_fields(fields)
        batch, heads, page_count, _ = pages.shape
        shape = (batch, heads, page_count * fmt.page_tokens)
        return (
            pages.new_empty((*shape, fmt.head_dim), dtype=dtype),
            pages.new_empty((*shape, fmt.value_dim), dtype=dtype),
        )

    @torch.library.register_fake("logquant::evict_")
    def _(*args: Any, **kwargs: Any) -> None:
        return None

    @torch.library.register_fake("logquant::attend")
    def _(q: Tensor, pages: Tensor, k: Tensor, v: Tensor, fields: list[int], *args: Any, **kwargs: Any) -> Any:
        value_dim = PageFormat.from_fields(fields).value_dim
        return q.new_empty((*q.shape[:3], value_dim)), q.new_empty(q.shape[:3], dtype=torch.float32)


# ------------------------------------------------------------------------------------ devices without compiled kernels
def _register_fallbacks() -> None:
    def fallback(name: str) -> Any:
        function = getattr(reference, name)
        schema = getattr(torch.ops.logquant, name).default._schema
        names = [argument.name for argument in schema.arguments]
        positional = names.index("format")

        def run(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(names, args, strict=False)) | kwargs
            tensors = [arguments[n] for n in names[:positional]]
            _warn_once(f"logquant has no kernels for {tensors[0].device.type!r} tensors and runs in plain torch")
            options = {n: arguments[n] for n in names[positional + 1 :] if n in arguments}
            return function(*tensors, PageFormat.from_fields(arguments["format"]), **options)

        return run

    for name in ("quantize", "dequantize", "evict_", "attend"):
        torch.library.impl(f"logquant::{name}", "CompositeExplicitAutograd")(fallback(name))
