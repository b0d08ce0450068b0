"""``logquant generate``, on a tiny random model where any will do and on the real one where sense matters."""

from __future__ import annotations

import json

import pytest

from logquant import LogQuantConfig
from logquant.cache.sizes import head_nbytes
from tests.helpers.cli import run, succeed
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
    assert written["bytes"] == heads * head_nbytes(config, seen, 32, itemsize=4, decoding=True, query_heads=2)
    assert written["full_precision_bytes"] == heads * seen * 2 * 32 * 4
    ratio = written["full_precision_bytes"] / written["bytes"]
    summary = result.stderr.splitlines()[-1]
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
    assert written["bytes"] == 4 * head_nbytes(config, 104, 32, query_heads=2)


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
        (("--prompt", "a", "--cache", "snapkv"), "cache must be one of logquant, paper, recent, partial"),
        (("--prompt", "a", "--bits", "3"), "bits must be 2, 4 or 8, got 3"),
        (("--prompt", "a", "--window", "100"), "window must be a multiple of page_tokens (32), got 100"),
        (("--prompt", "a", "--cache", "full", "--bits", "2"), "cache 'full' has no settings, got bits"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max-new-tokens"),
        (("--prompt", "a", "--model", "no/such/model"), "--model"),
    ],
)
def test_generate_explains_bad_arguments(args, message):
    result = run("generate", *args)
    assert result.exit_code == 2
    # Rich frames errors and breaks their lines.
    assert message in " ".join(result.output.replace("│", "").split())


def test_chat_needs_a_template(tmp_path):
    bare = save_tiny_model(tmp_path, chat_template=None)
    assert run("generate", "--model", bare, "--prompt", "a", "--chat").exit_code == 2
    succeed("generate", "--model", bare, "--prompt", "a", "--max-new-tokens", 2)


def test_generate_writes_english_with_the_packaged_model(smollm2_and_tokenizer):
    result = succeed("generate", "--prompt", "What is the capital of France?", "--max-new-tokens", 20)
    assert "Paris" in result.stdout
