"""The backends that every operator test runs on: plain torch, each CPU instruction set, CUDA emulated, CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from logquant import ops
from tests import emulated
from tests.on_device import OnDevice

if ops.extension_error() is None:
    from logquant import _C

    CPU_SETS = [f"cpu-{name}" for name in _C.available_cpu_isas()]
else:  # the tests of the compiled operators then fail with the reason, they do not vanish
    CPU_SETS = ["cpu"]

# Where no CUDA headers are, the emulated kernels cannot be compiled, and their tests say so by being absent.
EMULATED = ["emulated"] if emulated.cuda_include() else []
CUDA = ["cuda"] if ops.has_cuda_kernels() and torch.cuda.is_available() else []
BACKENDS = ["reference", *CPU_SETS, *EMULATED, *CUDA]


@contextlib.contextmanager
def on(backend: str) -> Iterator[None]:
    """Run the operators on a backend of :data:`BACKENDS`."""
    name, _, isa = backend.partition("-")
    if name in ("emulated", "cuda"):
        stand_in = emulated if name == "emulated" else OnDevice("cuda")
        with ops.use_backend("reference"), mock.patch.object(ops, "reference", stand_in):
            yield
        return
    with ops.use_backend(name):  # type: ignore[arg-type]
        if not isa:
            yield
            return
        previous = _C.cpu_isa()
        _C.use_cpu_isa(isa)
        try:
            yield
        finally:
            _C.use_cpu_isa(previous)
