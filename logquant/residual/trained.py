"""Features of a model's layers, as they are trained, saved and read."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..config import LogQuantConfig
from ..files import fingerprint, read, write
from . import KINDS
from .features import Features

FILE_VERSION = 1
KIND = "residual"


class Trained:
    """Features of a model's layers. They never change, so caches share them.

    Args:
        kind: one of :data:`logquant.residual.KINDS`.
        layers: features by layer, on the CPU; a layer that is not there has no residual.
        model: what identifies the model (:func:`logquant.files.fingerprint`).
        made: what they were trained with, for people to read.

    Raises:
        ValueError: no layers.
    """

    def __init__(
        self, kind: str, layers: Mapping[int, Features], model: Mapping[str, str], made: Mapping[str, object]
    ) -> None:
        if not layers:
            raise ValueError("layers of a residual must be at least one, got none")
        self.kind, self.model, self.made = kind, dict(model), dict(made)
        self._layers = dict(layers)
        self._on: dict[tuple[int, torch.device], Features] = {}

    @property
    def layers(self) -> list[int]:
        """Those that have features."""
        return sorted(self._layers)

    def features(self, layer: int, device: torch.device) -> Features | None:
        """Of a layer, on a device; None if it has none. The same tensors at every call."""
        own = self._layers.get(layer)
        if own is None or device.type == "cpu":
            return own
        key = layer, device
        if key not in self._on:
            self._on[key] = type(own).of_tensors({name: t.to(device) for name, t in own.tensors.items()})
        return self._on[key]

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse another model than that of the features (ValueError)."""
        # Not its weights: rounded to another dtype they differ, and what is trained serves them, too.
        if self.model.get("config") != fingerprint(config)["config"]:
            raise ValueError("residual was made for another model: its config differs from that of the model given")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. A file that is there is replaced once the new one is complete.

        Raises:
            OSError: the file cannot be written; nothing is left of it.
        """
        tensors = {
            f"layers.{layer}.{name}": t.detach().cpu().contiguous()
            for layer, features in self._layers.items()
            for name, t in features.tensors.items()
        }
        described = {"version": FILE_VERSION, "kind": self.kind, "model": self.model, "made": self.made}
        write(path, KIND, tensors, described)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trained:
        """Read a file that :meth:`save` has written.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, or one of another kind or format version.
        """
        tensors, described = read(path, KIND, FILE_VERSION)
        if missing := sorted({"kind", "model", "made"} - described.keys()):
            raise ValueError(f"the description of a residual must have kind, model and made, lacks {missing}")
        if described["kind"] not in KINDS:
            raise ValueError(f"kind of residual in {path} must be one of {', '.join(KINDS)}, got {described['kind']!r}")
        by_layer: dict[int, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            _, layer, name = full.split(".", 2)
            by_layer.setdefault(int(layer), {})[name] = tensor
        make = KINDS[described["kind"]].of_tensors
        layers = {layer: make(own) for layer, own in sorted(by_layer.items())}
        return cls(described["kind"], layers, described["model"], described["made"])


def residual_of(config: LogQuantConfig) -> Trained | None:
    """What the file holds that a configuration names, or None. Read once, as long as the file is the same.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a damaged file, or one of another kind of residual or format version.
    """
    spec = config.residual_spec()
    if spec is None:
        return None
    path = Path(spec.file).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {spec.file}, which residual names")
    status = path.stat()
    trained = _read(path, status.st_mtime_ns, status.st_size)
    if trained.kind != spec.kind:
        raise ValueError(f"residual is {spec.kind}, and {spec.file} holds {trained.kind}")
    return trained


@functools.lru_cache(maxsize=4)
def _read(path: Path, modified: int, size: int) -> Trained:
    return Trained.load(path)
