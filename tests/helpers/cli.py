"""Running the command line within the process of the tests."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from logquant.cli import app

_RUNNER = CliRunner()


def run(*args: object, columns: int = 200) -> Result:
    """What ``logquant ARGS`` prints, and its exit code; ``columns`` is the width where stdout counts as a terminal."""
    return _RUNNER.invoke(app, [str(arg) for arg in args], catch_exceptions=False, env={"COLUMNS": str(columns)})


def succeed(*args: object, columns: int = 200) -> Result:
    result = run(*args, columns=columns)
    assert result.exit_code == 0, result.output
    return result


def refused(*args: object) -> str:
    """The one line that says what is wrong with the arguments."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    usage, _, error = result.output.partition("\n\n")
    assert usage.startswith("Usage:") and error.startswith("Error: ") and error.count("\n") == 1, result.output
    return error
