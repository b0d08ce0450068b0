"""Statistics of a model, known before any of its sequences: which key channels get columns, once and for all.

Without them each layer, head and sequence has a column map of its own, from the tokens that are there when its first
page is made (:mod:`logquant.quantizer.columns`). With them every sequence has the same from the start, and they take
no memory of a sequence. :func:`logquant.quantizer.calibrate.calibrate` makes them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import LogQuantConfig
from ..format import PageFormat
from ..learnt import Learnt
from . import columns

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Calibration(Learnt):
    """What calibration has found out about a model.

    The scores of channels are kept and not the maps that follow from them, so that one file serves every page format.

    Args:
        key_scores: of each layer with full attention, by its index: float32 ``[H, D]``, what quantised keys cost by
            channel (:meth:`logquant.quantizer.feedback.Attention.key_scores`).
        model: what identifies the model (:func:`logquant.files.fingerprint`).
        tokens: how many it was made from.

    Raises:
        ValueError: scores that are not float32 ``[H, D]``, finite and 0 or more.
    """

    what = "calibration"

    def __init__(self, key_scores: Mapping[int, Tensor], model: Mapping[str, str], tokens: int) -> None:
        for layer, score in key_scores.items():
            if score.dtype != torch.float32 or score.dim() != 2 or not (score.isfinite() & (score >= 0)).all():
                raise ValueError(
                    f"key_scores of layer {layer} must be float32 [heads, head_dim], finite and 0 or more, got "
                    f"{score.dtype} {list(score.shape)}"
                )
        self._key_scores = {layer: score.detach().cpu().contiguous() for layer, score in key_scores.items()}
        self.model, self.tokens = dict(model), tokens
        self._key_maps: dict[tuple[int, PageFormat, torch.device], Tensor] = {}

    def __repr__(self) -> str:
        return f"Calibration({len(self._key_scores)} layers, {self.tokens:,} tokens)"

    @property
    def layers(self) -> list[int]:
        """Those that have statistics."""
        return sorted(self._key_scores)

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        super().check(config, layers)
        if missing := [layer for layer in layers if layer not in self._key_scores]:
            raise ValueError(f"calibration must have statistics of every layer with full attention, lacks {missing}")

    def key_map(self, layer: int, fmt: PageFormat, heads: int, device: torch.device) -> Tensor:
        """The column map of a layer, int16 ``[1, H, C]``, for all sequences: the same tensor at every call.

        Raises:
            ValueError: another number of heads or head dimension than that of the calibration.
        """
        score = self._key_scores[layer]
        if score.shape != (heads, fmt.head_dim):
            raise ValueError(
                f"calibration of layer {layer} is of keys of {score.shape[0]} heads and dim {score.shape[1]}, got "
                f"{heads} heads and dim {fmt.head_dim}"
            )
        key = layer, fmt, device
        if key not in self._key_maps:
            self._key_maps[key] = columns.allocate(score, fmt)[None].to(device)
        return self._key_maps[key]

    # ------------------------------------------------------------------------------------------------------- files
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"layers.{layer}.key_scores": score for layer, score in self._key_scores.items()}
        return tensors, {"version": self.file_version, "model": self.model, "tokens": self.tokens}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> Calibration:
        """The inverse of :meth:`state`; tensors of other names are left alone.

        Raises:
            ValueError: a description that lacks something.
        """
        if missing := sorted({"model", "tokens"} - described.keys()):
            raise ValueError(f"the description of a calibration must have model and tokens, lacks {missing}")
        scores = {int(n.split(".")[1]): t for n, t in tensors.items() if n.endswith(".key_scores")}
        return cls(scores, described["model"], described["tokens"])


def calibration_of(config: LogQuantConfig) -> Calibration | None:
    """The calibration that a configuration has, or None.

    Raises:
        FileNotFoundError: it names a file that is not there.
        ValueError: a damaged file, or one of another kind or format version.
        TypeError: an object of another kind.
    """
    found = config.calibration
    if isinstance(found, str | os.PathLike):
        return Calibration.load(found)
    if not isinstance(found, Calibration | None):
        raise TypeError(f"calibration must be a Calibration, the path of its file, or None, got {type(found).__name__}")
    return found


def with_calibration(config: LogQuantConfig) -> LogQuantConfig:
    """The same configuration, with its calibration read if that is a file; raises as :func:`calibration_of`."""
    if isinstance(config.calibration, str | os.PathLike):
        return dataclasses.replace(config, calibration=calibration_of(config))
    return config
