"""``logquant calibrate``: a file of what a model's queries look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import (
    Dtype,
    Json,
    Model,
    bad,
    check_model,
    errors_of,
    load_model,
    not_among,
    progress,
    texts,
    writable,
    write_json,
)


def command(
    files: Annotated[list[Path], typer.Argument(help="Files of text, like those that the model will see.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.", callback=writable)] = Path(
        "calibration.safetensors"
    ),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text, if it has as many.")] = 2048,
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    json_file: Json = None,
) -> None:
    """Find out which key channels a model's queries look at, for its caches logquant:calibration=FILE."""
    arguments = dict(locals())
    texts("FILES", files)
    not_among("--output", output, files)
    not_among("--json", json_file, [*files, output])
    check_model(model)
    import torch

    from ..eval import read_ids
    from ..quantizer.calibrate import LEAST_TOKENS, calibrate

    if tokens < LEAST_TOKENS:
        raise bad("--tokens", f"at least {LEAST_TOKENS} are needed, got {tokens}")
    loaded, tokenizer = load_model(model, dtype)
    with errors_of("FILES"):
        ids = [torch.tensor(read_ids(tokenizer, file, LEAST_TOKENS)[:tokens]) for file in files]
    with progress(f"{len(ids)} texts", sum(len(text) for text in ids)) as advance, errors_of("--model"):
        calibration = calibrate(loaded, ids, on_progress=advance)
    with errors_of("--output"):
        calibration.save(output)
    typer.echo(f"{output}: {calibration.tokens:,} tokens, {output.stat().st_size / 1e3:.0f} kB")
    write_json(json_file, "calibrate", arguments, tokens=calibration.tokens, layers=calibration.layers)
