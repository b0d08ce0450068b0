"""Safetensors in and out, with all that is needed to refuse a damaged file or one that does not fit the model.

A file holds tensors and, as metadata, one JSON object: the file's version, what identifies the model, whatever else its
writer describes, and a digest of everything. There is no pickle in it, so reading one from a stranger is safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

# Settings of a configuration that do not change what a model's keys and values are.
_IRRELEVANT = ("architectures", "dtype", "output_attentions", "output_hidden_states", "return_dict", "use_cache")


def fingerprint(model: PreTrainedModel | PreTrainedConfig) -> dict[str, str]:
    """What identifies a model: digests of its configuration and, of a model with weights, of a sample of those."""
    own: PreTrainedConfig = model if isinstance(model, PreTrainedConfig) else model.config
    config = own.get_text_config(decoder=True).to_dict()
    relevant = {
        key: value
        for key, value in config.items()
        if key not in _IRRELEVANT and not key.startswith("_") and not key.endswith(("version", "token_id"))
    }
    digests = {"config": hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()}
    if isinstance(model, PreTrainedModel):
        digest = hashlib.sha256()
        for name, weight in sorted(model.named_parameters()):
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)].double().cpu()
            digest.update(f"{name} {list(weight.shape)}".encode() + sample.numpy().tobytes())
        digests["weights"] = digest.hexdigest()
    return digests


def digest(tensors: dict[str, Tensor], described: dict[str, Any]) -> str:
    """Of everything in a file."""
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


# -------------------------------------------------------------------------------------------------------- whole files
def write(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Write a file. One that is there stays until the new one is complete.

    Args:
        path: where to.
        kind: what is in it; its description is the metadata ``logquant_KIND``.
        tensors: on the CPU, contiguous.
        described: what JSON can hold, with the file's ``version``.

    Raises:
        OSError: the file cannot be written, as on a full disk; nothing is left of it.
    """
    metadata = {f"logquant_{kind}": json.dumps(described | {"digest": digest(tensors, described)})}
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata)
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"the {kind} could not be written to {path}: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


def read(path: str | os.PathLike[str], kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file that :func:`write` has written, complete and unchanged.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of another kind or version.
    """
    path, key = Path(path), f"logquant_{kind}"
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if key not in metadata:
        raise ValueError(f"{path} holds no LogQuant {kind}")
    try:
        described = json.loads(metadata[key])
        found, want = described["version"], described.pop("digest", None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its description cannot be read ({error})") from error
    if found != version:
        raise ValueError(f"{path} has version {found} of the file format; this logquant reads version {version}")
    if want != digest(tensors, described):
        raise ValueError(f"{path} is damaged: its contents are not those that were saved")
    return tensors, described
