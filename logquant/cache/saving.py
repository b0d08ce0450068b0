"""Caches and calibrations in files: safetensors, with all that is needed to refuse a file that does not fit the model.

A file holds the tensors of each layer (``layers.3.pages``) and, as metadata, one JSON object: the file's version, what
identifies the model, and a digest of everything; of a cache also its settings and where the tokens are. There is no
pickle in it, so reading one from a stranger is safe.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import LogQuantConfig
from ..files import fingerprint, read, write
from ..quantizer.calibration import Calibration, calibration_of
from ..quantizer.queries import Newest
from .layout import Rows, Slots

if TYPE_CHECKING:
    from .cache import LogQuantCache
    from .layer import LogQuantLayer

FILE_VERSION = 1
KIND = "cache"


# -------------------------------------------------------------------- layers that transformers made: whatever they hold
def _take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; tensors in it go to ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}
    if isinstance(value, dict):
        return {"dict": [[key, _take_apart(v, f"{name}.{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_take_apart(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be saved")


def _put_together(described: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Any:
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
        return {key: _put_together(v, tensors, device) for key, v in value}
    if kind == "list":
        return [_put_together(v, tensors, device) for v in value]
    return value


# ------------------------------------------------------------------------------------------------------------- saving
def save(cache: LogQuantCache, path: str | os.PathLike[str], model: PreTrainedModel | None = None) -> None:
    """Write a cache to a file; see :meth:`logquant.LogQuantCache.save`."""
    from .layer import LogQuantLayer

    tensors: dict[str, Tensor] = {}
    own = [layer for layer in cache.layers if isinstance(layer, LogQuantLayer) and layer.is_initialized]
    cache.check_layers_agree()
    layers = []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LogQuantLayer):
            state: dict[str, Any] = {"is_initialized": layer.is_initialized, "record_past": layer.record_past}
            if layer.newest_queries is not None:
                newest = layer.newest_queries
                state["newest"] = {name: getattr(newest, name) for name in ("columns", "scale", "softcap")}
            for name, tensor in _used(layer).items() if layer.is_initialized else ():
                tensors[f"layers.{i}.{name}"] = tensor.detach().cpu().contiguous()
            layers.append({"kind": "LogQuantLayer", "state": state})
        else:
            layers.append({"kind": type(layer).__name__, "state": _take_apart(vars(layer), f"layers.{i}", tensors)})
    described = {
        "version": FILE_VERSION,
        "settings": {name: value for name, value in asdict(cache.quantization).items() if name != "calibration"},
        "model": fingerprint(model if model is not None else cache.config),
        "layers": layers,
    }
    if own:
        rows = own[0].rows
        described["rows"] = {"columns": rows.columns, "slots": [[s.tokens, s.settled] for s in rows.slots]}
        if rows.real is not None:
            real = torch.zeros(len(rows.slots), rows.columns, dtype=torch.uint8)
            for row, columns in zip(real, rows.real, strict=True):
                row[columns.long()] = 1
            tensors["real"] = real
    if (calibration := calibration_of(cache.quantization)) is not None:
        statistics, described["calibration"] = calibration.state()
        tensors |= statistics
    write(path, KIND, tensors, described)


def _used(layer: LogQuantLayer) -> dict[str, Tensor]:
    """The parts of a layer's tensors that hold something."""
    rows = layer.rows
    newest = layer.newest_queries
    optional = {
        "key_map": None if layer.config.calibration else layer.key_map,
        "newest.query": None if newest is None else newest.query,
        "newest.real": None if newest is None else newest.real,
    }
    return {name: tensor for name, tensor in optional.items() if tensor is not None} | {
        "pages": layer.pages[:, :, : rows.packed // layer.format.page_tokens],
        "window_k": layer.window_k[:, :, : rows.exact],
        "window_v": layer.window_v[:, :, : rows.exact],
    }


# ------------------------------------------------------------------------------------------------------------ loading
def load(
    kind: type[LogQuantCache],
    path: str | os.PathLike[str],
    model: PreTrainedModel | PreTrainedConfig,
    device: torch.device | str | None = None,
) -> LogQuantCache:
    """Read a cache from a file; see :meth:`logquant.LogQuantCache.load`."""
    from .layer import LogQuantLayer

    path = Path(path)
    tensors, described = read(path, KIND, FILE_VERSION)
    if device is None:
        device = model.device if isinstance(model, PreTrainedModel) else "cpu"
    device = torch.device(device)
    config = model if isinstance(model, PreTrainedConfig) else model.config
    for part, digest in fingerprint(model).items():
        if described["model"].get(part, digest) != digest:
            raise ValueError(f"{path} was made by another model: its {part} differs from that of the model given")
    calibration = None
    if "calibration" in described:
        calibration = Calibration.from_state(tensors, described["calibration"])
    cache = kind(config, LogQuantConfig(**described["settings"], calibration=calibration))
    kinds = [type(layer).__name__ for layer in cache.layers]
    if kinds != [layer["kind"] for layer in described["layers"]]:
        raise ValueError(f"{path} has other kinds of layers than a cache of this model: {kinds}")
    rows = _rows(described, tensors, cache.quantization)
    for i, (layer, saved) in enumerate(zip(cache.layers, described["layers"], strict=True)):
        if not isinstance(layer, LogQuantLayer):
            vars(layer).update(_put_together(saved["state"], tensors, device))
            continue
        layer.record_past = saved["state"]["record_past"]
        if saved["state"]["is_initialized"]:
            names = [name for name in ("pages", "window_k", "window_v", "key_map") if f"layers.{i}.{name}" in tensors]
            parts = {name: tensors[f"layers.{i}.{name}"].to(device) for name in names}
            newest = None
            if (query := tensors.get(f"layers.{i}.newest.query")) is not None:
                real = tensors.get(f"layers.{i}.newest.real")
                newest = Newest((query,), real, **saved["state"]["newest"]).map(lambda t: t.to(device))
            layer.restore(rows, **parts, newest=newest)
    return cache


def _rows(described: dict[str, Any], tensors: dict[str, Tensor], settings: LogQuantConfig) -> Rows | None:
    if "rows" not in described:
        return None
    slots = tuple(
        Slots(settings.window, settings.rule, settings.sinks, tokens, settled)
        for tokens, settled in described["rows"]["slots"]
    )
    real = None
    if "real" in tensors:
        real = tuple(row.nonzero().squeeze(1).int() for row in tensors["real"])
    return Rows(slots, described["rows"]["columns"], real)
