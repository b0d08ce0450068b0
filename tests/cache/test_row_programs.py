"""Any sequence of operations on a batch, with any of the features that go by rows: each row holds, bit for bit, what it
holds in a cache of its own, and its queries get what they get there."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.attention.view import MAX_FUSED_QUERIES
from logquant.cache.layer import LogQuantLayer
from tests.helpers.layers import PLAIN, row_contents
from tests.helpers.masks import causal_mask
from tests.helpers.models import tiny_config
from tests.helpers.residual import write_features

HEADS, DIM = 2, 32
MODEL = tiny_config(num_hidden_layers=1, num_attention_heads=2 * HEADS, num_key_value_heads=HEADS, head_dim=DIM)
RECALL = {"recall": "both(pages=0.4;skip=0)"}
# A directory for as long as the tests run.
FILES = tempfile.TemporaryDirectory()
LESS = {"residual": write_features(Path(FILES.name, "less"), MODEL)}
THINK = {"channels": "think(ratio=0.5)", "key_columns": None}
FEATURES: list[dict[str, Any]] = [
    {"prune": "keydiff(keep=0.4)"},
    {"prune": "snapkv(tokens=200;window=16)"},
    {"prune": "streaming(bytes=1400)"},
    {"prune": "keydiff(keep=0.4)"} | RECALL,
    {"prune": "snapkv(keep=0.6;window=16)", "recall": "bounds(pages=0.4;skip=0)"},
    {"prune": "keydiff(keep=0.5)"} | THINK,
    THINK | RECALL,
    RECALL,
    {"recall": "both(pages=0.4;skip=0;order=clusters)"},
    {"prune": "keydiff(keep=0.6)", "recall": "means(pages=0.4;skip=0;order=clusters)"} | THINK,
    *({"evict": f"corm(window={queries})", "rule": "recent"} for queries in (3, 20, 64)),
    {"prune": "keydiff(keep=0.4)"} | LESS,
    {"evict": "corm(window=3)", "rule": "recent"} | LESS,
]


def contents(layer: LogQuantLayer, row: int) -> list[Tensor]:
    """What a row holds: of each of its heads the pages, and how many tokens of them there are; exact tokens; a map."""
    layer.commit()
    held, slots = layer.held.ragged, layer.rows.slots[row if len(layer.rows.slots) > 1 else 0]
    if held is None:
        key_map = layer.held.advice.key_map
        return [*row_contents(layer, row), *([] if key_map is None else [key_map[row]])]
    first = int(held.counts[:row].sum())
    pages = held.pool[first : first + int(held.counts[row].sum())]
    exact = [x[row, :, : slots.exact] for x in (layer.held.storage.window_k, layer.held.storage.window_v, held.named)]
    return [held.counts[row], held.kept[row], pages, *exact]


def copied(cache: LogQuantCache) -> LogQuantCache:
    """A copy, in which everything is committed."""
    twin = copy.deepcopy(cache)
    twin.commit()
    return twin


class RowPrograms(RuleBasedStateMachine):
    """A batch, and for each of its rows a cache of its own.

    Attributes:
        stepped: whether the last tokens were single ones, with nothing between that commits them.
    """

    @initialize(
        features=st.sampled_from(FEATURES),
        batch=st.integers(1, 3),
        kept=st.sampled_from(["recent", "log"]),
        sinks=st.sampled_from([0, 4]),
        in_files=st.booleans(),
    )
    def begin(self, features: dict[str, Any], batch: int, kept: str, sinks: int, in_files: bool) -> None:
        self.config = LogQuantConfig(**PLAIN | {"rule": kept, "window": 32, "sinks": sinks} | features)
        self.directory = tempfile.gettempdir() if in_files and not self.config.evict else None
        self.cache = LogQuantCache(MODEL, self.config, page_directory=self.directory)
        self.batch, self.stepped = batch, False
        self.random = torch.Generator().manual_seed(batch)
        self.alone = [LogQuantCache(MODEL, self.config) for _ in range(batch)]
        self.real: list[list[bool]] = [[] for _ in range(batch)]

    @rule(new=st.integers(100, 300), data=st.data(), padded=st.booleans())
    def prompt(self, new: int, data: st.DataObject, padded: bool) -> None:
        pads = [0] * self.batch
        if padded:
            pads = data.draw(st.lists(st.integers(0, new), min_size=self.batch, max_size=self.batch))
        left = data.draw(st.booleans())
        self.arrive([[(i >= p) if left else (i < new - p) for i in range(new)] for p in pads])
        self.stepped = False

    @rule(steps=st.integers(1, 40))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.arrive([[True]] * self.batch)
        self.stepped = True

    def arrive(self, came: list[list[bool]]) -> None:
        new = len(came[0])
        k, v = (torch.randn(self.batch, HEADS, new, DIM, generator=self.random) for _ in range(2))
        # The second half of the heads looks at few tokens.
        focus = torch.tensor([1, 1, 9, 9]).view(-1, 1, 1)
        q = torch.randn(self.batch, 2 * HEADS, new, DIM, generator=self.random) * focus
        self.real = [before + own for before, own in zip(self.real, came, strict=True)]
        padding = torch.tensor(self.real)
        mask = None if padding.all() else causal_mask(padding, new)
        keys, _ = self.cache.update(k, v, 0)
        out = keys.kv_view.attend(AttentionCall(q, mask, 0.25, causal=mask is None))
        for i, (own, cache) in enumerate(zip(came, self.alone, strict=True)):
            if any(own):
                keys, _ = cache.update(k[i : i + 1, :, own], v[i : i + 1, :, own], 0)
                want = keys.kv_view.attend(AttentionCall(q[i : i + 1, :, own], None, 0.25, causal=True))
                # Of many queries none chooses pages.
                if new == sum(own) or sum(own) > MAX_FUSED_QUERIES or not self.config.recall:
                    assert torch.allclose(out[i : i + 1, :, own], want, atol=1e-3, rtol=1e-3)

    # What removed queries have named stays named by CORM, unless they came with the last call: with a prompt, a row by
    # itself may have been called another time.
    @precondition(lambda self: self.cache.is_initialized and (self.stepped or not self.config.evict))
    @rule(columns=st.integers(0, 120))
    def crop(self, columns: int) -> None:
        columns = min(columns, len(self.real[0]))
        tokens = [sum(row[len(row) - columns :]) for row in self.real]
        try:
            for cache, count in zip(self.alone, tokens, strict=True):
                cache.layers[0].check_crop(-count)
        except ValueError:
            with pytest.raises(ValueError, match="crop must not bring back"):
                self.cache.crop(-columns)
            return
        self.cache.crop(-columns)
        self.real = [row[: len(row) - columns] for row in self.real]
        for cache, count in zip(self.alone, tokens, strict=True):
            cache.crop(-count)

    @precondition(lambda self: self.cache.is_initialized)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        pick = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        if len(pick) == self.batch:
            self.cache.reorder_cache(torch.tensor(pick))
        else:
            self.cache.batch_select_indices(torch.tensor(pick))
        self.alone = [copy.deepcopy(self.alone[i]) for i in pick]
        self.real, self.batch = [self.real[i] for i in pick], len(pick)

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder, "cache"))
            self.cache = LogQuantCache.load(Path(folder, "cache"), MODEL)
        self.stepped = False

    @rule()
    def deepcopy(self) -> None:
        self.cache = copy.deepcopy(self.cache)
        self.stepped = False

    @rule()
    def move(self) -> None:
        self.cache.to("cpu")
        self.stepped = False

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.alone = [LogQuantCache(MODEL, self.config) for _ in range(self.batch)]
        self.real = [[] for _ in range(self.batch)]

    @invariant()
    def rows_hold_what_they_hold_alone(self) -> None:
        if not getattr(self, "cache", None) or not self.cache.is_initialized:
            return
        # What is looked into is committed.
        cache = copied(self.cache)
        for i, (alone, real) in enumerate(zip(self.alone, self.real, strict=True)):
            assert alone.get_seq_length() == sum(real)
            if sum(real):
                own = copied(alone).layers[0]
                pairs = zip(contents(cache.layers[0], i), contents(own, 0), strict=True)
                assert all(torch.equal(got, want) for got, want in pairs)
                # Sums of products, which a batch may add up in another order.
                if self.config.residual:
                    got, want = (x.held.storage.residual.sums for x in (cache.layers[0], own))
                    assert torch.allclose(got[i], want[0], rtol=1e-3, atol=1e-3)


TestRowPrograms = RowPrograms.TestCase
TestRowPrograms.settings = settings(
    max_examples=8 if os.environ.get("LOGQUANT_HYPOTHESIS") == "brief" else 60, stateful_step_count=10, deadline=None
)
