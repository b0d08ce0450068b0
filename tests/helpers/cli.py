"""Running the command line within the process of the tests."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from logquant.cli import app

# Tables are cut to the terminal's width.
_RUNNER = CliRunner(env={"COLUMNS": "200"})


def run(*args: object) -> Result:
    """What ``logquant ARGS`` prints, and its exit code."""
    return _RUNNER.invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def succeed(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result
