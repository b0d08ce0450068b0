"""The modes of torch that a caller may be in, and those in which a cache does its own work."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _same(x: Tensor) -> Tensor:
    return x


@contextlib.contextmanager
def own_arithmetic(device: torch.device, *, grad: bool = False) -> Iterator[None]:
    """Arithmetic as it is written: no autocast to a lower precision, and no gradients.

    Args:
        device: where the tensors are.
        grad: record gradients all the same; a checkpoint around it, which would not come by here in its second forward
            pass, learns nothing of what that saves.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad))
        if grad:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def lasting(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates what makes tensors that are written to later: under ``torch.inference_mode`` those would refuse."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped
