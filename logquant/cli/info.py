"""``logquant info``: what is installed and what of it runs here."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .shared import Json, write_json


def command(json_file: Json = None) -> None:
    """Say what is installed, what runs here, and why a fast path is off."""
    from .. import machine

    facts = machine.describe()
    error = facts.pop("extension_error")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(
            name.replace("_", " "), Text(", ".join(value) or "none" if isinstance(value, list) else str(value))
        )
    state = Text("in use") if error is None else Text.assemble(("off", "bold red"), f": {error}")
    table.add_row("compiled operators", state)
    console = Console()
    console.print(table, soft_wrap=not console.is_terminal)
    write_json(json_file, "info", {})
