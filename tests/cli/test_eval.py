"""``logquant eval``."""

from __future__ import annotations

import json

import pytest

from tests.helpers.cli import run, succeed

pytestmark = pytest.mark.usefixtures("one_thread")


def test_eval_writes_a_table_and_json(model_dir, tmp_path, json_file):
    texts = [tmp_path / f"{name}.txt" for name in "ab"]
    for text in texts:
        text.write_text(text.name * 60)
    sizes = ("--prefill", 100, "--tokens", 20)
    caches = ("--caches", "logquant:window=32,recent:window=32,full")
    output = succeed("eval", "--model", model_dir, "--text", *texts, *caches, *sizes, "--json", json_file).output
    written = json.loads(json_file.read_text())
    assert [row["cache"] for row in written["results"]] == ["logquant:window=32", "recent:window=32", "full"]
    log, recent, full = written["results"]
    assert full["kl"] == 0 and full["top1"] == 1 and full["bits_per_element"] is None
    assert log["kl"] > 0 and log["bytes"] == recent["bytes"] < full["bytes"]
    assert len(log["texts"]) == 2 and log["kl_interval"][0] <= log["kl"] <= log["kl_interval"][1]
    assert f"{log['kl']:.4f}" in output and f"{full['ppl']:.2f}" in output


def test_eval_runs_other_tasks(model_dir, tmp_path, json_file):
    text = tmp_path / "text.txt"
    text.write_text("abc" * 60)
    args = ("--tasks", "greedy,passkey", "--prefill", 100, "--tokens", 9, "--passkey-tokens", 200, "--passkey-texts", 1)
    output = succeed("eval", "--model", model_dir, text, "--caches", "kivi,full", *args, "--json", json_file).output
    written = json.loads(json_file.read_text())
    assert "tokens written alike" in output and "passkeys in 200 tokens" in output
    kivi, full = written["results"]
    assert (kivi["cache"], full["cache"]) == ("kivi", "full") and "kl" not in kivi
    assert kivi["greedy"]["tokens"] == 9 and full["greedy"]["agreement"] == 9 and full["greedy"]["texts"] == [9]
    assert list(kivi["passkey"]["found_by_depth"]) == ["0.0", "0.25", "0.5", "0.75", "1.0"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--caches", "snapkv"), "cache must be one of"),
        (("--tasks", "kl,mmlu"), "'mmlu' is not a valid Task"),
        (("--tasks", "passkey", "--passkey-tokens", "20"), "length must be at least"),
        ((), "text must name at least one file, got none"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_eval_explains_bad_arguments(model_dir, args, message):
    result = run("eval", "--model", model_dir, *args)
    assert result.exit_code == 2
    assert message in result.output
