"""Tables of results: as they look at several widths, and that no number is ever cut.

To write the snapshots anew, after a change that is meant: ``LOGQUANT_SNAPSHOTS=write pytest tests/cli/test_tables.py``.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from logquant.cli.eval import _kl_table
from logquant.cli.tables import ResultTable
from tests.helpers.cli import run

SNAPSHOTS = Path(__file__).parent / "snapshots"

ROWS = [
    ("logquant", 0.01143, (0.0081, 0.0163), {}, 0.1832, 0.9120, 0.00033, 11.67, 0.952, 2.44, 3510.0, 14_900_000),
    (
        *("logquant:bits=4,window=128", 0.0042, None, {"interval": None}, 0.0518, 0.2214, 0.0),
        *(11.58, 0.979, 4.5, 6480.0, 17_100_000),
    ),
    (
        *("hqq", 1.8074, (1.4213, 2.2272), {"interval": (1.4132, 2.2109)}, 9.8131, 14.0215, 0.48217),
        *(74.21, 0.342, 3.0, 4320.0, 10_900_000),
    ),
    (
        *("full", 0.0, (0.0, 0.0), {"interval": (-0.0163, -0.0081)}, 0.0, 0.0, 0.0),
        *(11.57, 1.0, None, 46_080.0, 1_069_700_000),
    ),
]
FIELDS = (
    *("cache", "kl", "kl_interval", "minus", "kl_p99", "kl_p999", "kl_above_1"),
    *("ppl", "top1", "bits_per_element", "bytes_per_token", "bytes"),
)


def kl_table() -> ResultTable:
    return _kl_table([dict(zip(FIELDS, row, strict=True)) for row in ROWS])


def attend_table() -> ResultTable:
    table = ResultTable(
        ("contender", "median, ms", "slower by", "quartiles"),
        title="32,768 tokens, batch 1, heads 32/8, dim 128",
        caption="fused reads 41.5 MB (full cache 134.2 MB) at 17.0 GB/s, 69% of the 24.6 GB/s that torch reads here",
    )
    table.add_row("logquant attend", "2.45", "1.0x", "1.0-1.0")
    table.add_row("dequantize + SDPA, bf16, enable_gqa", "125.31", "51.1x", "49.8-52.6")
    return table


def printed(table: ResultTable, width: int | None) -> str:
    """What a terminal of some width shows, or what a pipe gets."""
    file = io.StringIO()
    table.show(
        Console(file=file, width=width, force_terminal=width is not None, color_system=None, legacy_windows=False)
    )
    return "".join(line.rstrip() + "\n" for line in plain(file.getvalue()).splitlines())


def plain(text: str) -> str:
    """Without the escapes of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [40, 80, 200, None])
@pytest.mark.parametrize("make", [kl_table, attend_table])
def test_tables_look_as_they_did(make, width):
    snapshot = SNAPSHOTS / f"{make.__name__}_{width or 'piped'}.txt"
    text = printed(make(), width)
    if os.environ.get("LOGQUANT_SNAPSHOTS") == "write":
        snapshot.write_text(text, encoding="utf-8")
    assert text == snapshot.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [20, 40, 57, 80, 120, 200, None])
def test_lines_fit_and_every_number_is_whole(width):
    text = printed(kl_table(), width)
    assert width is None or max(map(len, text.splitlines())) <= width
    for row in kl_table().rows:
        for number in row[1:]:
            assert f" {number} " in text
    assert "…" not in text


words = st.text("abcdefgh:,-=", min_size=1, max_size=40)
numbers = st.integers(0, 10**12).map("{:,}".format)


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(st.lists(words, min_size=n, max_size=n), st.lists(st.tuples(words, *[numbers] * n)))
    ),
    st.integers(1, 220),
)
def test_no_width_cuts_anything(content, width):
    columns, rows = content
    table = ResultTable(("name", *columns))
    for row in rows:
        table.add_row(*row)
    text = printed(table, width)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    for row in rows:
        for number in row[1:]:
            assert any(number in line for line in cells)
    names = "".join(line[0] for line in cells)
    blocks = text.count("┏")
    assert sum(len(name) for name, *_ in rows) * blocks == len(names), "names wrap and lose nothing"


def test_brackets_are_text():
    table = ResultTable(("cache", "bits"), title="[bold]x[/]")
    table.add_row("logquant:calibration=[a]", ":smile:")
    text = printed(table, 80)
    assert "[bold]x[/]" in text and "[a]" in text and ":smile:" in text


def test_commands_print_for_the_terminal_they_are_in(model_dir, monkeypatch):
    """A pipe gets the whole width, a narrow terminal blocks; neither loses a number."""
    args = ("plan", "--model", model_dir, "--caches", "full,logquant:bits=4,window=128", "--context", 123_456)
    piped = run(*args).output
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    narrow = plain(run(*args, columns=40).output)
    assert max(map(len, narrow.splitlines()[1:])) <= 40 < max(map(len, piped.splitlines()))
    numbers = re.findall(r"[\d,.]*\d(?: MB)? ", piped.partition("\n")[2])
    assert len(numbers) >= 6 and all(number in narrow for number in numbers)
