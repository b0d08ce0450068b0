"""What a LogQuant cache keeps exact and how it stores the rest."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .channels_spec import ChannelsSpec
from .eviction.spec import EvictSpec
from .format import BITS, FINE_VALUES, PAGE_TOKENS, PARAM_BITS, PageFormat, fine_tokens
from .layers_spec import LayersSpec
from .pruning.spec import Budget, PruneSpec
from .recall_spec import RecallSpec
from .residual_spec import ResidualSpec
from .rule import RULES, Rule


@runtime_checkable
class KeyMaps(Protocol):
    """Which key channels get which bits, the same in every sequence (:mod:`logquant.quantizer.calibration`)."""

    def key_map(self, layer: int, fmt: PageFormat, heads: int, device: torch.device) -> Tensor:
        """The bit allocation of a layer, int16 ``[1, H, C]`` (csrc/format.h)."""
        ...


@runtime_checkable
class ResidualNets(Protocol):
    """What stands for dropped tokens, trained for a model (:mod:`logquant.residual.trained`)."""

    def features(self, layer: int, device: torch.device) -> object | None:
        """Those of a layer, or None (:class:`logquant.residual.features.Features`)."""
        ...


@dataclass(frozen=True)
class LogQuantConfig:
    """Settings of a cache; by default 2 bits, and the tokens exact that are attended to most.

    :meth:`paper` is plain LogQuant (arXiv 2503.19950); :meth:`fine` takes more bytes and loses less, :meth:`small` the
    reverse.

    Args:
        bits: bits of a quantised key or value element: 2, 4 or 8.
        key_bits, value_bits: the same for keys and values alone; ``bits`` by default.
        window: W: between 2W and 3W tokens stay exact. A multiple of ``page_tokens``.
        page_tokens: tokens of a page: 32, 64 or 128; by default 64, or 32 where 64 does not divide ``window``.
        value_group: channels of a value that share a scale: a multiple of 16 that divides the value dimension; by
            default the one nearest to 64.
        rule: ``"attention"`` keeps the tokens that the newest queries attend to most, besides the newest W;
            ``"log"`` keeps tokens ever more sparsely with distance, as the paper does; ``"recent"`` keeps the newest.
        sinks: first tokens that always stay exact, besides the window.
        key_columns: columns of key codes for each key channel, on average: they go to the channels that queries look at
            most (csrc/format.h). 1 gives each channel one, unless ``allocate_bits``; by default 1.25 for keys of 2
            bits, else 1. Rounded down so that a head has a multiple of 16.
        allocate_bits: whether columns go to the channels that queries look at most also where there are as many columns
            as channels.
        param_bits: 8 stores scales in 8 bits, fits them and rotates values, as the newest queries tell, which are kept
            (:mod:`logquant.quantizer.queries`); 16 stores the range of the elements.
        fine_values: how many tokens of a page, the most attended, have values of 4 bits: 0, or with the rule
            ``"attention"``, pages of 64 tokens, and ``value_bits`` 2 and ``param_bits`` 8, 4 (where values have a
            multiple of 64 channels) or 8.
        calibration: what says which channels get the columns, the same for every sequence: a
            :class:`logquant.quantizer.calibration.Calibration` of the model, or its file, which the cache reads. By
            default each sequence says it.
        recall: given, a decode step reads only those pages that its query asks for: ``"both"``, ``"means"`` or
            ``"bounds"``, which say how they are chosen, with settings in brackets (:mod:`logquant.recall_spec`), as in
            ``"both(pages=0.25)"``. By default all pages are read.
        prune: given, tokens of a prompt are dropped when it ends, instead of being packed: ``"snapkv"``, ``"keydiff"``
            or ``"streaming"`` says which, with settings in brackets (:mod:`logquant.pruning.spec`), as in
            ``"snapkv(keep=0.25)"``.
        evict: given, tokens are dropped as they leave the window, instead of being packed: ``"corm(window=256)"`` drops
            those that none of the newest 256 queries found important, in each KV head for itself
            (:mod:`logquant.eviction.corm`). Needs the rule ``"recent"`` and a ``window`` of at least half as many.
        residual: given, a small state stands for the tokens that ``prune`` or ``evict`` has dropped:
            ``"less(file=less.safetensors)"`` says how, and where what was trained for the model is, which the cache
            reads; or that itself, a :class:`logquant.residual.trained.Trained`.
        layers: given, some layers of a model have other ``key_bits``, ``value_bits``, ``key_columns`` or
            ``fine_values``: ``"middle(key_columns=1.5;fine_values=8)"`` or ``"10-24(value_bits=4)"`` says which, and
            what (:mod:`logquant.layers_spec`). With other ``key_bits`` and without ``key_columns`` they have as many
            columns as is the default with those.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    window: int = 64
    page_tokens: int | None = None
    value_group: int | None = None
    rule: Rule = "attention"
    sinks: int = 4
    key_columns: float | None = None
    allocate_bits: bool = False
    param_bits: int = 8
    fine_values: int = 0
    calibration: KeyMaps | str | os.PathLike[str] | None = None
    recall: str | None = None
    channels: str | None = None
    prune: str | None = None
    evict: str | None = None
    residual: ResidualNets | str | None = None
    layers: str | None = None

    @classmethod
    def paper(cls, **changes: Any) -> LogQuantConfig:
        """Plain LogQuant as the paper has it: the range of the elements in fp16, every channel alike, no extra sinks.

        Args:
            **changes: other fields.
        """
        plain: dict[str, Any] = {"rule": "log", "sinks": 0, "key_columns": 1.0, "param_bits": 16}
        return cls(**plain | changes)

    @classmethod
    def fine(cls, **changes: Any) -> LogQuantConfig:
        """More bytes, more accurate: 1.5 key columns and 8 fine values in the layers where rounding costs most.

        Args:
            **changes: other fields. What they say of columns and fine values holds in all layers.
        """
        more = {"key_columns": 1.5, "fine_values": 8}
        if {"bits", "key_bits", "channels"} & changes.keys():
            del more["key_columns"]
        more = {name: value for name, value in more.items() if name not in changes}
        settings = ";".join(f"{name}={value}" for name, value in more.items())
        return cls(**{"layers": f"middle({settings})" if more else None} | changes)

    @classmethod
    def small(cls, **changes: Any) -> LogQuantConfig:
        """Fewer bytes, less accurate: as many key columns as channels, for those that queries look at most.

        Args:
            **changes: other fields.
        """
        return cls(**{"key_columns": 1.0, "allocate_bits": True} | changes)

    def __post_init__(self) -> None:
        def resolve(field: str, default: object) -> None:
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)

        def need(ok: bool, field: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {what}, got {getattr(self, field)!r}")

        def is_count(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0

        need(self.rule in RULES, "rule", " or ".join(repr(rule) for rule in RULES))
        for field in ("bits", "key_bits", "value_bits"):
            resolve(field, self.bits)
            need(is_count(getattr(self, field)) and getattr(self, field) in BITS, field, "2, 4 or 8")
        need(is_count(self.window) and self.window > 0, "window", "a positive whole number")
        resolve("page_tokens", 32 if self.window % 64 else 64)
        need(is_count(self.page_tokens) and self.page_tokens in PAGE_TOKENS, "page_tokens", "32, 64 or 128")
        need(self.window % self.page_size == 0, "window", f"a multiple of page_tokens ({self.page_tokens})")
        need(is_count(self.sinks), "sinks", "a whole number of tokens, 0 or more")
        need(
            self.value_group is None
            or (is_count(self.value_group) and self.value_group > 0 and self.value_group % 16 == 0),
            "value_group",
            "a positive multiple of 16",
        )
        need(self.channels is None or isinstance(self.channels, str), "channels", "a text or None")
        if self.channels is not None:
            left = 1 - ChannelsSpec.parse(self.channels).ratio
            need(self.key_columns in (None, left), "key_columns", "None with channels, which says how many there are")
            need(self.calibration is None, "calibration", "None with channels, which each sequence chooses for itself")
            resolve("key_columns", left)
        resolve("key_columns", 1.25 if self.key_bits == 2 else 1.0)
        columns, most = self.key_columns, 8 // (self.key_bits or 8)
        need(
            isinstance(columns, int | float) and not isinstance(columns, bool) and 0 < columns <= most,
            "key_columns",
            f"a number above 0, up to {most} (8 / key_bits)",
        )
        need(isinstance(self.allocate_bits, bool), "allocate_bits", "True or False")
        need(is_count(self.param_bits) and self.param_bits in PARAM_BITS, "param_bits", "8 or 16")
        can_be_fine = (self.rule, self.page_tokens, self.value_bits, self.param_bits) == ("attention", 64, 2, 8)
        need(
            is_count(self.fine_values) and self.fine_values in (FINE_VALUES if can_be_fine else (0,)),
            "fine_values",
            "0, or 4 or 8 with rule 'attention', page_tokens 64, value_bits 2 and param_bits 8",
        )
        need(
            self.calibration is None or columns != 1 or self.allocate_bits,
            "calibration",
            "None where key_columns is 1 and allocate_bits False: every channel has one column",
        )
        need(
            self.calibration is None or isinstance(self.calibration, str | os.PathLike | KeyMaps),
            "calibration",
            "a Calibration, the path of its file, or None",
        )
        need(self.recall is None or isinstance(self.recall, str), "recall", "a text or None")
        if self.recall is not None:
            RecallSpec.parse(self.recall)
        need(self.prune is None or isinstance(self.prune, str), "prune", "a text or None")
        if self.prune is not None:
            PruneSpec.parse(self.prune)
            need(
                not self.fine_values, "fine_values", "0 with prune, after which tokens do not share pages by attention"
            )
        self._check_evict(need)
        self._check_residual(need)
        self._check_layers(need)

    @property
    def page_size(self) -> int:
        """``page_tokens``, which is optional only in the constructor."""
        assert self.page_tokens is not None
        return self.page_tokens

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each token of a page, which it is by attention, 0 being the most attended: fine values go to the first."""
        return _ranks(self.page_size, self.fine_values)

    def page_format(self, head_dim: int, value_dim: int | None = None) -> PageFormat:
        """The format of the pages of one KV head.

        Raises:
            ValueError: dimensions that no page can hold, or that ``value_group`` does not divide.
        """
        assert self.key_bits is not None and self.value_bits is not None
        return PageFormat(
            head_dim,
            head_dim if value_dim is None else value_dim,
            self.page_size,
            self.key_bits,
            self.value_bits,
            key_columns=self._columns_of(head_dim),
            value_group=self.value_group or 0,
            key_param_bits=self.param_bits,
            value_param_bits=self.param_bits,
            fine_values=self.fine_values,
        )

    def has_map(self, fmt: PageFormat) -> bool:
        """Whether pages of this format have a column map, which says which channels have how many columns."""
        return fmt.needs_map or self.allocate_bits

    def allocates_bits(self, fmt: PageFormat) -> bool:
        """Whether each sequence finds the bit allocation of its keys by itself, for pages of this format."""
        return self.has_map(fmt) and self.calibration is None

    def of_layer(self, layer: int, count: int) -> LogQuantConfig:
        """The settings of layer ``layer`` of a model's ``count``, which has ``layers`` no more.

        Raises:
            ValueError: ``layers`` says something of layers that the model does not have.
        """
        if self.layers is None:
            return self
        spec = LayersSpec.parse(self.layers)
        return self._with(spec.changes if spec.has(layer, count) else {})

    def _with(self, changes: dict[str, Any]) -> LogQuantConfig:
        """The same with other fields in all layers."""
        if changes.get("key_bits", self.key_bits) != self.key_bits and self.channels is None:
            changes = {"key_columns": None} | changes
        return replace(self, **{"layers": None} | changes)

    def recall_spec(self, layer: int) -> RecallSpec | None:
        """What layer ``layer`` of a model reads of its pages; None if that is all of them."""
        if self.recall is None:
            return None
        spec = RecallSpec.parse(self.recall)
        return spec if layer >= spec.skip else None

    @property
    def clusters(self) -> bool:
        """Whether the pages of a prompt are clusters of its tokens."""
        return self.recall is not None and RecallSpec.parse(self.recall).order == "clusters"

    def _columns_of(self, head_dim: int) -> int:
        """Columns of key codes of one KV head."""
        if self.channels is not None:
            return ChannelsSpec.parse(self.channels).columns(head_dim)
        assert self.key_columns is not None
        return max(16, int(head_dim * self.key_columns) // 16 * 16)

    def prune_spec(self) -> PruneSpec | None:
        """What is dropped of a prompt; None if nothing is."""
        return None if self.prune is None else PruneSpec.parse(self.prune)

    def evict_spec(self) -> EvictSpec | None:
        """What is dropped of the tokens that leave the window; None if nothing is."""
        return None if self.evict is None else EvictSpec.parse(self.evict)

    def _check_evict(self, need: Callable[[bool, str, str], None]) -> None:
        """What ``evict`` asks of itself and of other fields: whether it is so, the field, and what it must be."""
        need(self.evict is None or isinstance(self.evict, str), "evict", "a text or None")
        if self.evict is None:
            return
        least = (EvictSpec.parse(self.evict).window + 1) // 2
        need(self.rule == "recent", "rule", "'recent' with evict, which judges tokens by their age")
        need(
            self.window >= least, "window", f"{least} or more with {self.evict}, lest tokens leave before they are old"
        )
        need(self.prune is None, "prune", "None with evict, which drops tokens of prompts, too")
        need(self.recall is None, "recall", "None with evict, with which KV heads have pages of their own")

    def _check_residual(self, need: Callable[[bool, str, str], None]) -> None:
        """The same of ``residual``."""
        if self.residual is None:
            return
        need(isinstance(self.residual, str | ResidualNets), "residual", "a text, what is trained, or None")
        if isinstance(self.residual, str):
            ResidualSpec.parse(self.residual)
        drops = self.prune is not None or self.evict is not None
        need(drops, "residual", "None without prune or evict, for whose dropped tokens it stands")
        need(self.recall is None, "recall", "None with residual, which is weighed against all that is held")

    def _check_layers(self, need: Callable[[bool, str, str], None]) -> None:
        """The same of ``layers``."""
        need(self.layers is None or isinstance(self.layers, str), "layers", "a text or None")
        if self.layers is None:
            return
        spec, prune = LayersSpec.parse(self.layers), self.prune_spec()
        by_bytes = prune is not None and prune.nbytes is not None
        need(not by_bytes, "prune", "given as a share or in tokens with layers, whose pages differ in bytes")
        try:
            self._with(spec.changes)
        except ValueError as error:
            raise ValueError(f"{error}, in layers={self.layers!r}") from None

    def budget(self, head_dim: int | None) -> Budget | None:
        """What becomes of a prompt's tokens; None if all are packed as they came.

        Args:
            head_dim: channels of a key and of a value; None if they are not known.

        Raises:
            ValueError: bytes that stay are given, and ``head_dim`` is not; or a dimension that no page can hold.
        """
        spec = self.prune_spec()
        if spec is None and not self.clusters:
            return None
        by_bytes = spec is not None and spec.nbytes is not None
        page_nbytes = self.page_format(head_dim).nbytes if by_bytes and head_dim is not None else None
        return Budget(spec, self.page_size, page_nbytes, self.clusters)


@functools.cache
def _ranks(page_tokens: int, fine_values: int) -> tuple[int, ...]:
    fine = fine_tokens(fine_values)
    order = fine + [t for t in range(page_tokens) if t not in fine]
    return tuple(sorted(range(page_tokens), key=order.__getitem__))
