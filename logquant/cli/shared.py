"""What several commands share: options, checks of arguments, progress and files of results.

Nothing here imports torch before it is needed: what is wrong on the command line is said at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from ..texts import read_text

if TYPE_CHECKING:
    import torch

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
        import torch

        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


def writable(file: Path | None) -> Path | None:
    """A callback of options that name a file to write: one that cannot be written is refused before the work."""
    if file is None:
        return None
    directory = file.absolute().parent
    try:
        if file.is_dir():
            raise typer.BadParameter(f"{file} is a directory, a file is needed")
        if file.is_file():
            with file.open("ab"):
                pass
        elif not file.exists():
            if not directory.is_dir():
                raise typer.BadParameter(f"there is no directory {directory} to write {file.name} to")
            with tempfile.TemporaryFile(dir=directory):
                pass
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be written: {error.strerror}") from None
    return file


def finite(value: float | None) -> float | None:
    """A callback of options that are numbers: Python reads ``nan`` and ``inf``, too."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"a number is needed, got {value}")
    return value


OWN = ("logquant", "fine", "small", "log", "recent", "paper")
"""Names of LogQuant caches."""

_QUANTISING = ("partial", "kivi", "oscar", "turboquant", "kvarn", "occam", "kitty", "nexusquant", "quanto", "hqq")
_OTHERS = (*_QUANTISING, "streaming", "h2o", "clusterkv")
METHODS = (*OWN, *_OTHERS, "full")
"""Names of caches; the same as ``logquant.methods.method_names()``, which takes long to import."""

CACHE_HELP = (
    f"{', '.join(METHODS)}; settings follow a colon, as in logquant:bits=4,window=128 or logquant:calibration=FILE."
)
Caches = Annotated[str, typer.Option(help=f"Separated by commas: {CACHE_HELP}")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Directory, GGUF file or hub id; by default the packaged SmolLM2-135M-Instruct."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.", callback=writable)]


# -------------------------------------------------------------------------------------------------------- arguments
def bad(option: str, message: object) -> typer.BadParameter:
    """A bad value of an option, in one line."""
    return typer.BadParameter(" ".join(str(message).split()), param_hint=option)


def first_sentence(error: Exception) -> str:
    """Of the message of another package, which may be a page long; of torch's allocator, what matters in it."""
    if asked := re.search(r"you tried to allocate (\d+) bytes", str(error)):
        return f"{int(asked[1]) / 1e9:,.1f} GB were asked for at once"
    return re.split(r"\.?\s*\n|\. ", str(error).strip())[0] or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Also torch's error, which has a class of its own for GPUs only."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(w in str(error) for w in words)


@contextlib.contextmanager
def errors_of(option: str) -> Iterator[None]:
    """Report a bad value of ``option`` as such, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise bad(option, error) from error


def number_list(option: str, text: str, least: int = 1) -> list[int]:
    """Whole numbers from ``least`` on, separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise bad(option, f"whole numbers separated by commas are needed, got {text!r}") from None
    if min(numbers) < least:
        raise bad(option, f"numbers must be at least {least}, got {text!r}")
    return numbers


def texts(option: str, files: Sequence[Path]) -> list[str]:
    """What is in files of text, so that one that cannot be read is named before the work."""
    with errors_of(option):
        return [read_text(file) for file in files]


def not_among(option: str, output: Path | None, inputs: Sequence[Path]) -> None:
    """Refuse to write over what is read, or written by another option."""
    if output is not None and output.resolve() in [file.resolve() for file in inputs]:
        raise bad(option, f"{output} would be written over")


def cache_list(option: str, text: str, *, known_bytes: bool = False) -> list[CacheSpec]:
    """Caches by name, separated by commas; with ``known_bytes`` those alone whose bytes a configuration tells."""
    names = [name for piece in text.split(",") if (name := piece.strip().partition(":")[0]) and "=" not in name]
    for name in names:
        if name not in METHODS:
            raise bad(option, f"cache must be one of {', '.join(METHODS)}, got {name!r}")
        if known_bytes and name in _OTHERS:
            raise bad(option, f"bytes are known beforehand of {', '.join(OWN)} and full alone, got {name!r}")
    with spinner("importing transformers"):
        from ..methods.registry import parse_caches

    with errors_of(option):
        return parse_caches(text)


def one_cache(option: str, text: str) -> CacheSpec:
    """A single cache by name."""
    specs = cache_list(option, text)
    if len(specs) > 1:
        raise bad(option, f"one cache is needed, got {text!r}")
    return specs[0]


def with_settings(option: str, spec: CacheSpec, **given: int | None) -> CacheSpec:
    """The same cache with the settings that options of their own have given."""
    fields = {name: value for name, value in given.items() if value is not None}
    with errors_of(", ".join([option, *(f"--{name.replace('_', '-')}" for name in fields)])):
        return spec.replace(**fields)


def check_fits(option: str, specs: Sequence[CacheSpec], config: Any) -> None:
    """Refuse caches that do not fit a model, or need what is not installed, before the work."""
    for spec in specs:
        with errors_of(option):
            try:
                spec.make(config)
            except (ValueError, ImportError) as error:
                raise ValueError(f"cache {spec.name!r}: {error}") from error


def check_model(model: str | None) -> None:
    """Refuse a ``--model`` that is not there, before all else."""
    from ..models import check

    with errors_of("--model"):
        check(model)


@contextlib.contextmanager
def errors_of_model(model: str | None) -> Iterator[None]:
    """Report whatever goes wrong while a model is loaded, but for a lack of memory, as an error of ``--model``."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        message, name = first_sentence(error), model or "the default model"
        raise bad("--model", message if message.startswith(name) else f"{name} cannot be loaded: {message}") from error


def load_model(model: str | None, dtype: Dtype) -> tuple[Any, Any]:
    """The model that ``--model`` names, and its tokenizer."""
    check_model(model)
    with spinner(f"loading {model or 'the model'}"), errors_of_model(model):
        from .. import models

        return models.load(model, dtype=dtype.torch)


# --------------------------------------------------------------------------------------------------------- progress
@contextlib.contextmanager
def spinner(description: str) -> Iterator[None]:
    """Something that moves on stderr, if that is a terminal, while what takes unknown time is done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(description):
        yield


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr, if that is a terminal. Gives what advances it, by 1 or by a number."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def advance(done: int = 1) -> None:
            bar.advance(task, done)

        yield advance


# ---------------------------------------------------------------------------------------------------------- results
def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def write_json(file: Path | None, kind: str, arguments: dict[str, Any], **result: Any) -> None:
    """Write a result with what produced it: the command, its arguments and the machine."""
    if file is None:
        return
    from .. import machine

    with errors_of("--json"):
        command = shlex.join(["logquant", *sys.argv[1:]])
        content = {"kind": kind, "command": command, "arguments": arguments, "machine": machine.describe(), **result}
        file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
