"""The command line: every file is a command, but for ``shared``, ``tables`` and ``interrupt`` (what they share) and
``render`` (pages of results).

What takes long to import is imported within commands, so that ``--help`` and what is said of a typo are quick.
"""

from __future__ import annotations

from typing import Annotated, Any

try:
    import rich  # noqa: F401
    import typer
    from typer.core import TyperGroup
except ImportError as error:
    raise SystemExit(f"the command line needs more packages ({error}): pip install 'logquant[cli]'") from error

from .._version import __version__
from . import bench_attend, bench_generate, bench_memory, calibrate, eval, generate, info, plan, report, train_residual
from .shared import first_sentence, is_out_of_memory

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Commands that say in a line that memory has run out."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            typer.echo(f"Error: not enough memory: {first_sentence(error)}", err=True)
            raise typer.Exit(1) from error


# Errors in one line, not framed and broken: `rich_markup_mode` would do that.
app = typer.Typer(
    cls=_Commands,
    help="A 2-bit KV cache for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"logquant {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """A 2-bit KV cache for large language models."""


# Of these, `--help` shows the line whole; of a command's own first line it would show the beginning.
app.command("generate", short_help="Stream a model's answer, then say what it cost.")(generate.command)
app.command("info", short_help="Say what is installed and what of it runs here.")(info.command)
app.command("plan", short_help="Say how many sequences fit into memory.")(plan.command)
app.command("calibrate", short_help="Find out which key channels a model looks at.")(calibrate.command)
app.command("train-residual", short_help="Train what stands for tokens that a cache drops.")(train_residual.command)
app.command("eval", short_help="Measure what caches cost in accuracy.")(eval.command)
app.command("report", short_help="Write one HTML page of results.")(report.command)

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench", help="Measure speed and memory.")
bench.command("attend", short_help="Time one token's attention.")(bench_attend.command)
bench.command("generate", short_help="Time whole decoding with each cache.")(bench_generate.command)
bench.command("memory", short_help="Measure the memory of a prompt with each cache.")(bench_memory.command)


def main() -> None:
    """The entry point of ``logquant``."""
    app()
