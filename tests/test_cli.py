"""The command line, on a tiny random model where any will do and on the real one where sense matters."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from logquant import LogQuantConfig, __version__, machine, models
from logquant.bench.attend import DEQUANTIZE, FULL, FUSED
from logquant.bench.generate import prefilled
from logquant.bench.timing import WARMUP
from logquant.cache.sizes import head_nbytes
from logquant.compat import as_argument
from logquant.methods.accounting import cache_nbytes
from logquant.methods.registry import parse_cache
from tests.helpers.cli import run, succeed
from tests.helpers.models import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def json_file(tmp_path):
    return tmp_path / "result.json"


def test_help_names_every_command():
    output = succeed("--help").output
    assert all(command in output for command in ("generate", "info", "eval", "bench"))
    assert all(command in succeed("bench", "--help").output for command in ("attend", "memory"))


def test_info_tells_what_is_in_use(json_file):
    output = succeed("info", "--json", json_file).output
    facts = json.loads(json_file.read_text())["machine"]
    assert facts["logquant"] == __version__ and facts["extension_error"] is None
    assert facts["instruction_set"] in facts["instruction_sets_available"]
    assert facts["instruction_set"] in output and "in use" in output


def test_info_tells_why_the_fast_path_is_off(monkeypatch):
    monkeypatch.setattr(machine.ops, "extension_error", lambda: "the moon is full")
    output = succeed("info").output
    assert "off: the moon is full" in output and "instruction set " not in output


# ---------------------------------------------------------------------------------------------------------- generate
def test_generate_streams_text_and_ends_with_the_cost(model, json_file):
    result = succeed("generate", "--model", model, "--prompt", "x" * 300, "--max-new-tokens", 8, "--json", json_file)
    written = json.loads(json_file.read_text())
    assert written["new_tokens"] == 8 and written["prompt_tokens"] == len("<user>" + "x" * 300 + "<assistant>")
    assert result.stdout == written["text"] + "\n"
    config, heads, seen = LogQuantConfig(), 4, written["prompt_tokens"] + 7  # the last token is never cached
    assert written["bytes"] == heads * head_nbytes(
        config, seen, 32, itemsize=4, decoding=True, query_heads=2
    )  # it has just evicted
    assert written["full_precision_bytes"] == heads * seen * 2 * 32 * 4
    ratio = written["full_precision_bytes"] / written["bytes"]
    summary = result.stderr.splitlines()[-1]
    assert summary.startswith("[logquant] 317 + 8 tokens, ") and "tokens/s" in summary and f"{ratio:.2f}x" in summary


def test_generate_without_eviction_writes_what_the_full_cache_writes(model):
    outputs = {
        cache: succeed("generate", "--model", model, "--prompt", "abc", "--cache", cache, "--max-new-tokens", 20).stdout
        for cache in ("logquant", "recent", "full")
    }
    assert len(set(outputs.values())) == 1


def test_generate_takes_settings_and_prompts_from_files(model, tmp_path, json_file):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("a" * 100)
    args = ("generate", "--model", model, "--prompt-file", prompt, "--prompt", "b", "--no-chat", "--json", json_file)
    settings = ("--bits", 4, "--value-bits", 2, "--window", 32, "--page-tokens", 32, "--dtype", "bfloat16")
    succeed(*args, *settings, "--max-new-tokens", 2)
    written = json.loads(json_file.read_text())
    assert written["cache"] == "logquant:bits=4,value_bits=2,window=32,page_tokens=32"
    assert written["prompt_tokens"] == 103  # the file, an empty line, the prompt
    config = LogQuantConfig(bits=4, value_bits=2, window=32, page_tokens=32)
    assert written["bytes"] == 4 * head_nbytes(config, 104, 32, query_heads=2)


def test_generate_samples_the_same_with_the_same_seed(model):
    args = ("generate", "--model", model, "--prompt", "abc", "--max-new-tokens", 20, "--temperature", 1.5)
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


# -------------------------------------------------------------------------------------------------------------- eval
def test_eval_writes_a_table_and_json(model, tmp_path, json_file):
    texts = [tmp_path / f"{name}.txt" for name in "ab"]
    for text in texts:
        text.write_text(text.name * 60)
    sizes = ("--prefill", 100, "--tokens", 20)
    caches = ("--caches", "logquant:window=32,recent:window=32,full")
    output = succeed("eval", "--model", model, "--text", *texts, *caches, *sizes, "--json", json_file).output
    written = json.loads(json_file.read_text())
    assert [row["cache"] for row in written["results"]] == ["logquant:window=32", "recent:window=32", "full"]
    log, recent, full = written["results"]
    assert full["kl"] == 0 and full["top1"] == 1 and full["bits_per_element"] is None
    assert log["kl"] > 0 and log["bytes"] == recent["bytes"] < full["bytes"]
    assert len(log["texts"]) == 2 and log["kl_interval"][0] <= log["kl"] <= log["kl_interval"][1]
    assert f"{log['kl']:.4f}" in output and f"{full['ppl']:.2f}" in output


def test_eval_runs_other_tasks(model, tmp_path, json_file):
    text = tmp_path / "text.txt"
    text.write_text("abc" * 60)
    args = ("--tasks", "greedy,passkey", "--prefill", 100, "--tokens", 9, "--passkey-tokens", 200, "--passkey-texts", 1)
    output = succeed("eval", "--model", model, text, "--caches", "kivi,full", *args, "--json", json_file).output
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
def test_eval_explains_bad_arguments(model, args, message):
    result = run("eval", "--model", model, *args)
    assert result.exit_code == 2
    assert message in result.output


# ------------------------------------------------------------------------------------------------------------- bench
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
        (("--cache", "full"), "cache 'full' has no settings, got bits"),
        (("--cache", "kivi"), "a setting must be one of bits, group, residual, got 'window'"),
        (("--dim", "100"), "head_dim must be a multiple of 16 up to 1024, got 100"),
    ],
)
def test_bench_attend_explains_bad_arguments(args, message):
    result = run("bench", "attend", *args)
    assert result.exit_code == 2
    assert message in result.output


def test_bench_attend_does_not_time_the_reference(monkeypatch):
    monkeypatch.setattr("logquant.ops.extension_error", lambda: "the moon is full")
    with pytest.raises(RuntimeError, match="there is nothing to measure: the moon is full"):
        run("bench", "attend", "--context", "100")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bench memory reads /proc")
def test_bench_memory_holds_what_the_formula_says(model, json_file):
    args = ("--model", model, "--context", 700, "--cache", "full,logquant:window=32", "--dtype", "bfloat16")
    output = succeed("bench", "memory", *args, "--json", json_file).output
    full, packed = json.loads(json_file.read_text())["results"]
    assert full["held"] == full["predicted"] == 4 * 700 * 2 * 32 * 2
    assert packed["held"] == packed["predicted"] == 4 * head_nbytes(LogQuantConfig(window=32), 700, 32, query_heads=2)
    assert all(row["peak_rise"] > 0 and row["live_peak_rise"] > 0 for row in (full, packed))
    assert output.count("equal") == 2


def test_bench_generate_times_every_cache(model, json_file):
    args = ("--model", model, "--context", 300, "--batch", "1,2", "--steps", 3, "--caches", "full,logquant:window=32")
    output = succeed("bench", "generate", *args, "--dtype", "float32", "--json", json_file).output
    results = json.loads(json_file.read_text())["results"]
    assert [(row["batch"], row["cache"]) for row in results] == [
        (batch, cache) for batch in (1, 2) for cache in ("full", "logquant:window=32")
    ]
    for row in results:
        assert row["tokens_per_second"] == row["batch"] / row["timing"]["median"] > 0
        assert len(row["timing"]["samples"]) == 3
        tokens = 300 + 3 + 2  # two steps are not timed
        full = row["batch"] * 4 * tokens * 2 * 32 * 4
        assert row["held"] == full if row["cache"] == "full" else 0 < row["held"] < full
    assert "tokens/s" in output and "logquant:window=32" in output


def test_bench_generate_compares_round_by_round(model, json_file):
    """Slow caches are in fewer rounds; a ratio is one of the same round."""
    caches = ["full", "logquant:window=32", "hqq:bits=4"]
    args = ("--model", model, "--context", 200, "--batch", "2", "--steps", 6, "--baseline-steps", 3)
    succeed("bench", "generate", *args, "--caches", ",".join(caches), "--json", json_file)
    rows = json.loads(json_file.read_text())["results"]
    assert [(row["cache"], len(row["timing"]["samples"])) for row in rows] == list(zip(caches, (6, 6, 3), strict=True))
    full, packed, hqq = (row["timing"]["samples"] for row in rows)
    assert rows[0]["speedup"]["samples"] == [1.0] * 6
    assert rows[1]["speedup"]["samples"] == [f / p for f, p in zip(full, packed, strict=True)]
    assert rows[2]["speedup"]["samples"] == [f / h for f, h in zip(full[1::2], hqq, strict=True)]


def test_bench_generate_runs_another_attention_on_a_full_cache(model, json_file, monkeypatch):
    """Each step with its own implementation, whichever ran before."""
    args = ("bench", "generate", "--model", model, "--context", 200, "--batch", "2", "--steps", 3)
    calls = []
    eager = modeling_llama.eager_attention_forward

    def counted(*args, **kwargs):
        calls.append(args)
        return eager(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted)
    succeed(*args, "--caches", "full,logquant", "--full-attention", "eager", "--json", json_file)
    rows = json.loads(json_file.read_text())["results"]
    assert [row["cache"] for row in rows] == ["full", "logquant", "full, eager"]
    assert rows[0]["held"] == rows[2]["held"] and rows[0]["speedup"]["samples"] == [1.0] * 3
    assert len(calls) == (3 + WARMUP) * models.load(model)[0].config.num_hidden_layers
    succeed(*args, "--caches", "logquant", "--full-attention", "eager", "--json", json_file)
    assert [row["speedup"] for row in json.loads(json_file.read_text())["results"]] == [None, None]
    budget = ("--memory-budget", 0.004, "--caches", "logquant", "--full-attention", "eager")
    succeed(*args, *budget, "--json", json_file)
    _, full = json.loads(json_file.read_text())["results"]
    assert full["cache"] == "full, eager" and full["held"] == full["predicted"]
    for refused in ([*args, "--full-attention", "none"], [*args, "--full-attention", "eager", "--peaks"]):
        result = run(*refused)
        assert result.exit_code == 2 and "--full-attention" in result.output


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read in /proc")
def test_bench_generate_measures_peaks(model, json_file):
    args = ("--model", model, "--context", 200, "--batch", "2", "--steps", 3, "--caches", "logquant", "--peaks")
    assert "peak" in succeed("bench", "generate", *args, "--json", json_file).output
    (row,) = json.loads(json_file.read_text())["results"]
    assert row["peak_rise"] > 0 and row["live_peak_rise"] > 0 and row["speedup"] is None


@pytest.mark.parametrize("name", ["full", "logquant:window=32", "recent:bits=4", "quanto:bits=4", "hqq", "kivi"])
@torch.inference_mode()
def test_prompts_of_benchmarks_leave_what_every_sequence_would_hold(model, name):
    loaded, _ = models.load(model)
    prompt, spec = torch.arange(200)[None] % loaded.config.vocab_size, parse_cache(name)
    want, exact = spec.make(loaded.config), DynamicCache(config=loaded.config)
    loaded(prompt.expand(3, -1), **as_argument(want))
    loaded(prompt, **as_argument(exact))
    caches = {given: prefilled(spec, loaded, prompt, 3, given) for given in (None, exact)}
    for cache in caches.values():
        assert cache.get_seq_length() == want.get_seq_length() and cache_nbytes(cache) == cache_nbytes(want)
    expected = loaded(prompt[:, :1].expand(3, -1), **as_argument(want)).logits
    for given, cache in caches.items():
        logits = loaded(prompt[:, :1].expand(3, -1), **as_argument(cache)).logits
        if given is exact and spec.quantization is not None:
            # Other queries than the prompt's were asked how to fit it, so only about the same is stored.
            for got, own in ((getattr(cache.layers[-1], x), getattr(exact.layers[-1], x)) for x in ("keys", "values")):
                assert (got[:, :, :200] - own).norm() < 0.5 * own.expand_as(got[:, :, :200]).norm()
        else:
            assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
        assert (logits - logits[:1]).abs().max() < 1e-3 and exact.get_seq_length() == 200


def test_bench_generate_fills_a_budget(model, json_file):
    args = ("--model", model, "--context", 700, "--memory-budget", 0.004, "--steps", 3, "--caches", "full,logquant")
    succeed("bench", "generate", *args, "--json", json_file)
    full, packed = json.loads(json_file.read_text())["results"]
    assert full["batch"] == 0.004 * 2**30 // (4 * 700 * 2 * 32 * 2) < packed["batch"]
    for row in (full, packed):
        assert row["predicted"] * 0.9 < row["held"] <= row["predicted"] <= 0.004 * 2**30
    assert full["held"] == full["predicted"]
    refused = run("bench", "generate", *args[:4], "--memory-budget", 0.0001, "--steps", 3)
    assert refused.exit_code == 2 and "budget must be at least" in refused.output


def test_info_names_the_gpu_or_says_why_there_is_none(json_file, monkeypatch):
    output = succeed("info", "--json", json_file).output
    facts = json.loads(json_file.read_text())["machine"]
    assert facts["cuda_device"] in output
    monkeypatch.setattr(machine.torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    assert "none: torch finds no GPU" in succeed("info").output


def test_bench_attend_refuses_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    result = run("bench", "attend", "--device", "cuda")
    assert result.exit_code == 2 and "none: " in result.output
