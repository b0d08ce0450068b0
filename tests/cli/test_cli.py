"""The command line as a whole."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.cli import succeed


def test_help_names_every_command():
    output = succeed("--help").output
    assert all(command in output for command in ("generate", "info", "eval", "bench"))
    assert all(command in succeed("bench", "--help").output for command in ("attend", "memory"))


def test_help_does_not_wait_for_transformers():
    """Importing it takes longer than all the rest of ``logquant --help``."""
    code = "import sys, logquant.cli; assert 'transformers' not in sys.modules and 'typer' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
