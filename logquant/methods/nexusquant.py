"""NexusQuant (github.com/jagmarques/nexusquant): keys without RoPE, Hadamard, points of an E8 lattice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from ..ops.reference.hadamard import hadamard
from ..ops.reference.words import PARAM_MAX
from ..rule import evictions
from .layers.base import Baseline, need_powers_of_two
from .layers.quantized import QuantizingLayer
from .layers.rope import move_keys, rope_frequencies
from .registry import method


@method("nexusquant")
@dataclass(frozen=True)
class NexusQuant(Baseline):
    """NexusQuant without eviction (its paper's stages 3 to 5), besides exact tokens as ``recent`` has.

    Keys are turned back by RoPE, as if all had come at position 0. A vector is rotated (Hadamard) and divided by a
    scale of 16 bits so that its largest element becomes ``2^bits / 2``; every 8 channels are then rounded to the
    nearest point of a lattice: whole numbers with an even sum, as in E8, or halves of odd numbers with any sum, the
    authors' "relaxed parity". Points stay within the largest element's cube.

    The authors call this 2.0 bits: the logarithm of 4 levels. But the cube holds 260,849 points (65,536 of them
    halves), so that what tells them apart takes 18 bits for 8 channels, which is what is counted here: 2.25 bits, and
    the scale. They then code differences with zstd, which leaves nothing to attend to; that is not here. Neither is
    eviction, and which tokens stay exact is our choice: theirs quantises a prompt as a whole, and no token after it.
    Their code, against their paper, makes an odd sum even where rounding costs most, not least; here it is least.

    Args:
        key_bits, value_bits: of a channel, as the authors count them: 2, 3 or 4.
        window: W: between 2W and 3W of the newest tokens stay exact.
        sinks: first tokens that stay exact.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    key_bits: int = 2
    value_bits: int = 2
    window: int = 64
    sinks: int = 4

    def __post_init__(self) -> None:
        for field in ("key_bits", "value_bits"):
            self.need(getattr(self, field) in (2, 3, 4), field, "2, 3 or 4")
        self.need(self.window > 0, "window", "a positive whole number")
        self.need(self.sinks >= 0, "sinks", "a whole number of tokens, 0 or more")

    def layer(self, config: PreTrainedConfig) -> NexusQuantLayer:
        return NexusQuantLayer(self, rope_frequencies(config))


def nearest_point(x: Tensor, most: int) -> Tensor:
    """The nearest point of the lattice to ``x`` ``[..., 8]``, both with elements from ``-most`` to ``most``."""
    whole = x.round()
    # An odd sum becomes even where it costs least: at the element that is furthest from its whole number.
    at = (x - whole).abs().argmax(-1, keepdim=True)
    element, rounded = x.gather(-1, at), whole.gather(-1, at)
    step = torch.where((element >= rounded) & (rounded < most), 1, -1)
    odd = whole.sum(-1, keepdim=True) % 2 != 0
    whole = whole.scatter(-1, at, torch.where(odd, rounded + step, rounded))
    halves = x.floor().clamp_max(most - 1) + 0.5
    nearer = (x - halves).square().sum(-1, keepdim=True) < (x - whole).square().sum(-1, keepdim=True)
    return torch.where(nearer, halves, whole)


class Lattice:
    """Points of the lattice, numbered, and scales of vectors.

    A number has ``8 * bits + 2`` bits: that of a point of halves comes first, its elements being digits, then those of
    points of whole numbers, whose sums and thereby numbers are even, halved.

    Args:
        bits: of a channel, as the authors count them.
    """

    def __init__(self, bits: int) -> None:
        self.bits, self.most = bits, 2 ** (bits - 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers, uint8 ``[B, H, n, D / 8 * bits + ceil(D / 32)]``, and scales, float16 ``[B, H, n, 1]``."""
        rotated = hadamard(x.float(), x.shape[3])
        scale = (rotated.abs().amax(-1, keepdim=True) / self.most).clamp_max(PARAM_MAX).half()
        scaled = torch.where(scale > 0, rotated / scale.float(), 0.0).clamp(-self.most, self.most)
        return self._packed(self._number(nearest_point(scaled.unflatten(-1, (-1, 8)), self.most))), scale

    def decode(self, numbers: Tensor, scale: Tensor) -> Tensor:
        rotated = self._point(self._unpacked(numbers)).flatten(-2) * scale.float()
        return hadamard(rotated, rotated.shape[3])

    def _number(self, point: Tensor) -> Tensor:
        digits, base = (point + self.most).floor().long(), 2 * self.most
        of_halves, of_whole = ((digits * _places(b, digits.device)).sum(-1) for b in (base, base + 1))
        number: Tensor = torch.where(point[..., 0] % 1 != 0, of_halves, base**8 + of_whole // 2)
        return number

    def _point(self, number: Tensor) -> Tensor:
        base = 2 * self.most
        is_half = number[..., None] < base**8
        numbers = number[..., None], 2 * (number[..., None] - base**8)
        halves, whole = (n // _places(b, n.device) % b for n, b in zip(numbers, (base, base + 1), strict=True))
        point: Tensor = torch.where(is_half, halves + 0.5, whole.float()) - self.most
        return point

    def _packed(self, number: Tensor) -> Tensor:
        low = number[..., None] >> 8 * torch.arange(self.bits, device=number.device) & 255
        top = F.pad(number >> 8 * self.bits, (0, -number.shape[-1] % 4)).unflatten(-1, (-1, 4))
        top = (top << 2 * torch.arange(4, device=number.device)).sum(-1)
        return torch.cat([low.flatten(-2), top], -1).to(torch.uint8)

    def _unpacked(self, packed: Tensor) -> Tensor:
        count = packed.shape[-1] * 4 // (4 * self.bits + 1)
        low, top = packed.long().tensor_split([count * self.bits], -1)
        low = low.unflatten(-1, (-1, self.bits)) << 8 * torch.arange(self.bits, device=packed.device)
        top = (top[..., None] >> 2 * torch.arange(4, device=packed.device) & 3).flatten(-2)[..., :count]
        number: Tensor = low.sum(-1) + (top << 8 * self.bits)
        return number


def _places(base: int, device: torch.device) -> Tensor:
    """What eight digits stand for."""
    return torch.tensor([base**i for i in range(8)], device=device)


class UnmovedKeys(Lattice):
    """Keys without RoPE. They are encoded in order, and decoded from any of them to the last.

    Args:
        bits: as for :class:`Lattice`.
        frequencies: of RoPE.
        first: position of the first key.
    """

    def __init__(self, bits: int, frequencies: Sequence[float], first: int) -> None:
        super().__init__(bits)
        self.frequencies, self.end = frequencies, first

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.end += x.shape[2]
        return super().encode(move_keys(x.float(), self.frequencies, -self._positions(x.shape[2])))

    def decode(self, numbers: Tensor, scale: Tensor) -> Tensor:
        return move_keys(super().decode(numbers, scale), self.frequencies, self._positions(numbers.shape[2]))

    def _positions(self, count: int) -> Tensor:
        return torch.arange(self.end - count, self.end, dtype=torch.float64)[:, None]


class NexusQuantLayer(QuantizingLayer):
    """Keys and values of one layer under :class:`NexusQuant`.

    Args:
        settings: the rule.
        frequencies: of RoPE; None for a model without.
    """

    def __init__(self, settings: NexusQuant, frequencies: Sequence[float] | None) -> None:
        super().__init__(settings.sinks)
        self.settings, self.frequencies = settings, frequencies

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        need_powers_of_two("NexusQuant", key_states, value_states)
        super().lazy_initialization(key_states, value_states)
        bits, frequencies = self.settings.key_bits, self.frequencies
        self.key_quantizer = Lattice(bits) if frequencies is None else UnmovedKeys(bits, frequencies, self.sinks)
        self.value_quantizer = Lattice(self.settings.value_bits)

    def packed_tokens(self, tokens: int) -> tuple[int, int]:
        window = self.settings.window
        packed = window * evictions(tokens, window, self.settings.sinks)
        return packed, packed
