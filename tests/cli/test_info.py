"""``logquant info``."""

from __future__ import annotations

import json
from importlib.metadata import version

from logquant import __version__, machine
from tests.helpers.cli import succeed


def test_info_tells_what_is_in_use(json_file):
    output = succeed("info", "--json", json_file).output
    facts = json.loads(json_file.read_text())["machine"]
    assert facts["logquant"] == __version__ and facts["extension_error"] is None
    assert facts["transformers"] == version("transformers")
    assert facts["instruction_set"] in facts["instruction_sets_available"]
    assert facts["instruction_set"] in output and "in use" in output


def test_info_tells_why_the_fast_path_is_off(monkeypatch):
    monkeypatch.setattr(machine.ops, "extension_error", lambda: "the moon is full")
    output = succeed("info").output
    assert "off: the moon is full" in output and "instruction set " not in output


def test_info_names_the_gpu_or_says_why_there_is_none(json_file, monkeypatch):
    output = succeed("info", "--json", json_file).output
    facts = json.loads(json_file.read_text())["machine"]
    assert facts["cuda_device"] in output
    monkeypatch.setattr(machine.torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    assert "none: torch finds no GPU" in succeed("info").output
