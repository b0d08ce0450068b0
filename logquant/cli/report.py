"""``logquant report``: a page of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import errors_of, not_among, writable


def command(
    results: Annotated[list[Path], typer.Argument(help="What --json of eval, plan or bench has written.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.", callback=writable)] = Path(
        "report.html"
    ),
) -> None:
    """Write one self-contained HTML page with the tables and plots of results."""
    try:
        from .render import render
    except ImportError as error:
        raise SystemExit(f"reports need more packages ({error}): pip install 'logquant[report]'") from error

    not_among("--output", output, results)
    with errors_of("RESULTS"):
        page = render(results)
    with errors_of("--output"):
        output.write_text(page, encoding="utf-8")
    typer.echo(f"{output}: {len(results)} results, {len(page) / 1e3:.0f} kB")
