"""``logquant info``: what is installed and what of it runs here."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .. import machine
from .shared import Json, write_json


def command(json_file: Json = None) -> None:
    """Say what is installed, what runs here, and why a fast path is off."""
    facts = machine.describe()
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name != "extension_error":
            text = ", ".join(value) or "none" if isinstance(value, list) else str(value)
            table.add_row(name.replace("_", " "), text)
    error = facts["extension_error"]
    table.add_row("compiled operators", "in use" if error is None else f"[bold red]off[/]: {error}")
    Console().print(table)
    write_json(json_file, "info", {})
