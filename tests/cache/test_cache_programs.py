"""Any sequence of cache operations against a model of the rule in plain Python: positions and contents, every step."""

from __future__ import annotations

import copy
import itertools
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.attention.weights import HEARD
from logquant.cache.layer import LogQuantLayer
from logquant.files import fingerprint
from logquant.ops import reference
from logquant.quantizer.calibration import Calibration
from logquant.rule import RULES, evictions
from tests.helpers.layers import PLAIN
from tests.helpers.masks import causal_mask
from tests.helpers.models import tiny_config
from tests.helpers.rows import PlainRow

WINDOW, HEADS, DIM = 32, 1, 16
MODEL = tiny_config(num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=DIM)
MAX_LENGTH = 2048
# Scores that differ from layer to layer: column maps that do not depend on the tokens.
CALIBRATION = Calibration(
    {i: torch.arange(DIM).float().roll(5 * i)[None].exp2() for i in (0, 1)}, fingerprint(MODEL), 0
)


class PlainLayerRow(PlainRow):
    """A row with contents: what each token is held as, ``[2, D]`` of key and value, by position."""

    def __init__(self, config: LogQuantConfig, layer: int) -> None:
        super().__init__(config.window, config.rule, config.sinks)
        self.format = config.page_format(DIM)
        self.key_map = None
        if config.calibration:
            self.key_map = CALIBRATION.key_map(layer, self.format, HEADS, torch.device("cpu"))
        self.held: list[Tensor] = []
        self.packed: list[int] = []
        self.means: list[Tensor] = []  # of each page, [D]

    def pack(self) -> None:
        """What the rule says is packed, and is not yet, is quantised: W tokens together, in its order."""
        packed, _ = self.layout()
        positions = {column: position for position, column in enumerate(self.real)}
        for first in range(len(self.packed), len(packed), self.format.page_tokens):
            self.quantize([positions[c] for c in packed[first : first + self.format.page_tokens]])
        self.packed = packed

    def quantize(self, page: list[int]) -> None:
        """The tokens of a page, in order, are held as it holds them."""
        k, v = torch.stack([self.held[p] for p in page], 1)[:, None, None].unbind(0)
        self.means.append(k[0, 0].mean(0))
        pages = reference.quantize(k, v, self.format, key_map=self.key_map)
        unpacked = torch.cat(reference.dequantize(pages, self.format, key_map=self.key_map), 1)
        for i, p in enumerate(page):
            self.held[p] = unpacked[0, :, i]

    def arrive(self, tokens: Tensor, new: list[bool], reserved: int) -> None:
        self.append(new, reserved)
        self.held += [token for token, real in zip(tokens, new, strict=True) if real]
        self.pack()

    def remove(self, columns: int) -> None:
        self.crop(columns)
        del self.held[len(self.real) :]
        self.decided = len(self.real)
        self.packed = self.packed[: len(self.layout()[0])]
        del self.means[len(self.packed) // self.format.page_tokens :]
        self.pack()

    def dense(self) -> Tensor:
        """``[2, columns, D]``, 0 where padding was."""
        out = torch.zeros(2, self.length, DIM)
        for column, token in zip(self.real, self.held, strict=True):
            out[:, column] = token
        return out


class ChosenLayerRow(PlainLayerRow):
    """The same under the rule ``attention``: a choice is followed, once it is seen to be one that the rule allows.

    Sums of squared attention weights are added up in another order than the layer's: which of two tokens is given less
    by a rounding error is for the layer to say.
    """

    def __init__(self, config: LogQuantConfig, layer: int) -> None:
        super().__init__(config, layer)
        # What queries have given to each exact token, by column; None once that is not followed any more.
        self.sums: dict[int, float] | None = {}
        self.exact: list[int] = []

    def layout(self) -> tuple[list[int], list[int]]:
        return self.packed, self.exact

    def pack(self) -> None:
        """Which tokens leave is for :meth:`follow` to see."""

    @property
    def is_due(self) -> bool:
        """Whether tokens leave now."""
        return evictions(self.decided, self.window, self.sinks) * self.window > len(self.packed)

    def arrive(self, tokens: Tensor, new: list[bool], reserved: int) -> None:
        came = [self.length + i for i, real in enumerate(new) if real]
        super().arrive(tokens, new, reserved)
        self.exact += came
        if reserved:
            self.sums = None
        if self.sums is None:
            return
        contents = dict(zip(self.real, self.held, strict=True))
        self.sums |= dict.fromkeys(came, 0.0)
        keys = torch.stack([contents[column][0] for column in self.exact]) if came else torch.empty(0)
        for column in came[-HEARD:]:
            seen = sum(other <= column for other in self.exact)
            weights = (keys[:seen].double() @ contents[column][0].double()).softmax(0).tolist()
            for other, weight in zip(self.exact, weights, strict=False):
                self.sums[other] += weight**2

    def follow(self, packed: list[int], exact: list[int]) -> None:
        """The layer says that these are packed, in this order."""
        count = evictions(self.decided, self.window, self.sinks) * self.window
        assert len(packed) == count and packed[: len(self.packed)] == self.packed
        leaving, size = packed[len(self.packed) :], self.format.page_tokens
        assert sorted(packed + exact) == self.real and exact == sorted(exact)
        decided = [column for column in self.exact if column in set(self.real[: self.decided])]
        middle = decided[self.sinks : len(decided) - self.window]
        assert set(leaving) <= set(middle)
        pages = [leaving[i : i + size] for i in range(0, len(leaving), size)]
        assert all(max(page) < min(later) for page, later in itertools.pairwise(pages))
        held = dict(zip(self.real, range(len(self.real)), strict=True))
        if leaving and self.sums is not None:
            cost = {c: math.sqrt(self.sums[c]) * self.held[held[c]][1].double().norm().item() for c in middle}
            stays = min((cost[c] for c in middle if c not in set(leaving)), default=math.inf)
            assert max(cost[c] for c in leaving) <= stays * (1 + 1e-4)
            for page in pages:
                assert all(cost[a] * (1 + 1e-4) >= cost[b] for a, b in itertools.pairwise(page))
        for page in pages:
            self.quantize([held[column] for column in page])
        if leaving:
            self.sums = None if self.sums is None else dict.fromkeys(exact, 0.0)
        self.packed, self.exact = packed, exact

    def remove(self, columns: int) -> None:
        self.crop(columns)
        del self.held[len(self.real) :]
        self.decided = len(self.real)
        left = evictions(self.decided, self.window, self.sinks) * self.window
        self.packed = self.packed[:left]
        del self.means[left // self.format.page_tokens :]
        self.exact = sorted(set(self.real) - set(self.packed))
        if self.sums is not None:
            self.sums = {column: self.sums.get(column, 0.0) for column in self.exact}


class CachePrograms(RuleBasedStateMachine):
    """A cache of two layers, and rows as lists for each layer."""

    @initialize(
        rule=st.sampled_from(RULES),
        options=st.sampled_from(
            [
                {"bits": 2},
                {"bits": 8, "recall": "both(skip=1)"},
                {"key_columns": 2.0, "calibration": CALIBRATION},
                {"allocate_bits": True, "calibration": CALIBRATION},
            ]
        ),
        batch=st.integers(1, 3),
        fixed=st.booleans(),
    )
    def start(self, rule: str, options: dict[str, Any], batch: int, fixed: bool) -> None:
        self.config = LogQuantConfig(window=WINDOW, **PLAIN | options | {"rule": rule})
        self.max_length = MAX_LENGTH if fixed and self.config.recall is None else None
        self.cache = LogQuantCache(MODEL, self.config, max_length=self.max_length)
        self.batch, self.random = batch, torch.Generator().manual_seed(batch)
        self.rows = self.empty_rows()
        self.recording = False
        self.others: list[tuple[LogQuantCache, list[Tensor]]] = []

    def empty_rows(self) -> list[list[PlainLayerRow]]:
        made = ChosenLayerRow if self.config.rule == "attention" else PlainLayerRow
        return [[made(self.config, i) for _ in range(self.batch)] for i in range(2)]

    @rule(new=st.integers(1, 120), data=st.data(), padded=st.booleans())
    def prompt(self, new: int, data: st.DataObject, padded: bool) -> None:
        real = [[True] * new] * self.batch
        # A step of a cache of fixed size is a token of each row.
        if padded and (new > 1 or self.max_length is None):
            pads = data.draw(st.lists(st.integers(0, new), min_size=self.batch, max_size=self.batch))
            left = data.draw(st.booleans())
            real = [[(i >= p) if left else (i < new - p) for i in range(new)] for p in pads]
        self.arrive(real)

    @rule(steps=st.integers(1, 40))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.arrive([[True]] * self.batch)

    def arrive(self, real: list[list[bool]]) -> None:
        new = len(real[0])
        padding = torch.zeros(self.batch, self.columns + new, dtype=torch.long)
        for i, row in enumerate(self.rows[0]):
            padding[i, row.real] = 1
        padding[:, self.columns :] = torch.tensor(real)
        reserved = max(WINDOW, new) if self.recording else 0
        for i, rows in enumerate(self.rows):
            k, v = (torch.randn(self.batch, HEADS, new, DIM, generator=self.random) for _ in range(2))
            mask = None if padding.all() else causal_mask(padding, new)
            # With gradients there are no steps of fixed size, nor any that are taken together (plain_steps.py).
            with torch.no_grad():
                keys, _ = self.cache.update(k, v, i)
                keys.kv_view.attend(AttentionCall(k, mask, 1.0, causal=mask is None and new > 1))
            for row, tokens, is_real in zip(rows, torch.stack([k, v], 3)[:, 0], real, strict=True):
                row.arrive(tokens, is_real, reserved)
        self.follow()

    def follow(self) -> None:
        """Where tokens leave by choice, the rows learn which."""
        for layer, rows in zip(self.cache.layers, self.rows, strict=True):
            if not any(isinstance(row, ChosenLayerRow) and row.is_due for row in rows):
                continue
            layer.commit()
            for row, (packed, exact) in zip(rows, self.tables(layer), strict=True):
                row.follow(packed, exact)

    def tables(self, layer: LogQuantLayer) -> list[tuple[list[int], list[int]]]:
        """Positions of packed and of exact tokens of each row of a layer."""
        table, held = layer.held.layout.positions(torch.device("cpu")).expand(self.batch, -1).tolist(), layer.rows
        each = zip(held.each(self.batch), table, strict=True)
        return [(got[: own.packed], got[held.packed : held.packed + own.exact]) for own, got in each]

    @property
    def columns(self) -> int:
        return self.rows[0][0].length

    @rule(columns=st.integers(0, 150))
    def crop(self, columns: int) -> None:
        self.cache.crop(-columns)
        for rows in self.rows:
            for row in rows:
                row.remove(columns)
        self.follow()

    @rule()
    def record(self) -> None:
        self.cache.activate_past_recording()
        self.recording = True

    def select(self, pick: list[int]) -> None:
        self.rows = [[copy.deepcopy(rows[i]) for i in pick] for rows in self.rows]
        self.batch = len(pick)

    @precondition(lambda self: self.cache.is_initialized)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        beams = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        self.cache.reorder_cache(torch.tensor(beams))
        self.select(beams)

    @precondition(lambda self: self.cache.is_initialized and self.batch < 4)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self.select([i for i in range(self.batch) for _ in range(repeats)])

    @precondition(lambda self: self.cache.is_initialized)
    @rule(data=st.data())
    def keep_some(self, data: st.DataObject) -> None:
        pick = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        self.cache.batch_select_indices(torch.tensor(pick))
        self.select(pick)

    @rule(go_on_with_copy=st.booleans())
    def deepcopy(self, go_on_with_copy: bool) -> None:
        """What happens to one of two copies does not show in the other."""
        twin = copy.deepcopy(self.cache)
        kept, self.cache = (self.cache, twin) if go_on_with_copy else (twin, self.cache)
        self.others = [*self.others[-1:], (kept, self.contents(kept))]

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder, "cache"))
            self.cache = LogQuantCache.load(Path(folder, "cache"), MODEL, max_length=self.max_length)

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.recording = False
        self.rows = self.empty_rows()

    @staticmethod
    def contents(cache: LogQuantCache) -> list[Tensor]:
        return [x for layer in cache.layers if layer.is_initialized for x in layer.dense()]

    @invariant()
    def positions_and_contents_are_those_of_the_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.commit()
        assert self.cache.get_seq_length() == self.columns
        for layer, rows in zip(self.cache.layers, self.rows, strict=True):
            if not layer.is_initialized:
                assert self.columns == 0
                continue
            dense = torch.stack(layer.dense(), 1)[:, :, 0]
            for got, row, x in zip(self.tables(layer), rows, dense, strict=True):
                assert got == row.layout()
                assert torch.equal(x, row.dense())

    @invariant()
    def means_are_those_of_the_pages(self) -> None:
        for layer, rows in zip(self.cache.layers, self.rows, strict=True) if hasattr(self, "cache") else ():
            index = layer.held.storage.index if layer.is_initialized else None
            assert (index is None) == (layer._index == 0 or self.config.recall is None or not layer.is_initialized)
            for i, row in enumerate(rows if index else ()):
                means = (index.means[i, 0] * index.scales[i, 0, :, None])[: len(row.means)]
                want = torch.stack(row.means) if row.means else means
                assert ((means - want).abs().amax(-1) <= want.abs().amax(-1) / 253).all()

    @invariant()
    def copies_are_as_they_were(self) -> None:
        for cache, contents in getattr(self, "others", []):
            assert all(torch.equal(a, b) for a, b in zip(self.contents(cache), contents, strict=True))


TestCachePrograms = CachePrograms.TestCase
TestCachePrograms.settings = settings(
    max_examples=10 if os.environ.get("LOGQUANT_HYPOTHESIS") == "brief" else 100, stateful_step_count=12, deadline=None
)
