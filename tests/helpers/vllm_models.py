"""A model for tests of engines: the first layers of SmolLM2, with a calibration."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from logquant import models
from logquant.quantizer.calibrate import calibrate

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
LAYERS = 3


def save_first_layers(directory: Path) -> tuple[str, str]:
    """The directory of a model with few layers, and the file of its calibration."""
    model, tokenizer = models.load(models.default_model())
    model.config = copy.deepcopy(model.config)
    model.config.num_hidden_layers = LAYERS
    model.model.layers = model.model.layers[:LAYERS]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    calibrate(model, [ids[:1024]]).save(directory / "calibration.safetensors")
    return str(directory / "model"), str(directory / "calibration.safetensors")
