"""The command line, run within the process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from logquant.cli import app

# Tables are cut to the terminal's width.
runner = CliRunner(env={"COLUMNS": "200"})


def run(*args: object) -> Result:
    return runner.invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def succeed(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result
