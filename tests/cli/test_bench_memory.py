"""``logquant bench memory``."""

from __future__ import annotations

import json
import signal
import sys

import pytest

from logquant import LogQuantConfig
from logquant.bench import memory
from logquant.cache.sizes import choice_nbytes, head_nbytes
from tests.helpers.cli import refused, run, succeed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bench memory reads /proc")
def test_bench_memory_holds_what_the_formula_says(model_dir, json_file):
    args = ("--model", model_dir, "--context", 700, "--cache", "full,logquant:window=32", "--dtype", "bfloat16")
    output = succeed("bench", "memory", *args, "--json", json_file).output
    full, packed = json.loads(json_file.read_text())["results"]
    assert full["held"] == full["predicted"] == 4 * 700 * 2 * 32 * 2
    config = LogQuantConfig(window=32)
    expected = 4 * head_nbytes(config, 700, 32, query_heads=2) + 2 * choice_nbytes(config, 700, 2)
    assert packed["held"] == packed["predicted"] == expected
    assert all(row["peak_rise"] > 0 and row["live_peak_rise"] > 0 for row in (full, packed))
    assert output.count("equal") == 2


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bench memory reads /proc")


@LINUX
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "no/such/dir"), "--model: there is no directory and no GGUF file no/such/dir"),
        (("--cache", "kivy"), "--cache: cache must be one of"),
        (("--cache", "logquant:value_group=48"), "--cache: cache 'logquant:value_group=48': value_group must be"),
        (("--context", 0), "'--context'"),
    ],
)
def test_bench_memory_explains_bad_arguments(model_dir, args, message):
    assert message in refused("bench", "memory", "--model", model_dir, *args)


@LINUX
def test_bench_memory_explains_what_fails_in_its_processes(model_dir, monkeypatch):
    def fail_with(error: Exception) -> None:
        def measure(*args):
            raise error

        monkeypatch.setattr(memory, "bench_memory", measure)

    args = ("bench", "memory", "--model", model_dir)
    fail_with(OSError("no file named model.safetensors found in directory x.\nIt is a long story."))
    assert f"--model: {model_dir} cannot be loaded: no file named model.safetensors found" in refused(*args)
    fail_with(RuntimeError("the process measuring cache 'full' died; out of memory?"))
    result = run(*args)
    assert result.exit_code == 1
    assert result.output == "Error: not enough memory: the process measuring cache 'full' died; out of memory?\n"


@LINUX
def test_ctrl_c_shows_the_caches_until_then(model_dir, json_file, monkeypatch):
    measured = []

    def measure(spec, *args):
        measured.append(spec.name)
        signal.raise_signal(signal.SIGINT)
        return memory.MemoryResult(spec.name, 5_000_000, 4_000_000, 3_000_000, None)

    monkeypatch.setattr(memory, "bench_memory", measure)
    result = run("bench", "memory", "--model", model_dir, "--cache", "full,logquant", "--json", json_file)
    assert result.exit_code == 130 and measured == ["full"] and "5.0 MB" in result.stdout
    assert [row["cache"] for row in json.loads(json_file.read_text())["results"]] == ["full"]
