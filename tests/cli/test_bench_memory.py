"""``logquant bench memory``."""

from __future__ import annotations

import json
import sys

import pytest

from logquant import LogQuantConfig
from logquant.cache.sizes import head_nbytes
from tests.helpers.cli import succeed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bench memory reads /proc")
def test_bench_memory_holds_what_the_formula_says(model_dir, json_file):
    args = ("--model", model_dir, "--context", 700, "--cache", "full,logquant:window=32", "--dtype", "bfloat16")
    output = succeed("bench", "memory", *args, "--json", json_file).output
    full, packed = json.loads(json_file.read_text())["results"]
    assert full["held"] == full["predicted"] == 4 * 700 * 2 * 32 * 2
    assert packed["held"] == packed["predicted"] == 4 * head_nbytes(LogQuantConfig(window=32), 700, 32, query_heads=2)
    assert all(row["peak_rise"] > 0 and row["live_peak_rise"] > 0 for row in (full, packed))
    assert output.count("equal") == 2
