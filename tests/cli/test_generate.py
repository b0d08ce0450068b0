"""``logquant generate``, on a tiny random model where any will do and on the real one where sense matters."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import transformers

from logquant import LogQuantConfig, models
from logquant.cache.sizes import choice_nbytes, head_nbytes
from logquant.cli import app
from logquant.methods.registry import parse_cache
from logquant.plan import pays_from, sequence_nbytes
from tests.helpers.cli import refused, run, succeed
from tests.helpers.models import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_generate_streams_text_and_ends_with_the_cost(model_dir, json_file):
    args = ("--model", model_dir, "--prompt", "x" * 300, "--max-new-tokens", 8)
    result = succeed("generate", *args, "--json", json_file)
    written = json.loads(json_file.read_text())
    assert written["new_tokens"] == 8 and written["prompt_tokens"] == len("<user>" + "x" * 300 + "<assistant>")
    assert result.stdout == written["text"] + "\n"
    config, heads, seen = LogQuantConfig(), 4, written["prompt_tokens"] + 7  # the last token is never cached
    # It has just evicted.
    head = head_nbytes(config, seen, 32, itemsize=4, decoding=True, query_heads=2)
    assert written["bytes"] == heads * head + 2 * choice_nbytes(config, seen, 2)
    assert written["full_precision_bytes"] == heads * seen * 2 * 32 * 4
    ratio = written["full_precision_bytes"] / written["bytes"]
    summary = result.stderr.splitlines()[0]
    assert summary.startswith("[logquant] 317 + 8 tokens, ") and "tokens/s" in summary and f"{ratio:.2f}x" in summary


def test_generate_without_eviction_writes_what_the_full_cache_writes(model_dir):
    args = ("generate", "--model", model_dir, "--prompt", "abc", "--max-new-tokens", 20)
    outputs = {cache: succeed(*args, "--cache", cache).stdout for cache in ("logquant", "recent", "full")}
    assert len(set(outputs.values())) == 1


def test_generate_takes_settings_and_prompts_from_files(model_dir, tmp_path, json_file):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("a" * 100)
    args = ("generate", "--model", model_dir, "--prompt-file", prompt, "--prompt", "b", "--no-chat")
    settings = ("--bits", 4, "--value-bits", 2, "--window", 32, "--page-tokens", 32, "--dtype", "bfloat16")
    succeed(*args, *settings, "--max-new-tokens", 2, "--json", json_file)
    written = json.loads(json_file.read_text())
    assert written["cache"] == "logquant:bits=4,value_bits=2,window=32,page_tokens=32"
    assert written["prompt_tokens"] == 103  # the file, an empty line, the prompt
    config = LogQuantConfig(bits=4, value_bits=2, window=32, page_tokens=32)
    choice = choice_nbytes(config, 104, 2) - 4  # the position of the last token is not written down yet
    assert written["bytes"] == 4 * head_nbytes(config, 104, 32, query_heads=2) + 2 * choice


def test_generate_samples_the_same_with_the_same_seed(model_dir):
    args = ("generate", "--model", model_dir, "--prompt", "abc", "--max-new-tokens", 20, "--temperature", 1.5)
    first, again, other = (succeed(*args, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--prompt"),
        (("--prompt", " "), "needed: --prompt TEXT"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
        (("--prompt", "a", "--cache", "snapkv"), "cache must be one of logquant, fine, small, log, recent, paper"),
        (("--prompt", "a", "--bits", "3"), "bits must be 2, 4 or 8, got 3"),
        (("--prompt", "a", "--window", "100"), "window must be a multiple of page_tokens (32), got 100"),
        (("--prompt", "a", "--cache", "full", "--bits", "2"), "cache 'full' has no settings, got bits"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max-new-tokens"),
        (
            ("--prompt", "a", "--model", "no/such/model"),
            "--model: there is no directory and no GGUF file no/such/model",
        ),
        (("--prompt", "a", "--model", "no.gguf"), "--model: there is no directory and no GGUF file no.gguf"),
        (("--prompt", "a", "--bits", "3", "--window", "64"), "--cache, --bits, --window: "),
        (("--prompt", "a", "--cache", "full,logquant"), "--cache: one cache is needed, got 'full,logquant'"),
        (("--prompt", "a", "--top-p", "0.5"), "--top-p: needs sampling, which --temperature above 0 asks for"),
        (("--prompt", "a", "--temperature", "inf"), "'--temperature': a number is needed, got inf"),
        (("--prompt", "a", "--seed", "-1"), "'--seed'"),
        (("--prompt", "a", "--seed", 2**63), "'--seed'"),
    ],
)
def test_generate_explains_bad_arguments(args, message):
    assert message in refused("generate", *args)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"na\xefve", "prompt.txt must be text in UTF-8, got byte 0xef at 2"),
        (b"", "prompt.txt must hold text, got none"),
        (b" \n", "prompt.txt must hold text, got none"),
    ],
)
def test_a_prompt_file_that_is_no_text_is_named(tmp_path, content, message):
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    error = refused("generate", "--prompt-file", file)
    assert "--prompt-file: " in error and message in error
    assert "cannot be read: Is a directory" in refused("generate", "--prompt-file", tmp_path)


def test_memory_that_a_window_cannot_have_is_said_in_a_line(model_dir):
    result = run("generate", "--model", model_dir, "--prompt", "a", "--window", 64 * 10**12)
    assert result.exit_code == 1 and "Error: not enough memory: " in result.output.splitlines()[-1]


def test_short_texts_are_told_what_long_ones_take(model_dir):
    """From how many tokens on the cache pays, and 32,768 tokens; said of short texts alone."""
    args = ("generate", "--model", model_dir, "--max-new-tokens", 2, "--no-chat", "--prompt")
    said = succeed(*args, "abc").stderr.splitlines()[-1]
    config, spec = models.load_config(model_dir), parse_cache("logquant")
    held, full = (sequence_nbytes(each, config, 32_768, 4, decoding=True) for each in (spec, parse_cache("full")))
    assert f"this cache pays from {pays_from(spec, config, 4):,} tokens on; " in said
    assert f"32,768 tokens would take {held / 1e6:,.1f} MB, in full precision {full / 1e6:,.1f} MB" in said
    assert f"{full / held:.2f}x" in said
    assert "pays from" not in succeed(*args, "x" * 400).stderr
    assert "pays from" not in succeed(*args, "abc", "--cache", "full").stderr
    assert "pays from" not in succeed(*args, "abc", "--cache", "kivi").stderr


def interrupting(monkeypatch, after: int, times: int = 1) -> None:
    """Ctrl-C, ``times`` times, once ``after`` tokens are written."""
    streamer = transformers.TextStreamer
    put, calls = streamer.put, []

    def put_and_interrupt(self, value):
        put(self, value)
        calls.append(value)
        if len(calls) == after + 1:  # the prompt comes first
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(streamer, "put", put_and_interrupt)


@pytest.mark.parametrize(("times", "tokens"), [(1, 6), (2, 5)])
def test_ctrl_c_prints_the_summary_so_far(model_dir, json_file, monkeypatch, times, tokens):
    """Once: after the step at hand, which is that of the next token. Twice: at once."""
    args = ("generate", "--model", model_dir, "--prompt", "abc", "--json", json_file, "--max-new-tokens")
    whole = succeed(*args, tokens).stdout
    interrupting(monkeypatch, after=5, times=times)
    result = run(*args, 200)
    assert result.exit_code == 130 and result.stdout == whole
    assert f"] 20 + {tokens} tokens" in result.stderr and "tokens/s" in result.stderr
    assert json.loads(json_file.read_text())["new_tokens"] == tokens
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_token_has_nothing_to_say(model_dir, json_file, monkeypatch):
    interrupting(monkeypatch, after=0, times=2)
    result = run("generate", "--model", model_dir, "--prompt", "abc", "--json", json_file)
    assert result.exit_code == 130 and "tokens/s" not in result.stderr and not json_file.exists()


@pytest.fixture
def closed_pipe():
    """The end to write to of a pipe whose reader has left."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    with contextlib.suppress(OSError):
        os.close(writing)


def test_a_pipe_that_nobody_reads_ends_it_quietly(model_dir, closed_pipe, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(closed_pipe, "w", closefd=False))
        with pytest.raises(SystemExit) as end:
            app(["generate", "--model", model_dir, "--prompt", "abc", "--max-new-tokens", "2000"])
        assert end.value.code == 1
        sys.stdout.flush()  # as the interpreter does at its end
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_leaves_ends_it_quietly(model_dir, closed_pipe):
    """As in ``logquant generate | head -c 1``."""
    command = [sys.executable, "-m", "logquant", "generate", "--model", model_dir, "--max-new-tokens", "2000"]
    command += ["--prompt", "abc"]
    result = subprocess.run(command, stdout=closed_pipe, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert result.returncode == 1 and result.stderr == ""


def test_chat_needs_a_template(tmp_path):
    bare = save_tiny_model(tmp_path, chat_template=None)
    assert run("generate", "--model", bare, "--prompt", "a", "--chat").exit_code == 2
    succeed("generate", "--model", bare, "--prompt", "a", "--max-new-tokens", 2)


def test_generate_writes_english_with_the_packaged_model(smollm2_and_tokenizer):
    result = succeed("generate", "--prompt", "What is the capital of France?", "--max-new-tokens", 20)
    assert "Paris" in result.stdout
