"""``logquant eval``."""

from __future__ import annotations

import json
import signal

import pytest

from logquant.eval import divergence
from tests.helpers.cli import refused, run, succeed

TEXT = __file__

pytestmark = pytest.mark.usefixtures("one_thread")


def test_eval_writes_a_table_and_json(model_dir, tmp_path, json_file):
    texts = [tmp_path / f"{name}.txt" for name in "ab"]
    for text in texts:
        text.write_text(text.name * 60)
    sizes = ("--prefill", 100, "--tokens", 20)
    caches = ("--caches", "log:window=32,recent:window=32,full")
    output = succeed("eval", "--model", model_dir, "--text", *texts, *caches, *sizes, "--json", json_file).output
    written = json.loads(json_file.read_text())
    assert [row["cache"] for row in written["results"]] == ["log:window=32", "recent:window=32", "full"]
    log, recent, full = written["results"]
    assert full["kl"] == 0 and full["top1"] == 1 and full["bits_per_element"] is None
    assert log["kl"] > 0 and log["bytes"] == recent["bytes"] < full["bytes"]
    assert len(log["texts"]) == 2 and log["kl_interval"][0] <= log["kl"] <= log["kl_interval"][1]
    assert "minus" not in log and recent["minus"]["cache"] == "log:window=32"
    assert recent["minus"]["kl"] == pytest.approx(recent["kl"] - log["kl"])
    differences = [own["kl"] - first["kl"] for own, first in zip(recent["texts"], log["texts"], strict=True)]
    low, high = recent["minus"]["interval"]
    assert min(differences) <= low <= recent["minus"]["kl"] <= high <= max(differences)
    assert f"{low:+.4f}" in output and f"{high:+.4f}" in output
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
        (("--caches", "snapkv", TEXT), "--caches: cache must be one of"),
        (("--tasks", "kl,mmlu"), "--tasks: tasks must be of kl, greedy, passkey, separated by commas; got 'mmlu'"),
        (("--tasks", ""), "--tasks: tasks must be of kl, greedy, passkey"),
        (("--tasks", "passkey", "--passkey-tokens", "20"), "--passkey-tokens: length must be at least 150, got 20"),
        ((), "FILES: tasks kl and greedy need at least one file of text, got none"),
        (("--text", "nowhere.txt"), "--text: nowhere.txt cannot be read: No such file or directory"),
        (("nowhere.txt", "--text", TEXT), "FILES: nowhere.txt cannot be read: No such file or directory"),
        ((TEXT, "--prefill", 10**11), "test_eval.py must have at least 100,000,001,001 tokens, got"),
    ],
)
def test_eval_explains_bad_arguments(model_dir, args, message):
    assert message in refused("eval", "--model", model_dir, *args)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"na\xefve", "must be text in UTF-8, got byte 0xef at 2"),
        (b"", "must hold text, got none"),
        (b"abc", "must have at least 1,513 tokens, got 3"),
    ],
)
def test_eval_names_the_text_that_it_cannot_use(model_dir, tmp_path, content, message):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    error = refused("eval", "--model", model_dir, file)
    assert str(file) in error and message in error


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_shows_what_was_measured(model_dir, json_file, monkeypatch, times):
    """Once: the tokens until then. Twice, at once: the tasks until then."""
    calls = []
    scores = divergence._scores

    def interrupt_at_the_fifth_token(*args):
        calls.append(args)
        if len(calls) == 10:  # of two caches
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return scores(*args)

    monkeypatch.setattr(divergence, "_scores", interrupt_at_the_fifth_token)
    sizes = ("--prefill", 100, "--tokens", 20, "--caches", "recent:window=32,full", "--tasks", "kl,greedy")
    result = run("eval", "--model", model_dir, TEXT, *sizes, "--json", json_file)
    assert result.exit_code == 130
    if times == 1:
        rows = json.loads(json_file.read_text())["results"]
        assert len(calls) == 10 and f"{rows[0]['ppl']:.2f}" in result.stdout
        assert all("greedy" not in row for row in rows)
    else:
        assert result.stdout == "" and not json_file.exists()
