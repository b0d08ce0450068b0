"""The page as numbers: what csrc/format.h says, for Python."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMAT_VERSION = 2
PARAM_BITS = (8, 16)
MAX_HADAMARD = 64
MAX_HEAD_DIM = 1024
MAX_CODE_BITS = 8
BITS = (2, 4, 8)
PAGE_TOKENS = (32, 64, 128)
FINE_VALUES = (0, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def largest_block(dim: int) -> int:
    """The largest power of two up to :data:`MAX_HADAMARD` that divides ``dim``."""
    return min(dim & -dim, MAX_HADAMARD)


def default_value_group(value_dim: int, step: int = 16) -> int:
    """The multiple of ``step`` that divides ``value_dim`` and lies nearest to 64 (by ratio; the larger of two)."""
    groups = [g for g in range(step, value_dim + 1, step) if value_dim % g == 0]
    return min(groups, key=lambda g: (max(g / 64, 64 / g), -g))


def fine_tokens(fine_values: int) -> list[int]:
    """The tokens of a page of 64 that have fine values: the last one or two of every word of codes (csrc/format.h)."""
    return [t for t in range(64) if t % 16 >= 16 - fine_values // 4]


@dataclass(frozen=True)
class PageFormat:
    """The layout of one page: ``page_tokens`` tokens of one KV head (csrc/format.h).

    Args:
        head_dim: D, channels of a key; a multiple of 16 up to 1024.
        value_dim: Dv, channels of a value; a multiple of 16 up to 1024.
        page_tokens: G, tokens of a page: 32, 64 or 128.
        key_bits, value_bits: bits of a code: 2, 4 or 8.
        key_columns: C, columns of key codes; a multiple of 16, by default ``head_dim``.
        value_group: Gv, channels of a value that share a scale; a multiple of 16 that divides ``value_dim``, by
            default the one nearest to 64 (with ``value_param_bits`` 8: that the largest Hadamard block divides).
        key_param_bits: 16 (min-max: fp16 scale and zero) or 8 (MSE-searched: logarithmic scale, zero in eighths).
        value_param_bits: 16 (min-max) or 8 (MSE-searched: Hadamard-rotated values, a logarithmic scale, no zero).
        fine_values: how many tokens of a page have values of 4 bits (:attr:`fine_tokens`): 0; or 8, or 4 with a
            ``value_dim`` that is a multiple of 64, where a page has 64 tokens, values of 2 bits with 8-bit parameters,
            and a ``value_group`` that is a multiple of 32.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    head_dim: int
    value_dim: int = 0
    page_tokens: int = 64
    key_bits: int = 2
    value_bits: int = 2
    key_columns: int = 0
    value_group: int = 0
    key_param_bits: int = 16
    value_param_bits: int = 16
    fine_values: int = 0

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {what}, got {getattr(self, field)!r}")

        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        for field in ("head_dim", "value_dim"):
            dim = getattr(self, field)
            need(16 <= dim <= MAX_HEAD_DIM and dim % 16 == 0, field, f"a multiple of 16 up to {MAX_HEAD_DIM}")
        object.__setattr__(self, "key_columns", self.key_columns or self.head_dim)
        need(self.key_param_bits in PARAM_BITS, "key_param_bits", "8 or 16")
        need(self.value_param_bits in PARAM_BITS, "value_param_bits", "8 or 16")
        step = 16 if self.value_param_bits == 16 else largest_block(self.value_dim)
        object.__setattr__(self, "value_group", self.value_group or default_value_group(self.value_dim, step))
        need(self.page_tokens in PAGE_TOKENS, "page_tokens", "32, 64 or 128")
        need(self.key_bits in BITS, "key_bits", "2, 4 or 8")
        need(self.value_bits in BITS, "value_bits", "2, 4 or 8")
        most = self.head_dim * (MAX_CODE_BITS // self.key_bits)
        need(
            16 <= self.key_columns <= most and self.key_columns % 16 == 0,
            "key_columns",
            f"a multiple of 16 up to {most}",
        )
        need(
            self.value_group >= 16 and self.value_group % 16 == 0 and self.value_dim % self.value_group == 0,
            "value_group",
            f"a multiple of 16 that divides value_dim ({self.value_dim})",
        )
        need(self.fine_values in FINE_VALUES, "fine_values", "0, 4 or 8")
        can_be_fine = (self.page_tokens, self.value_bits, self.value_param_bits) == (64, 2, 8)
        need(
            self.fine_values == 0 or (can_be_fine and self.value_group % 32 == 0),
            "fine_values",
            "0 but with page_tokens 64, value_bits 2, value_param_bits 8 and a value_group that is a multiple of 32",
        )
        need(
            self.fine_values != 4 or self.value_dim % 64 == 0,
            "fine_values",
            "0 or 8 unless value_dim is a multiple of 64",
        )

    @property
    def needs_map(self) -> bool:
        """Whether pages need a column map; where columns are as many as channels, they may have one."""
        return self.key_columns != self.head_dim

    @property
    def key_code_words(self) -> int:
        return self.key_columns * self.key_bits // 32

    @property
    def value_code_rows(self) -> int:
        return self.page_tokens * self.value_bits // 32

    @property
    def value_groups(self) -> int:
        return self.value_dim // self.value_group

    @property
    def fine_tokens(self) -> tuple[int, ...]:
        """The tokens of a page whose values have 4 bits (:func:`fine_tokens`)."""
        return tuple(fine_tokens(self.fine_values))

    @property
    def mse_searched(self) -> bool:
        """Whether parameters of keys or values are searched, not the range of the elements."""
        return self.key_param_bits == 8 or self.value_param_bits == 8

    @property
    def hadamard_block(self) -> int:
        """Channels of a value that are rotated together; 1 where values are stored as they are."""
        return largest_block(self.value_group) if self.value_param_bits == 8 else 1

    @property
    def sections(self) -> tuple[int, int, int, int, int]:
        """Words of the five parts of a page: key codes, key params, value codes, value params, fine digits."""
        return (
            self.page_tokens * self.key_code_words,
            self.head_dim * self.key_param_bits // 16,
            self.value_code_rows * self.value_dim,
            self.value_groups * self.page_tokens // (4 if self.value_param_bits == 8 else 1),
            self.fine_values * self.value_dim // 16,
        )

    @property
    def words(self) -> int:
        """32-bit words of one page."""
        return sum(self.sections)

    @property
    def nbytes(self) -> int:
        """Bytes of one page."""
        return 4 * self.words

    @property
    def bits_per_element(self) -> float:
        """Bits per cached key or value element, codes and parameters."""
        return 32 * self.words / (self.page_tokens * (self.head_dim + self.value_dim))

    def fields(self) -> list[int]:
        """The eleven integers that describe a format in operator schemas and files (csrc/format.h)."""
        # Not dataclasses.astuple, which copies: every operator call of every layer comes by here.
        return [
            FORMAT_VERSION,
            self.head_dim,
            self.value_dim,
            self.page_tokens,
            self.key_bits,
            self.value_bits,
            self.key_columns,
            self.value_group,
            self.key_param_bits,
            self.value_param_bits,
            self.fine_values,
        ]

    @classmethod
    def from_fields(cls, fields: list[int]) -> PageFormat:
        """The inverse of :meth:`fields`, and of those of version 1, which has no ``fine_values``."""
        count = 10 if fields[:1] == [1] else 11
        if len(fields) != count:
            raise ValueError(f"format must have {count} fields, got {len(fields)}")
        version, *own = fields
        if version not in (1, FORMAT_VERSION):
            raise ValueError(f"format version must be 1 or {FORMAT_VERSION}, got {version}")
        return cls(*own)
