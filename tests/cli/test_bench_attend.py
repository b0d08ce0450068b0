"""``logquant bench attend``."""

from __future__ import annotations

import json
import re

import pytest

from logquant import machine
from logquant.bench.attend import DEQUANTIZE, FULL, FUSED, RECALL
from tests.helpers.cli import run, succeed

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bench_attend_times_every_contender(json_file):
    shape = ("--heads", 4, "--kv-heads", 2, "--dim", 64, "--context", "100,300")
    output = succeed("bench", "attend", *shape, "--rounds", 3, "--json", json_file).output
    written = json.loads(json_file.read_text())
    assert written["read_bandwidth"] > 0 and [row["context"] for row in written["results"]] == [100, 300]
    row = written["results"][1]
    assert row["full_bytes"] == 2 * 300 * 2 * 64 * 2
    assert row["relative_error"] < 0.01
    groups = [name.partition(",")[0] for name in row["timings"]]
    assert groups == [FUSED] + 6 * [DEQUANTIZE] + 6 * [FULL.partition(",")[0]]
    fused = row["timings"][FUSED]["samples"]
    full = min((t for n, t in row["timings"].items() if n.startswith(FULL)), key=lambda t: t["median"])["samples"]
    assert row["speedup_over_full"]["samples"] == [other / own for other, own in zip(full, fused, strict=True)]
    for timing in row["timings"].values():
        assert 0 < timing["quartile1"] <= timing["median"] <= timing["quartile3"] and len(timing["samples"]) == 3
    assert "300 tokens" in output and DEQUANTIZE in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--context", "many"), "--context"),
        (("--context", "0"), "numbers must be at least 1, got '0'"),
        (("--heads", "3", "--kv-heads", "2"), "heads must be a multiple of kv_heads (2), got 3"),
        (("--bits", "5"), "bits must be 2, 4 or 8, got 5"),
        (
            ("--cache", "full"),
            "a LogQuant cache is needed, one of logquant, fine, small, log, recent, paper; got 'full'",
        ),
        (
            ("--cache", "kivi"),
            "a LogQuant cache is needed, one of logquant, fine, small, log, recent, paper; got 'kivi'",
        ),
        (("--cache", "recent:prune=keydiff"), "a cache without prune and evict is needed"),
        (("--cache", "recent:window=128,evict=corm"), "a cache without prune and evict is needed"),
        (("--cache", "fine"), "a cache without layers is needed"),
        (("--cache", "logquant,paper"), "one cache is needed, got 'logquant,paper'"),
        (("--context", "1,,2"), "whole numbers separated by commas are needed, got '1,,2'"),
        (("--kv-heads", "0"), "kv_heads must be at least 1, got 0"),
        (("--dim", "100"), "head_dim must be a multiple of 16 up to 1024, got 100"),
    ],
)
def test_bench_attend_explains_bad_arguments(args, message):
    result = run("bench", "attend", *args)
    assert result.exit_code == 2
    assert message in result.output


def test_bench_attend_says_how_much_memory_is_missing():
    result = run("bench", "attend", "--context", 10**12, "--rounds", 3)
    assert result.exit_code == 1
    assert re.search(r"Error: not enough memory: [\d,.]+ GB were asked for at once\n", result.output)


def test_bench_attend_takes_the_settings_of_its_cache(json_file):
    shape = ("--heads", 2, "--kv-heads", 2, "--dim", 64, "--context", 400, "--rounds", 3)
    read = {}
    for cache in ("logquant", "logquant:bits=8"):
        succeed("bench", "attend", *shape, "--cache", cache, "--json", json_file)
        read[cache] = json.loads(json_file.read_text())["results"][0]["packed_bytes"]
    assert read["logquant:bits=8"] > 1.2 * read["logquant"]


def test_bench_attend_times_recall(json_file):
    shape = ("--heads", 4, "--kv-heads", 2, "--dim", 64, "--context", "1000", "--rounds", 3)
    cache = "logquant:recall=both(pages=0.25)"
    output = succeed("bench", "attend", *shape, "--cache", cache, "--no-others", "--json", json_file).output
    (row,) = json.loads(json_file.read_text())["results"]
    samples = (row["timings"][name]["samples"] for name in (FUSED, RECALL))
    assert row["speedup_with_recall"]["samples"] == [every / own for every, own in zip(*samples, strict=True)]
    assert RECALL in output and list(row["timings"]) == [FUSED, RECALL]


def test_bench_attend_does_not_time_the_reference(monkeypatch):
    monkeypatch.setattr("logquant.ops.extension_error", lambda: "the moon is full")
    with pytest.raises(RuntimeError, match="there is nothing to measure: the moon is full"):
        run("bench", "attend", "--context", "100")


def test_bench_attend_refuses_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    result = run("bench", "attend", "--device", "cuda")
    assert result.exit_code == 2 and "none: " in result.output
