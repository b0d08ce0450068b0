"""``logquant train-residual``: a file of what stands for the tokens that a cache drops."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
    number_list,
    one_cache,
    progress,
    texts,
    writable,
    write_json,
)


def command(
    files: Annotated[list[Path], typer.Argument(help="Files of text, like those that the model will see.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.", callback=writable)] = Path(
        "less.safetensors"
    ),
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="A text to measure on, given again for more; by default an eighth of FILES."),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="One with prune: train for what it drops, as logquant:prune=snapkv(keep=0.25)."),
    ] = None,
    recent: Annotated[int, typer.Option(min=1, help="Newest tokens that a query finds, besides the first 4.")] = 64,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of each piece of text.")] = 1024,
    pieces: Annotated[int, typer.Option(min=1, help="Pieces of each file, if it has as many.")] = 4,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    hidden: Annotated[int, typer.Option(min=1, help="Size of the nets.")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Numbers for each value channel that a KV head keeps.")] = 8,
    layers: Annotated[str | None, typer.Option(help="Only these, separated by commas; others get none.")] = None,
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    json_file: Json = None,
) -> None:
    """Train what stands for dropped tokens, for the model's caches logquant:prune=...,residual=less(file=FILE)."""
    arguments = dict(locals())
    apart = held_out or []
    texts("FILES", files)
    texts("--held-out", apart)
    not_among("--output", output, [*files, *apart])
    not_among("--json", json_file, [*files, *apart, output])
    only = None if layers is None else _layers(layers)
    check_model(model)
    from ..files import fingerprint
    from ..residual.dropping import Dropping, Pruning, Window
    from ..residual.examples import examples
    from ..residual.train import Training, errors, output_projections, train
    from ..residual.trained import Trained

    training = Training(rank, hidden, epochs)
    dropping: Dropping = Window(recent=recent)
    if cache is not None:
        quantization = one_cache("--cache", cache).quantization
        if quantization is None or quantization.prune is None:
            raise bad("--cache", f"a LogQuant cache with prune is needed, got {cache!r}")
        dropping = Pruning(quantization)
    with errors_of("--tokens"):
        dropping.check(tokens)
    loaded, tokenizer = load_model(model, dtype)
    with errors_of("FILES"):
        learnt = _pieces(tokenizer, files, tokens, pieces)
    with errors_of("--held-out"):
        kept = _pieces(tokenizer, apart, tokens, pieces)
    if not apart:
        learnt, kept = [x for i, x in enumerate(learnt) if i % 8 != 7], learnt[7::8]
    if not kept:
        raise bad("--held-out", f"a text is needed where there are less than 8 pieces, got {len(learnt)}")
    projections = output_projections(loaded)
    with progress(f"{len(learnt)} + {len(kept)} texts", len(learnt) + len(kept)) as advance, errors_of("--layers"):
        made = examples(loaded, learnt, dropping, only, advance)
        others = examples(loaded, kept, dropping, only, advance)
    nets, found = {}, {}
    typer.echo("error of a block's output on other texts\nlayer  dropping  residual   less by")
    with progress(f"{len(made)} layers", len(made) * epochs) as advance:
        for layer in sorted(made):
            project = projections[layer] if layer < len(projections) else None
            if project is None:
                raise bad("--model", f"attention with an output projection o_proj is needed, layer {layer} has none")
            nets[layer] = train(made.pop(layer), project, training, layer, advance)
            found[layer] = own = errors(nets[layer], others.pop(layer), project)
            less = 1 - own.residual / own.dropping if own.dropping else 0.0
            typer.echo(f"{layer:5}  {own.dropping:8.3f}  {own.residual:8.3f}  {less:8.0%}")
    better = sum(own.residual <= 0.7 * own.dropping for own in found.values())
    typer.echo(f"at least 30 % less in {better} of {len(found)} layers")
    described: dict[str, Any] = asdict(training) | {"dropping": repr(dropping), "texts": len(learnt), "tokens": tokens}
    with errors_of("--output"):
        Trained("less", nets, fingerprint(loaded.config), described).save(output)
    typer.echo(f"{output}: {output.stat().st_size / 1e6:,.1f} MB")
    write_json(json_file, "train-residual", arguments, errors={n: own._asdict() for n, own in found.items()})


def _layers(text: str) -> list[int]:
    """Numbers of layers, from 0."""
    numbers = number_list("--layers", text, least=0)
    if len(set(numbers)) < len(numbers):
        raise bad("--layers", f"different numbers from 0 on are needed, got {text!r}")
    return numbers


def _pieces(tokenizer: Any, files: list[Path], tokens: int, pieces: int) -> list[Any]:
    """Token ids int64 ``[tokens]``, of each file up to so many pieces, spread over it.

    Raises:
        ValueError: a file that has not one.
    """
    import torch

    from ..eval import read_ids

    found = []
    for file in files:
        ids = torch.tensor(read_ids(tokenizer, file, tokens))
        whole = ids[: len(ids) // tokens * tokens].view(-1, tokens)
        count = min(pieces, len(whole))
        found += [whole[i * len(whole) // count] for i in range(count)]
    return found
