"""``logquant bench attend``: one token's attention, fused over a packed cache against torch's over a full one."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..config import LogQuantConfig
from ..quantizer import columns
from ..recall.index import PageIndex
from ..recall.reading import Recall
from ..recall_spec import RecallSpec
from ..rule import COUNTED, split_positions
from .timing import ColdCache, Timing, clock_of, time_interleaved

FUSED = "logquant attend"
RECALL = "logquant attend, recall"
DEQUANTIZE = "dequantize + SDPA"
FULL = "SDPA, full cache"
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Shape:
    """One attention call: ``heads`` query heads of ``dim`` channels share ``kv_heads`` over ``context`` tokens."""

    context: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    batch: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads ({self.kv_heads}), got {self.heads}")


@dataclass(frozen=True)
class AttendResult:
    """What one shape took.

    Args:
        shape: what was timed.
        timings: by contender.
        packed_nbytes: bytes that the fused operator reads: pages and window.
        full_nbytes: bytes of the full cache in the same dtype.
        relative_error: rms of the fused output's difference from dequantise + SDPA in float32, over its rms.
    """

    shape: Shape
    timings: dict[str, Timing]
    packed_nbytes: int
    full_nbytes: int
    relative_error: float

    def fastest(self, group: str) -> tuple[str, Timing]:
        """The fastest form of a contender."""
        return min(((n, t) for n, t in self.timings.items() if n.startswith(group)), key=lambda item: item[1].median)

    def as_dict(self) -> dict[str, Any]:
        fused = self.timings[FUSED]
        speedups = {}
        for key, group in (("dequantize", DEQUANTIZE), ("full", FULL)):
            if any(name.startswith(group) for name in self.timings):
                speedups[f"speedup_over_{key}"] = fused.speedup_over(self.fastest(group)[1]).as_dict()
        if RECALL in self.timings:
            speedups["speedup_with_recall"] = self.timings[RECALL].speedup_over(fused).as_dict()
        return {
            **vars(self.shape),
            "packed_bytes": self.packed_nbytes,
            "full_bytes": self.full_nbytes,
            "relative_error": self.relative_error,
            "bytes_per_second": self.packed_nbytes / fused.median,
            **speedups,
            "timings": {name: timing.as_dict() for name, timing in self.timings.items()},
        }


def _sdpa(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
    """Attention of one query token; ``grouped`` hands the query heads of a KV head over as its query tokens."""
    if not grouped:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q.view(q.shape[0], k.shape[1], -1, q.shape[3]), k, v).view_as(q)


def _other_libraries(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Decode attention of the GPU libraries that are installed, over the full cache in their own layout."""
    found: dict[str, Callable[[], Tensor]] = {}
    by_token = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    with contextlib.suppress(ImportError):
        from flash_attn import flash_attn_with_kvcache

        found[f"{FULL}, FlashAttention"] = lambda: flash_attn_with_kvcache(*by_token)
    if q.shape[0] == 1:
        with contextlib.suppress(ImportError):
            from flashinfer import single_decode_with_kv_cache

            one_q, one_k, one_v = by_token[0][0, 0], by_token[1][0], by_token[2][0]
            found[f"{FULL}, FlashInfer"] = lambda: single_decode_with_kv_cache(one_q, one_k, one_v)
    return found


def _recall(
    quantization: LogQuantConfig,
    q: Tensor,
    packed_keys: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    key_map: Tensor | None,
) -> Callable[[], Tensor]:
    """Attention over the pages that a query chooses, if there are more."""
    assert quantization.recall is not None
    fmt = quantization.page_format(q.shape[3])
    recall = Recall(RecallSpec.parse(quantization.recall), PageIndex.of(packed_keys, fmt.page_tokens))
    q, pages, *window = tensors
    scale = q.shape[3] ** -0.5
    # A layer makes one whenever tokens leave the window, and steps in between share it.
    reading = recall.reading(pages, fmt, key_map, (packed_keys.shape[2],))
    if reading is None:
        return lambda: ops.attend(*tensors, fmt, scale=scale, key_map=key_map)[0]
    return lambda: reading.attend(q, *window, given=None, scale=scale)[0]


def _split(quantization: LogQuantConfig, tokens: int) -> tuple[Tensor, Tensor]:
    """Packed and exact positions. Which tokens attention would keep, random ones do not say; how many, their number."""
    rule = quantization.rule if quantization.rule in COUNTED else "recent"
    return split_positions(tokens, quantization.window, rule, quantization.sinks)


def _operator(quantization: LogQuantConfig, window: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """What a decoding step calls: under the rule ``attention`` it counts that, too."""
    if quantization.rule in COUNTED:
        return ops.attend
    given = window.new_zeros(window.shape[:3], dtype=torch.float32)
    return functools.partial(ops.observed_attend, attention=given)


def _check_kernels(device: str) -> None:
    if reason := ops.extension_error():
        raise RuntimeError(f"there is nothing to measure: {reason}")
    if device == "cuda" and not ops.has_cuda_kernels():
        raise RuntimeError("there is nothing to measure: logquant was built without CUDA; see `logquant info`")


@torch.inference_mode()
def bench_attend(
    shape: Shape,
    quantization: LogQuantConfig,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 20,
    on_progress: Callable[[], None] = lambda: None,
    device: str = "cpu",
    others: bool = True,
) -> AttendResult:
    """Time one call of every contender, each from cold caches; with ``recall``, also over the pages that it chooses,
    choosing included.

    torch's contenders run with ``enable_gqa`` and grouped, on a CPU in ``dtype`` and in all others: which is fastest
    depends on the machine, and a comparison with a slow form would be worth nothing. On a GPU, FlashAttention and
    FlashInfer take part where they are installed. Without ``others`` none of these is timed.

    Raises:
        RuntimeError: no compiled kernels for the device, or a fused result that is wrong.
    """
    _check_kernels(device)
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(shape.batch, heads, tokens, shape.dim, generator=generator, device=device).to(dtype)

    q, k, v = random(shape.heads, 1), random(shape.kv_heads, shape.context), random(shape.kv_heads, shape.context)
    packed, exact = _split(quantization, shape.context)
    fmt = quantization.page_format(shape.dim)
    key_map = columns.allocate(columns.variances(k, 2 * fmt.page_tokens), fmt) if quantization.has_map(fmt) else None
    pages = ops.quantize(k, v, fmt, index=packed[None].to(device), key_map=key_map)
    window_k, window_v = (x[:, :, exact.to(device)].contiguous() for x in (k, v))
    scale = shape.dim**-0.5
    attend = _operator(quantization, window_k)

    def fused() -> Tensor:
        return attend(q, pages, window_k, window_v, fmt, scale=scale, key_map=key_map)[0]

    def dequantize(kind: torch.dtype, grouped: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            packed_k_v = ops.dequantize(pages, fmt, dtype=kind, key_map=key_map)
            parts = zip(packed_k_v, (window_k, window_v), strict=True)
            keys, values = (torch.cat([old, new.to(kind)], 2) for old, new in parts)
            return _sdpa(q.to(kind), keys, values, grouped)

        return run

    def full(kind: torch.dtype, grouped: bool) -> Callable[[], Tensor]:
        kind_q, kind_k, kind_v = q.to(kind), k.to(kind), v.to(kind)
        return lambda: _sdpa(kind_q, kind_k, kind_v, grouped)

    contenders: dict[str, Callable[[], Tensor]] = {FUSED: fused}
    if quantization.recall is not None:
        keys = k.index_select(2, packed.to(device))
        contenders[RECALL] = _recall(quantization, q, keys, (q, pages, window_k, window_v), key_map)
    kinds = dict.fromkeys((dtype,) if device == "cuda" else (dtype, *DTYPE_NAMES))
    forms = itertools.product(((DEQUANTIZE, dequantize), (FULL, full)), kinds, (0, 1))
    for (group, make), kind, grouped in forms if others else ():
        form = ("enable_gqa", "grouped")[grouped]
        contenders[f"{group}, {DTYPE_NAMES[kind]}, {form}"] = make(kind, bool(grouped))
    if others and device == "cuda" and dtype != torch.float32:
        contenders |= _other_libraries(q, k, v)

    expected = dequantize(torch.float32, True)()
    error = float(((fused() - expected).square().mean() / expected.square().mean()).sqrt())
    if not error < 0.05:
        raise RuntimeError(f"attend must agree with dequantised SDPA, got a relative error of {error:.3g}")
    timings = time_interleaved(
        contenders, rounds, before_each=ColdCache(device), on_progress=on_progress, clock=clock_of(device)
    )
    packed_nbytes = pages.nbytes + window_k.nbytes + window_v.nbytes
    return AttendResult(shape, timings, packed_nbytes, k.nbytes + v.nbytes, error)
