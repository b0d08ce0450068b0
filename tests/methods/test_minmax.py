"""Min-max quantisation of groups that are out of the ordinary."""

from __future__ import annotations

import pytest
import torch

from logquant.methods.layers.minmax import MinMax

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_group_without_spread_stays_what_it_was():
    x = torch.full((1, 1, 1, 32), 0.5)
    quantizer = MinMax(2, 32)
    assert (quantizer.decode(*quantizer.encode(x)) == 0.5).all()
    huge = torch.tensor([1e30, -1e30] * 16)
    assert quantizer.decode(*quantizer.encode(huge)).isfinite().all()
