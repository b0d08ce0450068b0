"""``logquant plan``."""

from __future__ import annotations

import json

from tests.helpers.cli import run, succeed


def test_the_command_says_what_fits(model_dir, json_file):
    output = succeed("plan", "--model", model_dir, "--memory", 0.01, "--context", 1000, "--json", json_file).output
    full, packed = json.loads(json_file.read_text())["results"]
    assert full["batch"] == int(0.01 * 2**30) // (4 * 1000 * 2 * 32 * 2) == full["longest"] // 1000
    assert packed["batch"] > full["batch"] and f"{packed['longest']:,}" in output
    assert "layer" not in output and run("plan", "--model", model_dir, "--memory", 0).exit_code == 2
