"""benchmarks/peers.py: other programs decode after the prompt that they are given, and rows and slopes say what they
are meant to."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import peers
from logquant.bench.timing import Timing
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [(7 * i) % 40_000 + 100 for i in range(64)]


class Counting:
    """A peer of which a step takes 1 ms and 2 us a token."""

    name, slow = "counting", False

    def after(self, prompt: list[int]) -> peers.Step:
        return lambda: 1e-3 + 2e-6 * len(prompt)


def test_every_contender_decodes_in_every_round():
    loaded = {torch.bfloat16: tiny_model().bfloat16(), torch.float32: tiny_model()}
    for model in loaded.values():
        model.set_attn_implementation("logquant")
    caches = {torch.bfloat16: "full,logquant,hqq", torch.float32: "full,log"}
    rows, skipped = peers.measure(loaded, [Counting()], {200: caches, 300: caches}, 3, 300)
    assert [row.name for row in rows[::2]] == [
        "counting",
        "transformers, full, no mask, bfloat16",
        "transformers, full, masked, bfloat16",
        "LogQuant, logquant, bfloat16",
        *([] if "hqq" in skipped else ["transformers, hqq, bfloat16"]),
        "transformers, full, no mask, float32",
        "transformers, full, masked, float32",
        "LogQuant, log, float32",
    ]
    assert all(len(row.timing.samples) == 3 for row in rows)
    assert [row.context for row in rows] == [200, 300] * (len(rows) // 2)
    assert rows[1].timing.samples == [1e-3 + 2e-6 * 300] * 3  # its own clock's, not ours


def test_a_slope_is_of_the_contexts_that_are_long_enough():
    def rows(name: str, points: dict[int, float]) -> list[peers.Row]:
        return [peers.Row(name, context, Timing.of([seconds])) for context, seconds in points.items()]

    line = {context: 1e-3 + 2e-6 * context for context in (2048, 6144, 16384)}
    found = peers.slopes([*rows("line", {256: 9.0} | line), *rows("short", {256: 1.0, 2048: 2.0})])
    assert found == {"line": pytest.approx(2.0)}
    *_, last = peers.table(rows("line", line))
    assert last == "| line | 196.2 | 75.3 | 29.6 | 2.00 |"


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: None)
    found, skipped = peers.other_programs(tmp_path / "model.gguf", 100, None)
    assert found == [] and skipped == {
        "llama.cpp": "xllamacpp is not installed",
        "OpenVINO GenAI": "openvino-genai is not installed",
    }
    specs, skipped = peers.installed("full,hqq")
    assert [spec.name for spec in specs] == ["full"] and "hqq" in skipped["hqq"]


@pytest.mark.parametrize("cache_type", ["f16", "q4_0"])
def test_llama_cpp_reads_a_prompt_once_and_again_from_its_file(cache_type, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, a build of llama.cpp")
    file = peers.gguf_file()
    for _ in range(2):
        step = peers.LlamaCpp(file, cache_type, tmp_path).after(PROMPT)
        (state,) = tmp_path.iterdir()
        assert state.name == f"{file.stem}-{cache_type}-64.bin"
        answer = step.ask()
        assert answer["timings"]["cache_n"] == len(PROMPT) - 1 and answer["usage"]["prompt_tokens"] == len(PROMPT)
        assert step() > 0


@pytest.mark.slow
def test_openvino_decodes_after_the_prompt_that_it_has_read():
    pytest.importorskip("openvino_genai", reason="needs openvino-genai")
    assert peers.OpenVino(peers.gguf_file(), "u4", 256).after(PROMPT)() > 0


@pytest.mark.slow
def test_one_command_measures_what_is_installed_and_names_what_is_not(tmp_path):
    file = tmp_path / "peers.json"
    peers.main(["--contexts", "16,24", "--rounds", "1", "--longest-slow", "16", "--json", str(file)])
    result = json.loads(file.read_text())
    rows = {(row["name"], row["context"]): row for row in result["results"]}
    assert {name for name, _ in rows} >= {"LogQuant, logquant, bfloat16", "transformers, full, masked, float32"}
    for package, name in (("xllamacpp", "llama.cpp, f16"), ("openvino-genai", "OpenVINO GenAI, u8")):
        assert (
            (package in result["packages"]) == ((name, 24) in rows) == (name.partition(",")[0] not in result["skipped"])
        )
    assert ("llama.cpp, q8_0", 24) not in rows and "16" in result["skipped"]["quanto"]
    assert result["machine"]["cpu"] and result["slopes"] == {}
