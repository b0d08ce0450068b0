"""Random examples are the same every time, and what they are compared with is computed once."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.memo import by_content


def drawn() -> list[int]:
    found = []

    @settings(max_examples=200, derandomize=True, database=None)
    @given(st.integers(0, 2**31 - 1))
    def draw(number: int) -> None:
        found.append(number)

    draw()
    return found


def test_examples_do_not_depend_on_the_modules_that_are_loaded(tmp_path):
    before = drawn()
    path = tmp_path / "numbers_to_try.py"
    path.write_text(f"NUMBERS = {list(range(1_000_000, 1_000_500, 7))}\n")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        assert drawn() == before


def test_results_are_remembered_by_what_arguments_hold():
    calls = []

    @by_content
    def total(x: torch.Tensor, *, factor: float = 1.0, mask: torch.Tensor | None = None) -> float:
        calls.append(factor)
        return factor * x[slice(None) if mask is None else mask].sum().item()

    x = torch.arange(4.0)
    assert total(x) == total(x.clone(), mask=None) == total(torch.stack([x, x], 1)[:, 0]) == 6.0
    assert len(calls) == 1
    assert total(x, factor=2.0) == 12.0
    assert total(x, mask=x > 1) == 5.0
    assert total(x.view(2, 2)) == total(x.to(torch.bfloat16)) == 6.0
    x[0] = 5.0
    assert total(x) == 11.0
    assert len(calls) == 6
