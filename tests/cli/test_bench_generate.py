"""``logquant bench generate``."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import transformers
from transformers.models.llama import modeling_llama

from logquant import models
from logquant.attention import forward
from logquant.bench import generate
from logquant.bench.timing import WARMUP
from tests.helpers.cli import refused, run, succeed

FULL = ["full, no mask", "full, masked"]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bench_generate_times_every_cache(model_dir, json_file):
    args = ("--model", model_dir, "--context", 300, "--batch", "1,2", "--steps", 3)
    more = ("--caches", "full,logquant:window=32", "--dtype", "float32")
    output = succeed("bench", "generate", *args, *more, "--json", json_file).output
    results = json.loads(json_file.read_text())["results"]
    assert [(row["batch"], row["cache"]) for row in results] == [
        (batch, cache) for batch in (1, 2) for cache in (*FULL, "logquant:window=32")
    ]
    for row in results:
        assert row["tokens_per_second"] == row["batch"] / row["timing"]["median"] > 0
        assert len(row["timing"]["samples"]) == 3
        tokens = 300 + 3 + 2  # two steps are not timed
        full = row["batch"] * 4 * tokens * 2 * 32 * 4
        assert row["held"] == full if row["cache"] in FULL else 0 < row["held"] < full
    assert "tokens/s" in output and "logquant:window=32" in output


def test_bench_generate_compares_round_by_round(model_dir, json_file):
    """Slow caches are in fewer rounds; a ratio is one of the same round."""
    caches = ["full", "logquant:window=32", "hqq:bits=4"]
    args = ("--model", model_dir, "--context", 200, "--batch", "2", "--steps", 6, "--baseline-steps", 3)
    succeed("bench", "generate", *args, "--caches", ",".join(caches), "--json", json_file)
    content = json.loads(json_file.read_text())
    assert content["machine"]["transformers"] == transformers.__version__
    rows, names, counts = content["results"], [*FULL, *caches[1:]], (6, 6, 6, 3)
    assert [(row["cache"], len(row["timing"]["samples"])) for row in rows] == list(zip(names, counts, strict=True))
    times = {row["cache"]: row["timing"]["samples"] for row in rows}
    faster, slower = sorted(FULL, key=lambda name: rows[FULL.index(name)]["timing"]["median"])
    for row in rows:
        assert list(row["speedups"]) == [faster, slower] and row["speedup"] == row["speedups"][faster]
        for form in FULL:
            own, full = row["timing"]["samples"], times[form][1::2] if row["cache"] == "hqq:bits=4" else times[form]
            assert row["speedups"][form]["samples"] == [f / o for f, o in zip(full, own, strict=True)]


def test_bench_generate_decodes_a_full_cache_with_and_without_a_mask(model_dir, json_file, monkeypatch):
    """In turn, into one cache, and with a mask that is one: it reaches attention."""
    seen = []
    sdpa = forward.sdpa_attention_forward

    def recorded(module, query, key, value, attention_mask, **kwargs):
        if query.shape[2] == 1:
            seen.append((key.shape[2], None if attention_mask is None else (~attention_mask).sum().item()))
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(forward, "sdpa_attention_forward", recorded)
    args = ("bench", "generate", "--model", model_dir, "--context", 200, "--batch", "2", "--steps", 3)
    succeed(*args, "--caches", "full")
    layers = models.load(model_dir)[0].config.num_hidden_layers
    steps = [pair for step in range(3 + WARMUP) for pair in ((201 + step, None), (201 + step, 1))]
    assert seen == [pair for pair in steps for _ in range(layers)]


def test_bench_generate_runs_another_attention_on_a_full_cache(model_dir, json_file, monkeypatch):
    """Each step with its own implementation, whichever ran before."""
    args = ("bench", "generate", "--model", model_dir, "--context", 200, "--batch", "2", "--steps", 3)
    calls = []
    eager = modeling_llama.eager_attention_forward

    def counted(*args, **kwargs):
        calls.append(args)
        return eager(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted)
    succeed(*args, "--caches", "full,logquant", "--full-attention", "eager", "--json", json_file)
    rows = json.loads(json_file.read_text())["results"]
    assert [row["cache"] for row in rows] == [*FULL, "logquant", "full, eager"]
    assert rows[0]["held"] == rows[1]["held"] == rows[3]["held"]
    assert [1.0] * 3 in [row["speedup"]["samples"] for row in rows[:2]] and list(rows[3]["speedups"]) != ["full, eager"]
    assert len(calls) == (3 + WARMUP) * models.load(model_dir)[0].config.num_hidden_layers
    succeed(*args, "--caches", "logquant", "--full-attention", "eager", "--json", json_file)
    assert [row["speedup"] for row in json.loads(json_file.read_text())["results"]] == [None, None]
    budget = ("--memory-budget", 0.004, "--caches", "logquant", "--full-attention", "eager")
    succeed(*args, *budget, "--json", json_file)
    _, full = json.loads(json_file.read_text())["results"]
    assert full["cache"] == "full, eager" and full["held"] == full["predicted"]
    for more in (["--full-attention", "none"], ["--full-attention", "eager", "--peaks"]):
        assert "--full-attention" in refused(*args, *more)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read in /proc")
def test_bench_generate_measures_peaks(model_dir, json_file):
    args = ("--model", model_dir, "--context", 200, "--batch", "2", "--steps", 3, "--json", json_file)
    assert "peak" in succeed("bench", "generate", *args, "--peaks", "--caches", "full").output
    rows = json.loads(json_file.read_text())["results"]
    assert len(rows) == 2 and rows[0]["peak_rise"] == rows[1]["peak_rise"] > 0, "measured once, for there is one cache"
    assert rows[0]["live_peak_rise"] > 0
    succeed("bench", "generate", *args, "--caches", "logquant")
    (row,) = json.loads(json_file.read_text())["results"]
    assert row["speedup"] is None and row["speedups"] == {}


def test_bench_generate_fills_a_budget(model_dir, json_file):
    args = ("--model", model_dir, "--context", 700, "--memory-budget", 0.004, "--steps", 3, "--caches", "full,logquant")
    succeed("bench", "generate", *args, "--json", json_file)
    full, masked, packed = json.loads(json_file.read_text())["results"]
    assert full["batch"] == masked["batch"] == 0.004 * 2**30 // (4 * 700 * 2 * 32 * 2) < packed["batch"]
    for row in (full, masked, packed):
        assert row["predicted"] * 0.9 < row["held"] <= row["predicted"] <= 0.004 * 2**30
    assert full["held"] == masked["held"] == full["predicted"]
    assert "budget must be at least" in refused("bench", "generate", *args[:4], "--memory-budget", 0.0001, "--steps", 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--memory-budget", 0), "--memory-budget: more than 0 GiB are needed, got 0"),
        (("--memory-budget", "nan"), "'--memory-budget': a number is needed, got nan"),
        (("--memory-budget", 1, "--caches", "kivi"), "--caches: bytes are known beforehand of logquant,"),
        (("--memory-budget", 1, "--context", 5, "--steps", 3), "--context: needed: more tokens than are decoded, 5"),
        (("--batch", "1,x"), "--batch: whole numbers separated by commas are needed, got '1,x'"),
        (("--full-attention", "foo"), "--full-attention: "),
        (("--caches", "logquant:value_group=48"), "--caches: cache 'logquant:value_group=48': value_group must be"),
    ],
)
def test_bench_generate_explains_bad_arguments(model_dir, args, message):
    assert message in refused("bench", "generate", "--model", model_dir, *args)


def test_ctrl_c_shows_the_batches_until_then(model_dir, json_file, monkeypatch):
    measure = generate.bench_generate

    def measure_and_interrupt(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return measure(*args, **options)

    monkeypatch.setattr(generate, "bench_generate", measure_and_interrupt)
    args = ("--context", 100, "--batch", "1,2", "--steps", 3, "--caches", "full", "--peaks", "--json", json_file)
    result = run("bench", "generate", "--model", model_dir, *args)
    assert result.exit_code == 130 and "tokens/s" in result.stdout
    assert [row["batch"] for row in json.loads(json_file.read_text())["results"]] == [1, 1]
