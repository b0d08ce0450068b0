"""Features of a model's layers, as they are trained, saved and read."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..config import LogQuantConfig
from ..learnt import Learnt
from ..residual_spec import ResidualSpec
from . import KINDS
from .features import Features


class Trained(Learnt):
    """Features of a model's layers.

    Args:
        kind: one of :data:`logquant.residual.KINDS`.
        layers: features by layer, on the CPU; a layer that is not there has no residual.
        model: what identifies the model (:func:`logquant.files.fingerprint`).
        made: what they were trained with, for people to read.

    Attributes:
        file: where they were read from; None if they were not.

    Raises:
        ValueError: no layers.
    """

    what = "residual"

    def __init__(
        self, kind: str, layers: Mapping[int, Features], model: Mapping[str, str], made: Mapping[str, object]
    ) -> None:
        if not layers:
            raise ValueError("layers of a residual must be at least one, got none")
        self.kind, self.model, self.made = kind, dict(model), dict(made)
        self.file: str | None = None
        self._layers = dict(layers)
        self._on: dict[tuple[int, torch.device], Features] = {}

    @property
    def setting(self) -> str:
        """The text of a cache's settings that names the file.

        Raises:
            ValueError: they come from none.
        """
        if self.file is None:
            raise ValueError("residual must be read from a file for a cache to be saved, which names it; got none")
        return f"{self.kind}(file={self.file})"

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
            self._on[key] = own.to(device)
        return self._on[key]

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        super().check(config, layers)
        if others := sorted(set(self.layers) - set(layers)):
            raise ValueError(f"layers of residual must be among those with full attention, {layers}; got {others}")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            f"layers.{layer}.{name}": t.detach().cpu().contiguous()
            for layer, features in self._layers.items()
            for name, t in features.tensors.items()
        }
        return tensors, {"version": self.file_version, "kind": self.kind, "model": self.model, "made": self.made}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> Trained:
        if missing := sorted({"kind", "model", "made"} - described.keys()):
            raise ValueError(f"the description of a residual must have kind, model and made, lacks {missing}")
        kind = described["kind"]
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"kind of residual in a file must be one of {', '.join(KINDS)}, got {kind!r}")
        by_layer: dict[int, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            found = re.fullmatch(r"layers\.(\d+)\.(\w+)", full)
            if found is None:
                raise ValueError(f"a tensor of a residual must be called layers.NUMBER.NAME, got {full!r}")
            by_layer.setdefault(int(found[1]), {})[found[2]] = tensor
        layers = {layer: KINDS[kind].of_tensors(own) for layer, own in sorted(by_layer.items())}
        return cls(kind, layers, described["model"], described["made"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trained:
        trained = super().load(path)
        trained.file = os.fspath(path)
        return trained


def residual_of(config: LogQuantConfig) -> Trained | None:
    """What a configuration has that stands for dropped tokens, or None.

    Raises:
        FileNotFoundError: it names a file that is not there.
        ValueError: a damaged file, or one of another kind of residual or format version.
        TypeError: an object of another kind.
    """
    found = config.residual
    if not isinstance(found, str):
        if not isinstance(found, Trained | None):
            raise TypeError(f"residual must be a Trained, a text that names its file, or None, got {found!r}")
        return found
    spec = ResidualSpec.parse(found)
    if not Path(spec.file).is_file():
        raise FileNotFoundError(f"there is no file {spec.file}, which residual names")
    trained = Trained.load(spec.file)
    if trained.kind != spec.kind:
        raise ValueError(f"residual is {spec.kind}, and {spec.file} holds {trained.kind}")
    return trained


def with_residual(config: LogQuantConfig) -> LogQuantConfig:
    """The same configuration, with its residual read if that is a file; raises as :func:`residual_of`."""
    if isinstance(config.residual, str):
        return dataclasses.replace(config, residual=residual_of(config))
    return config
