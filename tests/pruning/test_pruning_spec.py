"""The setting ``prune``, and how much of a prompt stays."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logquant import LogQuantConfig
from logquant.cache.slots import Slots
from logquant.methods.registry import parse_cache, parse_caches
from logquant.pruning.keydiff import KeyDiff
from logquant.pruning.snapkv import SnapKV
from logquant.pruning.spec import Budget, PruneSpec
from logquant.pruning.streaming import Streaming
from logquant.rule import evictions, split_positions


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("snapkv", PruneSpec(SnapKV())),
        ("snapkv(keep=0.25;window=8; kernel=7;pool=max)", PruneSpec(SnapKV(8, 7, "max"), keep=0.25)),
        ("keydiff(tokens=512)", PruneSpec(KeyDiff(), tokens=512)),
        ("streaming(bytes=4096;sinks=2)", PruneSpec(Streaming(2), nbytes=4096)),
    ],
)
def test_settings_are_read(text, spec):
    assert PruneSpec.parse(text) == spec
    first, second = parse_caches(f"logquant:bits=4,prune={text},recall=both(pages=0.5),full")
    assert first.quantization == LogQuantConfig(bits=4, prune=text, recall="both(pages=0.5)") and second.is_full
    assert first.quantization.prune_spec() == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2o", "pruner of prune must be one of snapkv, keydiff, streaming, got 'h2o'"),
        ("snapkv(keep=0)", "keep of prune must be a share above 0, up to 1, got 0.0"),
        ("snapkv(keep=nan)", "keep of prune must be a share above 0, up to 1, got nan"),
        ("snapkv(keep=much)", "keep of prune must be a number, got 'much'"),
        ("keydiff(tokens=0)", "tokens of prune must be a positive whole number, got 0"),
        ("keydiff(bytes=1.5)", "bytes of prune must be a whole number, got '1.5'"),
        ("keydiff(keep=0.5;bytes=64)", "prune must have one of keep, tokens, bytes, got keep, bytes"),
        ("keydiff(window=8)", "a setting of prune must be one of keep, tokens, bytes, got window"),
        ("snapkv(window=0)", "window of snapkv must be a positive number of queries, got 0"),
        ("snapkv(kernel=4)", "kernel of snapkv must be an odd number of tokens, got 4"),
        ("snapkv(pool=min)", "pool of snapkv must be avg or max, got 'min'"),
        ("streaming(sinks=-1)", "sinks of streaming must be a number of tokens, 0 or more, got -1"),
    ],
)
def test_bad_settings_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(f"cache 'logquant:prune={text}': {message}") + "$"):
        parse_cache(f"logquant:prune={text}")


def test_fine_values_are_refused():
    with pytest.raises(ValueError, match="fine_values must be 0 with prune"):
        LogQuantConfig.fine(prune="keydiff")


def test_budgets():
    def kept(page_nbytes: int | None = None, **budget) -> int:
        return Budget(PruneSpec(KeyDiff(), **budget), 64, page_nbytes).kept(2048, 1856)

    assert kept(keep=0.5) == 1024 - 192 and kept(keep=0.25) == 512 - 192 and kept(keep=1) == 1856
    assert kept(tokens=192 + 65) == 128 and kept(tokens=5) == 64 and kept(tokens=10**6) == 1856
    assert kept(1000, nbytes=3999) == 192 and kept(1000, nbytes=1) == 64


@given(
    rule=st.sampled_from(["log", "recent"]),
    sinks=st.integers(0, 4),
    prompt=st.integers(0, 600),
    keep=st.sampled_from([0.3, 0.6, 1.0]),
    changes=st.lists(st.tuples(st.booleans(), st.integers(0, 90)), max_size=6),
)
def test_slots_of_a_pruned_sequence_follow_the_rule_from_its_prompt_on(rule, sinks, prompt, keep, changes):
    """What has left since the prompt, and what is exact, is what it would be without pruning."""
    slots = Slots.empty(LogQuantConfig(window=32, rule=rule, sinks=sinks, prune=f"keydiff(keep={keep})"))
    slots = slots.append(prompt)
    left, pruned = slots.evicted, slots.evicted > slots.packed
    if left:
        assert slots.packed == min(left, max(32, -(-(keep * prompt - slots.exact) // 32) * 32))
    for appends, count in changes:
        if appends:
            after = slots.append(count) if slots.tokens else slots
        else:
            total = max(0, slots.tokens - count)
            if pruned and total and 32 * evictions(total, 32, sinks) < left:
                with pytest.raises(ValueError, match="crop must not bring back"):
                    slots.crop(count)
                continue
            after = slots.crop(count)
            if after.tokens and not pruned:
                left = min(left, after.evicted)
            elif not after.tokens:
                left, pruned = 0, False
            # The slot before is that of the same position.
            where = slots.positions()[slots.exact_before(after).long()]
            assert torch.equal(where, after.positions()[after.packed :])
        slots = after
        packed, exact = split_positions(slots.tokens, 32, rule, sinks)
        dropped = slots.evicted - slots.packed
        assert slots.evicted == len(packed) and slots.exact == len(exact) and (dropped > 0) == pruned
        positions = slots.positions()
        if pruned:
            assert torch.equal(positions[left - dropped :], torch.cat([packed[left:], exact]))
            assert not positions[: left - dropped].any()
        else:
            assert torch.equal(positions, torch.cat([packed, exact]))
        assert torch.equal(slots.restored(*slots.state()).positions(), positions)
