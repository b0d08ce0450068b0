"""OSCAR (arXiv 2605.17757): rotations from what attends to keys and values, clipped 2-bit codes of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..attention.call import AttentionCall
from ..attention.handle import handles
from ..attention.view import View
from ..attention.weights import attention_weights
from ..format import BITS
from ..ops.reference.hadamard import hadamard
from .layers.base import Baseline, need_powers_of_two
from .layers.minmax import MinMax
from .layers.quantized import QuantizingLayer
from .registry import method


@method("oscar")
@dataclass(frozen=True)
class OSCAR(Baseline):
    """OSCAR (sections 3 and 4.1), with rotations from the prompt instead of from calibration data.

    A key is rotated by ``U H P``: eigenvectors of the queries' covariance ``Q^T Q``, Hadamard, bit reversal; a value
    likewise by those of ``V^T S^T S V``, S being the attention weights: the covariance of attention's outputs. The
    paper finds these once for a model; here every sequence and KV head has those of its first tokens up to when the
    first is quantised. They count as bytes that a cache holds, but not as bits of an element.

    A rotated vector is clipped at a quantile of its magnitudes and quantised (:class:`MinMax`), the oldest token at
    every step.

    Args:
        bits: of a code: 2, 4 or 8.
        group: channels that share a scale and a zero; the whole head if that has fewer.
        sinks: first tokens that stay exact; the paper's number, as that of ``recent``.
        recent: newest tokens that stay exact.
        key_clip, value_clip: quantiles, above 0 and up to 1 (no clipping); the defaults are those of the authors'
            kernels.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    bits: int = 2
    group: int = 128
    sinks: int = 64
    recent: int = 256
    key_clip: float = 0.96
    value_clip: float = 0.92

    def __post_init__(self) -> None:
        self.need(self.bits in BITS, "bits", "2, 4 or 8")
        self.need(self.group >= 16 and self.group & (self.group - 1) == 0, "group", "a power of two from 16 on")
        self.need(self.sinks >= 0, "sinks", "a whole number of tokens, 0 or more")
        self.need(self.recent >= 1, "recent", "a positive whole number")
        for field in ("key_clip", "value_clip"):
            self.need(0 < getattr(self, field) <= 1, field, "above 0 and at most 1")

    def layer(self, config: PreTrainedConfig) -> OSCARLayer:
        return OSCARLayer(self)


def rotation_for(covariance: Tensor) -> Tensor:
    """``U H P`` for covariances ``[..., D, D]``, D a power of two; to be multiplied from the right."""
    dim = covariance.shape[-1]
    eigenvectors = torch.linalg.eigh(covariance).eigenvectors.flip(-1)  # largest eigenvalue first
    order = [int(f"{i:0{dim.bit_length() - 1}b}"[::-1], 2) for i in range(dim)]
    return hadamard(eigenvectors, dim)[..., order]


class Rotated:
    """Clipped codes of rotated vectors.

    Args:
        rotation: ``[B, H, D, D]``.
        bits, group: of the codes.
        clip: the quantile of a vector's magnitudes at which it is clipped.
    """

    def __init__(self, rotation: Tensor, bits: int, group: int, clip: float) -> None:
        self.rotation, self.clip = rotation, clip
        self.minmax = MinMax(bits, min(group, rotation.shape[-1]))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rotated = x.float() @ self.rotation.float()
        magnitudes = rotated.abs().sort(-1).values
        bound = magnitudes[..., min(int(self.clip * x.shape[-1]), x.shape[-1] - 1), None]
        return self.minmax.encode(rotated.clamp(-bound, bound))

    def decode(self, codes: Tensor, params: Tensor) -> Tensor:
        return self.minmax.decode(codes, params) @ self.rotation.float().mT


class OSCARLayer(QuantizingLayer):
    """Keys and values of one layer under :class:`OSCAR`."""

    def __init__(self, settings: OSCAR) -> None:
        super().__init__(settings.sinks)
        self.settings = settings

    def _forget(self) -> None:
        super()._forget()
        self.covariances: tuple[Tensor, Tensor] | None = None
        self.rotations: tuple[Tensor, Tensor] | None = None
        self._waits = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        need_powers_of_two("OSCAR", key_states, value_states)
        super().lazy_initialization(key_states, value_states)

    def packed_tokens(self, tokens: int) -> tuple[int, int]:
        packed = max(0, tokens - self.settings.sinks - self.settings.recent)
        return packed, packed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._waits:
            raise RuntimeError(
                "OSCARLayer was not told what attended to it: the model's attention implementation must be 'logquant' "
                "or 'sdpa' (model.set_attn_implementation)"
            )
        if self.rotations is not None:
            return super().update(key_states, value_states)
        keys, values = self._append(key_states, value_states)
        self._waits = True
        return handles(View(self, keys, values, key_states.shape[2]))

    @torch.no_grad()
    def observe(self, view: View, call: AttentionCall | None) -> None:
        """Add what attended to the covariances, and choose the rotations when they are needed."""
        if call is None or not self._waits:
            return
        keys, values = view.keys, view.values
        self._waits = False
        queries = call.query.float().unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
        of_keys = queries.mT @ queries
        of_values = torch.zeros_like(values.new_empty(*values.shape[:2], *[values.shape[3]] * 2), dtype=torch.float32)
        for weights in attention_weights(call, keys, view.new):
            out = weights @ values.float()
            of_values += out.mT @ out
        if self.covariances is not None:
            of_keys, of_values = of_keys + self.covariances[0], of_values + self.covariances[1]
        self.covariances = of_keys, of_values
        if self.packed_tokens(self.tokens)[0]:
            settings = self.settings
            self.rotations = rotation_for(of_keys).to(keys.dtype), rotation_for(of_values).to(values.dtype)
            self.covariances = None
            self.key_quantizer = Rotated(self.rotations[0], settings.bits, settings.group, settings.key_clip)
            self.value_quantizer = Rotated(self.rotations[1], settings.bits, settings.group, settings.value_clip)
            self._pack()
