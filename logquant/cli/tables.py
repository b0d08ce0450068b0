"""Tables of results: numbers are never cut. Columns that do not fit go to a block below, names wrap."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

_EDGE, _GAP = 1, 3
"""Characters of the left border; of the borders and padding of each column."""

_LEAST_NAME = 12
"""Characters that a name keeps before columns go to another block."""


@dataclass
class ResultTable:
    """A table with names in the first column, to the left, and numbers in the others, to the right.

    Args:
        columns: their names, which wrap between words where room is short.
        title: what stands above, in a line.
        caption: what stands below.
        rows: the cells.
    """

    columns: Sequence[str]
    title: str | None = None
    caption: str | None = None
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        assert len(cells) == len(self.columns)
        self.rows.append(cells)

    def show(self, console: Console | None = None) -> None:
        """Print it as wide as the terminal is, or as wide as it needs to be where stdout is no terminal.

        A column that is wider than the terminal is still printed whole.
        """
        console = console or Console()
        blocks = list(self._blocks(console.width if console.is_terminal else None))
        needed = max(_EDGE + sum(width + _GAP for width in widths.values()) for widths in blocks)
        # Rich cuts what is wider than the console is said to be.
        wide = Console(
            file=console.file,
            force_terminal=console.is_terminal,
            width=max(console.width, needed),
            markup=False,
            emoji=False,
            highlight=False,
        )
        if self.title:
            wide.print(self.title, style="italic", soft_wrap=True)
        for widths in blocks:
            wide.print(self._block(widths))
        if self.caption:
            wide.print(self.caption, style="dim italic", soft_wrap=True)

    def _blocks(self, width: int | None) -> Iterator[dict[int, int]]:
        """The columns of each block and their widths, by number; the names are in every block."""
        widths = [max(len(column), self._needed(i)) for i, column in enumerate(self.columns)]
        if width is None or _EDGE + sum(each + _GAP for each in widths) <= width:
            yield dict(enumerate(widths))
            return
        needed = [self._needed(i) for i in range(len(self.columns))]
        names, rest = needed[0], list(range(1, len(self.columns)))
        while rest:
            taken: list[int] = []
            room = width - _EDGE - _GAP - min(names, _LEAST_NAME)
            while rest and (not taken or needed[rest[0]] + _GAP <= room):
                taken.append(rest.pop(0))
                room -= needed[taken[-1]] + _GAP
            left = width - _EDGE - _GAP - sum(needed[i] + _GAP for i in taken)
            yield {0: max(1, min(names, left)), **{i: needed[i] for i in taken}}

    def _needed(self, column: int) -> int:
        """Characters of its longest cell, or of the longest word of its name."""
        return max(map(len, (*self.columns[column].split(), *(row[column] for row in self.rows))))

    def _block(self, widths: dict[int, int]) -> Table:
        table = Table()
        for i, width in widths.items():
            table.add_column(self.columns[i], min_width=width, max_width=width, overflow="fold")
            table.columns[-1].justify = "right" if i else "left"
        for row in self.rows:
            table.add_row(*(row[i] if i else "\n".join(_wrapped(row[0], widths[0])) for i in widths))
        return table


def _wrapped(name: str, width: int) -> list[str]:
    """A name in lines of at most ``width`` characters, cut behind colons, commas and spaces where that is possible."""
    lines = [""]
    for part in re.findall(r"[^:, ]*[:, ]|[^:, ]+", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = lines[-1][:width], lines[-1][width:]
    return [line.rstrip() for line in lines]
