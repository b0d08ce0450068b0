"""Finding models: what is refused before anything is loaded, and what loading says of what is broken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from logquant import models


@pytest.fixture
def broken(model_dir, tmp_path) -> Path:
    """A copy of the tiny model, to break."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.mark.parametrize("model", ["/no/such", "a/b/c", "./a", "~/model", "owner/name.gguf", "no.gguf", "a b", "../x"])
def test_what_is_neither_there_nor_a_hub_id_is_said_to_be(model):
    for use in (models.check, models.load_config, models.load):
        with pytest.raises(OSError, match=r"there is no directory and no GGUF file .*; a hub id is OWNER/NAME"):
            use(model)


@pytest.mark.parametrize("model", [None, "owner/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2", "a.b/c_d-1.5"])
def test_hub_ids_are_left_to_the_hub(model):
    models.check(model)


def test_a_hub_that_does_not_give_it_is_said_in_a_line():
    with pytest.raises(OSError, match=r"^owner/name is no directory here, and the hub does not give it: [^\n]*$"):
        models.load_config("owner/name")


def test_other_files_and_directories_are_refused(tmp_path):
    file, weights = tmp_path / "weights.bin", tmp_path / "x.gguf"
    file.write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"model must be a directory, a GGUF file or a hub id, got .*weights\.bin"):
        models.check(str(file))
    with pytest.raises(ValueError, match=r"directory .* has no config\.json$"):
        models.check(str(tmp_path))
    weights.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"has no config\.json; did you mean .*x\.gguf\?"):
        models.check(str(tmp_path))
    models.check(str(weights))


def test_a_configuration_is_read_before_the_rest(broken):
    (broken / "config.json").write_text("{")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        models.load(str(broken))


def test_weights_that_are_not_there_are_named(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        models.load(str(broken))
