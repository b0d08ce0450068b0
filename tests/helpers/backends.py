"""The backends that every operator test runs on: plain torch, each CPU instruction set, CUDA emulated, CUDA.

Importing this registers them, so that :func:`on` knows their names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from logquant import ops
from logquant.ops import compiled
from tests.helpers import emulated

on = ops.use_backend


class OnDevice:
    """The compiled kernels of another device for CPU tensors, which go there; results and changes come back."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._run, name)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        moved, moved_kwargs = tree_map_only(Tensor, lambda x: x.to(self.device, copy=True), (args, kwargs))
        result = getattr(compiled, name)(*moved, **moved_kwargs)
        if name.endswith("_"):
            for tensor, changed in zip(args, moved, strict=True):
                if isinstance(tensor, Tensor):
                    tensor.copy_(changed)
        return tree_map_only(Tensor, Tensor.cpu, result)


class InstructionSet:
    """The compiled kernels as one instruction set of the CPU has them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._run, name)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        previous = _C.cpu_isa()
        _C.use_cpu_isa(self.name)
        try:
            return getattr(compiled, name)(*args, **kwargs)
        finally:
            _C.use_cpu_isa(previous)


if ops.extension_error() is None:
    from logquant import _C

    CPU_SETS = [f"cpu-{name}" for name in _C.available_cpu_isas()]
    for name in _C.available_cpu_isas():
        ops.register(f"cpu-{name}", InstructionSet(name))
else:  # the tests of the compiled operators then fail with the reason, they do not vanish
    CPU_SETS = ["compiled"]

# Where no CUDA headers are, the emulated kernels cannot be compiled, and their tests say so by being absent.
EMULATED = ["emulated"] if emulated.cuda_include() else []
CUDA = ["cuda"] if ops.has_cuda_kernels() and torch.cuda.is_available() else []
if EMULATED:
    ops.register("emulated", emulated)
if CUDA:
    ops.register("cuda", OnDevice("cuda"))
BACKENDS = ["reference", *CPU_SETS, *EMULATED, *CUDA]
