"""Any sequence of cache operations against a model of the rule in plain Python: positions and contents, every step."""

from __future__ import annotations

import copy
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
from logquant.files import fingerprint
from logquant.ops import reference
from logquant.quantizer.calibration import Calibration
from tests.helpers.layers import PLAIN
from tests.helpers.masks import causal_mask
from tests.helpers.models import tiny_config
from tests.helpers.rows import PlainRow

WINDOW, HEADS, DIM = 32, 1, 16
MODEL = tiny_config(num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=DIM)
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
            page = [positions[c] for c in packed[first : first + self.format.page_tokens]]
            k, v = torch.stack([self.held[p] for p in page], 1)[:, None, None].unbind(0)
            self.means.append(k[0, 0].mean(0))
            pages = reference.quantize(k, v, self.format, key_map=self.key_map)
            unpacked = torch.cat(reference.dequantize(pages, self.format, key_map=self.key_map), 1)
            for i, p in enumerate(page):
                self.held[p] = unpacked[0, :, i]
        self.packed = packed

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


class CachePrograms(RuleBasedStateMachine):
    """A cache of two layers, and rows as lists for each layer."""

    @initialize(
        rule=st.sampled_from(["log", "recent"]),
        options=st.sampled_from(
            [{"bits": 2}, {"bits": 8, "recall": "both(skip=1)"}, {"key_columns": 2.0, "calibration": CALIBRATION}]
        ),
        batch=st.integers(1, 3),
    )
    def start(self, rule: str, options: dict[str, Any], batch: int) -> None:
        self.config = LogQuantConfig(window=WINDOW, rule=rule, **PLAIN | options)
        self.cache = LogQuantCache(MODEL, self.config)
        self.batch, self.random = batch, torch.Generator().manual_seed(batch)
        self.rows = [[PlainLayerRow(self.config, i) for _ in range(batch)] for i in range(2)]
        self.recording = False
        self.others: list[tuple[LogQuantCache, list[Tensor]]] = []

    @rule(new=st.integers(1, 120), data=st.data(), padded=st.booleans())
    def prompt(self, new: int, data: st.DataObject, padded: bool) -> None:
        real = [[True] * new] * self.batch
        if padded:
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
            keys, _ = self.cache.update(k, v, i)
            mask = None if padding.all() else causal_mask(padding, new)
            keys.kv_view.attend(AttentionCall(k, mask, 1.0, causal=mask is None))
            for row, tokens, is_real in zip(rows, torch.stack([k, v], 3)[:, 0], real, strict=True):
                row.arrive(tokens, is_real, reserved)

    @property
    def columns(self) -> int:
        return self.rows[0][0].length

    @rule(columns=st.integers(0, 150))
    def crop(self, columns: int) -> None:
        self.cache.crop(-columns)
        for rows in self.rows:
            for row in rows:
                row.remove(columns)

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
            self.cache = LogQuantCache.load(Path(folder, "cache"), MODEL)

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.recording = False
        self.rows = [[PlainLayerRow(self.config, i) for _ in range(self.batch)] for i in range(2)]

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
            table, held = layer.held.layout.positions(torch.device("cpu")), layer.rows
            slots = held.slots * (self.batch // len(held.slots))
            dense = torch.stack(layer.dense(), 1)[:, :, 0]
            for own, got, row, x in zip(slots, table.expand(self.batch, -1), rows, dense, strict=True):
                packed, exact = row.layout()
                assert got[: own.packed].tolist() == packed
                assert got[held.packed : held.packed + own.exact].tolist() == exact
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
