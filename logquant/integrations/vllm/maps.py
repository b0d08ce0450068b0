"""The bit allocation of keys: of the model, since requests share blocks; a calibration says it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...config import LogQuantConfig
from ...format import PageFormat
from ...quantizer.calibration import Calibration


@functools.lru_cache(maxsize=4)
def _load(path: str) -> Calibration:
    return Calibration.load(path)


def key_map(config: LogQuantConfig, model: Any, layer: int, fmt: PageFormat, heads: int) -> Tensor | None:
    """The column map of a layer, int16 ``[1, heads, C]``, or None where all channels have the same bits.

    Args:
        config: LogQuant's settings.
        model: configuration of the model, transformers'.
        layer: index of the layer.
        fmt: the page format.
        heads: KV heads of the model.

    Raises:
        FileNotFoundError: the file of the calibration is not there.
        ValueError: no calibration where one is needed, a damaged one, or one of another model.
    """
    if not config.has_map(fmt):
        return None
    if config.calibration is None:
        name = getattr(model, "_name_or_path", "") or "MODEL"
        raise ValueError(
            "LogQuant's KV cache needs a calibration of the model. Make one, in a few minutes, from texts like those "
            f"that it will see: logquant calibrate TEXT1 TEXT2 --model {name} --output calibration.safetensors; then "
            'pass additional_config={"logquant": {"calibration": "calibration.safetensors"}}. Without one, '
            '"key_columns": 1 gives every channel the same bits, at a loss'
        )
    found = _load(str(config.calibration))
    found.check(model, [layer])
    return found.key_map(layer, fmt, heads, torch.device("cpu"))
