"""Methods by name: what is registered, in which order, and how a new one is taken."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest
from transformers import DynamicCache

from logquant import LogQuantConfig
from logquant.methods import Full, registry
from logquant.methods.layers.base import Settings
from logquant.methods.registry import CacheSpec, method, method_names, parse_cache
from tests.helpers.methods import NAMES
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = ["logquant", "fine", "small", "log", "recent", "paper"]
LIBRARIES = ["quanto", "hqq"]


def test_names_have_an_order_and_every_method_is_tested():
    neighbours = ["partial", "kivi", "oscar", "turboquant", "kvarn", "occam", "kitty", "nexusquant"]
    names = [*OURS, *neighbours, *LIBRARIES, "streaming", "h2o", "clusterkv", "full"]
    assert method_names() == names
    tested = {name.partition(":")[0] for name in NAMES}
    assert set(names) - tested - {*OURS, *LIBRARIES, "full"} == set()


def test_names_of_logquant_stand_for_its_rules_and_sizes():
    assert [parse_cache(name).quantization for name in OURS] == [
        LogQuantConfig(),
        LogQuantConfig(layers="middle(key_columns=1.5;fine_values=8)"),
        LogQuantConfig(key_columns=1.0, allocate_bits=True),
        LogQuantConfig(rule="log"),
        LogQuantConfig(rule="recent"),
        LogQuantConfig(rule="log", sinks=0, key_columns=1.0, param_bits=16),
    ]
    for name in OURS:
        with pytest.raises(ValueError, match=r"a setting must be one of bits, .*, got 'rule'"):
            parse_cache(f"{name}:rule=log")


def test_a_cache_is_ours_or_full_or_a_baseline():
    kinds = {name: parse_cache(name) for name in ("logquant", "full", "kivi", "h2o")}
    assert [spec.quantization is not None for spec in kinds.values()] == [True, False, False, False]
    assert [spec.is_full for spec in kinds.values()] == [False, True, False, False]
    assert [spec.is_baseline for spec in kinds.values()] == [False, False, True, True]
    assert parse_cache("full") == CacheSpec("full", Full())
    for spec in kinds.values():  # they go to other processes
        assert pickle.loads(pickle.dumps(spec)) == spec and len({spec, pickle.loads(pickle.dumps(spec))}) == 1


@pytest.fixture
def registered(monkeypatch):
    """What is registered meanwhile is forgotten afterwards."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_a_method_is_a_dataclass_and_a_name(registered):
    @method("new")
    @dataclass(frozen=True)
    class New(Settings):
        share: float = 0.5
        kind: str = "plain"
        window: int | None = None
        dense: bool = False

        def __post_init__(self):
            self.need(0 < self.share <= 1, "share", "above 0 and at most 1")

        def make(self, config):
            return DynamicCache(config=config)

    assert method_names()[-1] == "new"
    assert parse_cache("new").settings == New()
    spec = parse_cache("new:share=0.25,kind=other,window=3,dense=True")
    assert spec.settings == New(0.25, "other", 3, True) and spec.is_baseline
    assert parse_cache("new:dense=False").settings == New()
    assert spec.replace(window=7).name == "new:share=0.25,kind=other,window=7,dense=True"
    assert isinstance(spec.make(tiny_config()), DynamicCache)
    for text, message in {
        "new:share=2": "cache 'new:share=2': share must be above 0 and at most 1, got 2.0",
        "new:share=x": "share must be a number, got 'x'",
        "new:window=1.5": "window must be a whole number, got '1.5'",
        "new:dense=1": "dense must be True or False, got '1'",
        "new:size=1": "a setting must be one of share, kind, window, dense, got 'size'",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_cache(text)
    with pytest.raises(ValueError, match="method 'new' is registered twice"):
        method("new")(New)
