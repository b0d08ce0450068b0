"""``logquant plan``."""

from __future__ import annotations

import json

import pytest

from tests.helpers.cli import refused, succeed


def test_the_command_says_what_fits(model_dir, json_file):
    output = succeed("plan", "--model", model_dir, "--memory", 0.01, "--context", 1000, "--json", json_file).output
    full, packed = json.loads(json_file.read_text())["results"]
    assert full["batch"] == int(0.01 * 2**30) // (4 * 1000 * 2 * 32 * 2) == full["longest"] // 1000
    assert packed["batch"] > full["batch"] and f"{packed['longest']:,}" in output
    assert "layer" not in output


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
    ],
)
def test_plan_explains_bad_arguments(model_dir, args, message):
    assert message in refused("plan", "--model", model_dir, *args)
