"""Attention problems, what they should give, and how far off that a backend may be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from logquant import ops
from logquant.format import PageFormat
from logquant.ops import reference
from logquant.ops.reference.attend import visible_scores
from tests.helpers import emulated
from tests.helpers.backends import on
from tests.helpers.cuda_sources import formats
from tests.helpers.memo import by_content
from tests.helpers.strategies import column_map, tokens

quantize = by_content(reference.quantize)
attend = by_content(reference.attend)

TENSOR_FORMATS = list(formats().values())  # those with tensor-core kernels


def name_of(fmt: PageFormat) -> str:
    searched = "-p8" if (fmt.key_param_bits, fmt.value_param_bits) == (8, 8) else ""
    return f"d{fmt.head_dim}-c{fmt.key_columns}-b{fmt.key_bits}{searched}"


def key_map_of(fmt: PageFormat, seed: int, batch: int, heads: int) -> Tensor | None:
    """A random column map; now and then none, or one for all heads, where that is allowed."""
    # Kernels are compiled for plain formats without a map, and for searched ones with it: those come with seed 0.
    if fmt.key_columns == fmt.head_dim and seed % 3 == (fmt.key_param_bits == 8):
        return None
    shape = (batch, heads) if seed % 2 else (1, 1)
    return column_map(fmt, seed, batch=shape[0], heads=shape[1])


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


# How often a low-precision computation itself may pass the bound on single elements.
LUCK = 1e-9


def most_of(count: int) -> float:
    """What none of ``count`` rounding errors passes, in standard deviations, but for :data:`LUCK`.

    A rounding error is about uniform, and sums of independent uniform numbers have no heavier tails than the normal
    distribution of the same variance: 2 exp(-x^2 / 2) at most, ``count`` times.
    """
    return math.sqrt(2 * math.log(2 * count / LUCK))


class Problem:
    """One attention call, what it should give, and how inexact a low-precision computation of it is."""

    def __init__(
        self,
        fmt: PageFormat,
        *,
        packed: int,
        exact: int,
        batch: int = 1,
        heads: int = 2,
        group: int = 2,
        queries: int = 1,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        sharpness: float = 1.0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        self.fmt, self.dtype = fmt, dtype
        k, v = tokens(fmt, seed, batch=batch, heads=heads, count=packed + exact, dtype=dtype)
        self.key_map = key_map_of(fmt, seed, batch, heads)
        self.pages = quantize(k[:, :, :packed], v[:, :, :packed], fmt, key_map=self.key_map)
        self.window_k, self.window_v = k[:, :, packed:], v[:, :, packed:]
        self.q = torch.randn(batch, heads * group, queries, fmt.head_dim, generator=random).mul(sharpness).to(dtype)
        self.scale = fmt.head_dim**-0.5
        self.slots = packed + exact

    def call(self, function: Any, q: Tensor, **options: Any) -> Any:
        return function(
            q, self.pages, self.window_k, self.window_v, self.fmt, scale=self.scale, key_map=self.key_map, **options
        )

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
        with on(backend):
            results: tuple[Tensor, Tensor] = self.call(ops.attend, self.q, **options)
        return results

    def truth(self, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse, _ = self.call(attend, self.q.double(), **options)
        return out, lse

    def low_precision(self, **options: Any) -> tuple[Tensor, Tensor]:
        """How far off eager attention over the dequantised cache is, in bfloat16 (float16 for float16 models).

        Standard deviations: of each output ``[B, Hq, L, Dv]``, and of all log-sum-exps.
        """
        deviations: tuple[Tensor, Tensor] = self.call(low_precision, self.q, **options)
        return deviations

    def check(self, backend: str, **options: Any) -> None:
        out, lse = self.run(backend, **options)
        assert out.dtype == self.dtype and lse.dtype == torch.float32
        self.check_results(out, lse, **options)
        if not self.rounds_keys(backend):
            _, true_lse = self.truth(**options)
            seen = true_lse.isfinite()
            assert torch.allclose(lse.double()[seen], true_lse[seen], rtol=1e-3, atol=1e-3)

    def check_results(self, out: Tensor, lse: Tensor, **options: Any) -> None:
        """All results together are at most twice as inexact as low-precision torch, and none is off by more than that.

        How inexact that is, is not taken from one computation, which may be exact by luck where there are few numbers,
        but is the standard deviation of its error. And no result is further off than one of the low-precision
        computation itself would ever be: :func:`most_of` standard deviations.
        """
        truth, true_lse = self.truth(**options)
        assert out.shape == truth.shape and lse.shape == true_lse.shape
        seen = true_lse.isfinite()
        assert torch.equal(lse.isfinite(), seen)
        deviation, lse_deviation = self.low_precision(**options)
        float32 = 1e-6  # sums of float32 are not exact, either
        for got, true, low in (
            (out, truth, deviation),
            (lse[seen], true_lse[seen], lse_deviation.expand_as(true_lse)[seen]),
        ):
            if true.numel():
                error, floor = got.double() - true, float32 * true.abs().max().item()
                assert error.isfinite().all()
                assert rms(error) <= 2 * rms(low) + floor, (rms(error), rms(low))
                # That of a single number is known from a few draws only: let it be that of its row at least.
                row = low.square().mean(-1, keepdim=True).sqrt()
                most = most_of(error.numel()) * low.maximum(row) + floor
                assert (error.abs() <= most).all(), (error.abs() / most).max()

    def rounds_keys(self, backend: str) -> bool:
        """Whether keys are dequantised to the model's dtype, as prefill on CUDA does and nothing else."""
        return backend == "emulated" and self.call(emulated.attend_path, self.q) == "prefill"


def problem_of(fmt: PageFormat, dtype: torch.dtype, **shape: int | float) -> Problem:
    # A map on a format that needs none takes the general kernel; seeds that are multiples of 3 give none.
    return Problem(fmt, **{"packed": 5 * fmt.page_tokens, "exact": 50, "group": 4, "dtype": dtype, "seed": 3, **shape})


def rounded(x: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """``x`` in double, rounded to the precision of ``dtype``, each channel in units of its own.

    So rounding errors are drawn at random, while equal numbers of a channel (few codes, many tokens) are rounded alike.
    """
    unit = torch.rand(*x.shape[:-2], 1, x.shape[-1], generator=random, dtype=torch.float64).neg().exp2()
    return (x.double() * unit).to(dtype).double() / unit


@by_content
def low_precision(
    q: Tensor,
    pages: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    fmt: PageFormat,
    *,
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    sinks: Tensor | None = None,
    page_table: Tensor | None = None,
    **hiding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :meth:`Problem.low_precision`: eager attention some times, with roundings drawn at random."""
    low = torch.float16 if q.dtype == torch.float16 else torch.bfloat16
    if page_table is not None:
        pages = pages[page_table.long()].transpose(1, 2)
    packed_k, packed_v = reference.dequantize(pages, fmt, key_map=key_map)
    # More draws where there are few numbers; of large problems, which have many, each takes long.
    rows, elements = q.shape[:3].numel(), packed_k.numel() + packed_v.numel() + window_k.numel() + window_v.numel()
    draws = min(max(256 // max(rows, 1), 4), max(2**23 // max(elements, 1), 4), 32)
    random = torch.Generator().manual_seed(0)

    def compute(precise: bool) -> tuple[Tensor, Tensor]:
        def low_of(x: Tensor) -> Tensor:
            return x.double() if precise or x.dtype == low else rounded(x, low, random)

        keys = torch.cat([low_of(packed_k), low_of(window_k)], 2)
        values = torch.cat([low_of(packed_v), low_of(window_v)], 2)
        grouped = low_of(q).unflatten(1, (keys.shape[1], -1))
        scores = low_of(scale * torch.einsum("bhgld,bhtd->bhglt", grouped, keys).flatten(1, 2))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # Masks and the like are not a matter of precision: take the scores that they leave from the reference.
        visible = visible_scores(scores, fmt, packed_k.shape[2], **hiding)
        if sinks is not None:
            visible = torch.cat([visible, sinks.double()[None, :, None, None].expand(*visible.shape[:3], 1)], -1)
        weights = low_of(visible.softmax(-1).nan_to_num(0.0)[..., : keys.shape[2]])
        out = torch.einsum("bhglt,bhtd->bhgld", weights.unflatten(1, (keys.shape[1], -1)), values).flatten(1, 2)
        return low_of(out), visible.logsumexp(-1)

    truth, true_lse = compute(precise=True)
    square, lse_square = torch.zeros_like(truth), torch.zeros_like(true_lse)
    for _ in range(draws):
        out, lse = compute(precise=False)
        square += (out - truth).square() / draws
        lse_square += (lse - true_lse).nan_to_num(0.0).square() / draws
    return square.sqrt(), lse_square.mean().sqrt()
