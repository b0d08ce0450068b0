"""``logquant calibrate``: a file of what a model's queries look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .shared import Dtype, Json, Model, errors_of, load_model, progress, write_json


def command(
    files: Annotated[list[Path], typer.Argument(help="Files of text, like those that the model will see.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.")] = Path("calibration.safetensors"),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text, if it has as many.")] = 2048,
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    json_file: Json = None,
) -> None:
    """Find out which key channels a model's queries look at, for its caches logquant:calibration=FILE."""
    arguments = dict(locals())
    from ..eval import read_ids
    from ..quantizer.calibrate import calibrate

    with errors_of("--output"):
        if not output.absolute().parent.is_dir():
            raise ValueError(f"there is no directory {output.absolute().parent}")
    loaded, tokenizer = load_model(model, dtype)
    with errors_of("files"):
        texts = [torch.tensor(read_ids(tokenizer, file)[:tokens]) for file in files]
    with progress(f"{len(texts)} texts", sum(len(text) for text in texts)) as advance, errors_of("files"):
        calibration = calibrate(loaded, texts, on_progress=advance)
    with errors_of("--output"):
        calibration.save(output)
    typer.echo(f"{output}: {calibration.tokens:,} tokens, {output.stat().st_size / 1e3:.0f} kB")
    write_json(json_file, "calibrate", arguments, tokens=calibration.tokens, layers=calibration.layers)
