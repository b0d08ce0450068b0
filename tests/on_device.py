"""The compiled operators on another device, called with CPU tensors: the functions of :mod:`logquant.ops.reference`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from logquant.format import PageFormat


class OnDevice:
    """Arguments go to the device, results and what was changed in place come back."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.logquant, name)

        def call(*tensors_and_format: Any, **options: Any) -> Any:
            *tensors, fmt = tensors_and_format
            assert isinstance(fmt, PageFormat)
            moved = [tensor.to(self.device, copy=True) for tensor in tensors]
            options = tree_map_only(Tensor, lambda x: x.to(self.device), options)
            result = operator(*moved, fmt.fields(), **options)
            if name == "evict_":
                for tensor, changed in zip(tensors, moved, strict=True):
                    tensor.copy_(changed)
            return tree_map_only(Tensor, lambda x: x.cpu(), result)

        return call
