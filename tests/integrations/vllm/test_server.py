"""vLLM's OpenAI server over LogQuant's cache, as chats use it. Runs where vLLM is (.ci/vllm)."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm")

from benchmarks import vllm_server
from tests.helpers.vllm_models import save_first_layers


def test_chats_at_once_get_answers_share_what_they_begin_with_and_leave_nothing(tmp_path, smollm2_and_tokenizer):
    """In a cache that does not hold all of them at once; some clients hang up."""
    directory, calibration = save_first_layers(tmp_path)
    small = {"minutes": 0.4, "clients": 6, "mib": 4, "longest": 1536, "system": 4000, "new": 64, "chunk": 128}
    given = {"calibration": calibration, "model": directory, "dtype": "float32", "log": tmp_path / "log"}
    found = vllm_server.run(argparse.Namespace(start_seconds=300, **given, **small))
    said = (tmp_path / "log").read_text()[-4000:]
    assert not found.errors and found.answers > 0 and found.hung_up > 0, (found, said)
    assert found.blocks_in_use == 0, found
    assert found.counters["prefix_cache_hits"] > 0, found
    # Of the first readings the server still loads what it needs for its first answers.
    assert found.memory[-1] < 1.05 * found.memory[4], found
