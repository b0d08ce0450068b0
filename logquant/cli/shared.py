"""What several commands share: options, checks of arguments, progress, tables and files of results."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import machine

if TYPE_CHECKING:
    from ..methods.registry import CacheSpec

GIB = 1 << 30


# ---------------------------------------------------------------------------------------------------------- options
class Dtype(str, Enum):
    """Of weights and exact tokens."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[self.value]


CACHE_HELP = (
    "logquant, paper, recent, full, or another method: partial, kivi, oscar, turboquant, quanto, hqq, streaming, h2o; "
    "settings follow a colon, as in logquant:bits=4,window=128 or logquant:calibration=FILE."
)
Caches = Annotated[str, typer.Option(help=f"Separated by commas: {CACHE_HELP}")]
Model = Annotated[
    str | None, typer.Option("--model", help="Directory or hub id; by default the packaged SmolLM2-135M-Instruct.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


# -------------------------------------------------------------------------------------------------------- arguments
@contextmanager
def errors_of(option: str) -> Iterator[None]:
    """Report a bad value of ``option`` as such, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def number_list(option: str, text: str) -> list[int]:
    """Positive numbers, separated by commas."""
    with errors_of(option):
        numbers = [int(part) for part in text.split(",")]
        if min(numbers) < 1:
            raise ValueError(f"numbers must be at least 1, got {text!r}")
        return numbers


def cache_list(option: str, text: str) -> list[CacheSpec]:
    """Caches by name, separated by commas."""
    from ..methods.registry import parse_caches  # slow to import, so not for --help

    with errors_of(option):
        return parse_caches(text)


def load_model(model: str | None, dtype: Dtype) -> tuple[Any, Any]:
    """The model that ``--model`` names, and its tokenizer."""
    with errors_of("--model"):
        from .. import models  # slow to import, so not for --help

        return models.load(model, dtype=dtype.torch)


# ---------------------------------------------------------------------------------------------------------- results
@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr, so that stdout holds the result alone. Gives what advances it, by 1 or by a number."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(done: int = 1) -> None:
            bar.advance(task, done)

        yield advance


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def result_table(*columns: str, title: str | None = None, caption: str | None = None, no_wrap: bool = True) -> Table:
    """A table with names in the first column, to the left, and numbers in the others, to the right."""
    table = Table(*columns, title=title, caption=caption)
    for column in table.columns:
        column.no_wrap, column.justify = no_wrap, "right"
    table.columns[0].justify = "left"
    return table


def write_json(file: Path | None, kind: str, arguments: dict[str, Any], **result: Any) -> None:
    """Write a result with what produced it: the command, its arguments and the machine."""
    if file is None:
        return
    with errors_of("--json"):
        command = shlex.join(["logquant", *sys.argv[1:]])
        content = {"kind": kind, "command": command, "arguments": arguments, "machine": machine.describe(), **result}
        file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
