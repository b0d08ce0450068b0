"""The command line: every file is a command, but for ``shared`` (what they share) and ``render`` (pages of results).

What takes long to import is imported within commands, so that ``--help`` and ``info`` are quick.
"""

from __future__ import annotations

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    raise SystemExit(f"the command line needs more packages ({error}): pip install 'logquant[cli]'") from error

from . import bench_attend, bench_generate, bench_memory, calibrate, eval, generate, info, plan, report

__all__ = ["app", "main"]

app = typer.Typer(
    help="A 2-bit KV cache for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.command)
app.command("info")(info.command)
app.command("plan")(plan.command)
app.command("calibrate")(calibrate.command)
app.command("eval")(eval.command)
app.command("report")(report.command)

bench = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(bench, name="bench")
bench.command("attend")(bench_attend.command)
bench.command("generate")(bench_generate.command)
bench.command("memory")(bench_memory.command)


def main() -> None:
    """The entry point of ``logquant``."""
    app()
