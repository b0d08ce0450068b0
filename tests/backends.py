"""The backends that every operator test runs on: plain torch, and each CPU instruction set of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from logquant import ops

if ops.extension_error() is None:
    from logquant import _C

    CPU_SETS = [f"cpu-{name}" for name in _C.available_cpu_isas()]
else:  # the tests of the compiled operators then fail with the reason, they do not vanish
    CPU_SETS = ["cpu"]

BACKENDS = ["reference", *CPU_SETS]


@contextlib.contextmanager
def on(backend: str) -> Iterator[None]:
    """Run the operators on a backend of :data:`BACKENDS`."""
    name, _, isa = backend.partition("-")
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
