"""Backends, each with the operators' eight functions, and which of them runs.

A backend is whatever has ``quantize``, ``dequantize``, ``evict_``, ``attend``, ``decode_step_``, ``page_scores``,
``choose_pages`` and ``choose_leaving`` with the arguments of :mod:`logquant.ops.reference`: that package itself,
:mod:`logquant.ops.compiled`, and what others :func:`register`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from torch import Tensor

from . import compiled, reference

Result = TypeVar("Result")


class Backend(Protocol):
    """The eight functions, each with the arguments of the one of that name in :mod:`logquant.ops.reference`."""

    def quantize(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def dequantize(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]: ...

    def evict_(self, *args: Any, **kwargs: Any) -> None: ...

    def attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]: ...

    def decode_step_(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def page_scores(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def choose_pages(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def choose_leaving(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]: ...


_backends: dict[str, Backend] = {"reference": reference, "compiled": compiled}
_OLDER_NAMES = {"cpu": "compiled"}
_chosen: Backend | None = None  # None: "auto"


def register(name: str, backend: Backend) -> None:
    """Make a backend known to :func:`use_backend`.

    Raises:
        ValueError: the name is taken.
    """
    if name in ("auto", *_OLDER_NAMES, *_backends):
        raise ValueError(f"there is a backend {name!r} already")
    _backends[name] = backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run the operators on a chosen backend within a ``with`` block.

    Args:
        backend: ``"auto"`` (compiled kernels where the extension is there and the device has them, or else plain
            torch), ``"reference"`` (plain torch), ``"compiled"`` (or an error if the extension is not there), or a name
            that was registered.

    Raises:
        ValueError: an unknown backend; the message names those that there are.
        RuntimeError: the compiled backend without the extension.
    """
    global _chosen
    name = _OLDER_NAMES.get(backend, backend)
    if name != "auto" and name not in _backends:
        known = ", ".join(map(repr, ("auto", *_backends)))
        raise ValueError(f"backend must be one of {known}, got {backend!r}")
    if name == "compiled" and (error := compiled.extension_error()):
        raise RuntimeError(f"backend {backend!r} is not available: {error}")
    previous, _chosen = _chosen, _backends.get(name)
    try:
        yield
    finally:
        _chosen = previous


def current() -> Backend:
    """The backend that runs: the chosen one, or the compiled kernels where they can be loaded."""
    if _chosen is not None:
        return _chosen
    if compiled.is_loaded():
        return compiled
    compiled.warn_once(f"logquant runs in plain torch, which is slow: {compiled.extension_error()}")
    return reference


def dispatch(
    operator: Callable[..., Result],
    tensors: tuple[Tensor, ...],
    settings: tuple[Any, ...],
    options: tuple[Tensor | None, ...],
) -> Result:
    """Run an operator, named by the reference's function, on the current backend, if all tensors share a device.

    The arguments come in the order of the reference's and of the schemas: tensors, settings, optional tensors.
    """
    device = tensors[0].device
    for x in tensors[1:] + options:
        if x is not None and x.device != device:
            arguments = zip(inspect.signature(operator).parameters, tensors + settings + options, strict=True)
            name = next(name for name, argument in arguments if argument is x)
            raise ValueError(f"{name} must be on {device} like the first argument, got {x.device}")
    result: Result = getattr(current(), operator.__name__)(*tensors + settings + options)
    return result
