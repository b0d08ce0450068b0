"""Gradients of attention over pages: none flow through what was quantised."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def records(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed from these now."""
    return torch.is_grad_enabled() and any([t.requires_grad for t in tensors])


def refusing_gradients(x: Tensor) -> Tensor:
    """``x``, as a tensor that raises RuntimeError as soon as a backward pass brings it a gradient."""
    x = x.detach().requires_grad_()
    x.register_hook(_refuse)
    return x


def _refuse(_: Tensor) -> NoReturn:
    raise RuntimeError(
        "no gradient flows through quantised tokens, and some of these came with one: feed the context to the "
        "LogQuant cache under torch.no_grad(), use a larger window, or train with a DynamicCache"
    )
