"""Layers that transformers made: whatever they hold in files, as JSON and tensors; what they cannot take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticSlidingWindowLayer


def check_sliding(layers: Sequence[object], tokens_to_remove: int) -> None:
    """Refuse (RuntimeError) a crop of sliding layers of fixed size that have forgotten what would come back."""
    sliding = [layer for layer in layers if isinstance(layer, StaticSlidingWindowLayer)]
    for layer in sliding if tokens_to_remove < 0 else ():
        if layer.is_initialized and int(layer.cumulative_length) > layer.max_cache_len:
            raise RuntimeError(
                f"a sliding layer has forgotten all but its newest {layer.max_cache_len} tokens, and cannot take any "
                "of them back: reset() the cache and feed it the sequence again"
            )


def take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; tensors in it go to ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}
    if isinstance(value, dict):
        return {"dict": [[key, take_apart(v, f"{name}.{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [take_apart(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be saved")


def put_together(described: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Any:
    ((kind, value),) = described.items()
    if kind == "tensor":
        return tensors[value].to(device)
    if kind == "dtype":
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"the file names a dtype that torch does not have: {value!r}")
        return dtype
    if kind == "device":
        return device
    if kind == "dict":
        return {key: put_together(v, tensors, device) for key, v in value}
    if kind == "list":
        return [put_together(v, tensors, device) for v in value]
    return value
