"""Features of a model's layers, as they are trained, saved and read."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..config import LogQuantConfig
from ..files import digest, fingerprint, read, write
from ..residual_spec import ResidualSpec
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
        file: where they were read from; None if they were not.

    Raises:
        ValueError: no layers.
    """

    def __init__(
        self,
        kind: str,
        layers: Mapping[int, Features],
        model: Mapping[str, str],
        made: Mapping[str, object],
        file: str | None = None,
    ) -> None:
        if not layers:
            raise ValueError("layers of a residual must be at least one, got none")
        self.kind, self.model, self.made, self.file = kind, dict(model), dict(made), file
        self._layers = dict(layers)
        self._on: dict[tuple[int, torch.device], Features] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trained) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __deepcopy__(self, memo: object) -> Trained:
        return self

    @functools.cached_property
    def _identity(self) -> str:
        return digest(*self.state())

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
        """Refuse another model than that of the features (ValueError).

        Args:
            config: the model's configuration.
            layers: its layers with full attention.
        """
        # Not its weights: rounded to another dtype they differ, and what is trained serves them, too.
        if self.model.get("config") != fingerprint(config)["config"]:
            raise ValueError("residual was made for another model: its config differs from that of the model given")
        if others := sorted(set(self.layers) - set(layers)):
            raise ValueError(f"layers of residual must be among those with full attention, {layers}; got {others}")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it, as the tensors and the description of a file."""
        tensors = {
            f"layers.{layer}.{name}": t.detach().cpu().contiguous()
            for layer, features in self._layers.items()
            for name, t in features.tensors.items()
        }
        return tensors, {"version": FILE_VERSION, "kind": self.kind, "model": self.model, "made": self.made}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. A file that is there is replaced once the new one is complete.

        Raises:
            OSError: the file cannot be written; nothing is left of it.
        """
        write(path, KIND, *self.state())

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
        kind = described["kind"]
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"kind of residual in {path} must be one of {', '.join(KINDS)}, got {kind!r}")
        by_layer: dict[int, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            found = re.fullmatch(r"layers\.(\d+)\.(\w+)", full)
            if found is None:
                raise ValueError(f"a tensor in {path} must be called layers.NUMBER.NAME, got {full!r}")
            by_layer.setdefault(int(found[1]), {})[found[2]] = tensor
        layers = {layer: KINDS[kind].of_tensors(own) for layer, own in sorted(by_layer.items())}
        return cls(kind, layers, described["model"], described["made"], os.fspath(path))


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
