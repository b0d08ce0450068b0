"""Tensors that stand for what a layer holds: they can be read, and a write is refused, for it would be lost."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITING = frozenset(["__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS)])


def refuse_writes() -> NoReturn:
    """Raise RuntimeError: what was to be written would be lost."""
    raise RuntimeError(
        "keys and values of a LogQuant layer are computed anew at every access and cannot be written: use update(), "
        "crop(), reorder_cache() or batch_select_indices(), write to a clone(), or use a DynamicCache"
    )


class ReadOnly(Tensor):
    """A tensor that refuses to be written to, and so do its views; results of functions are plain tensors."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes = _writes(func) or kwargs.get("inplace", False)
        target = kwargs.get("out", (args[0] if args else kwargs.get("input")) if writes else None)
        if any(isinstance(t, ReadOnly) for t in (target if isinstance(target, list | tuple) else (target,))):
            refuse_writes()
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            given = {_address(t) for t in args if isinstance(t, ReadOnly)}

            def result(x: Tensor) -> Tensor:
                return x.as_subclass(ReadOnly if _address(x) in given else Tensor)  # type: ignore[arg-type]

            return tree_map_only(Tensor, result, out)


def _writes(func: Any) -> bool:
    """Whether a function writes to its first argument."""
    name = getattr(func, "__name__", "")
    if name in ("requires_grad_", "retain_grad"):
        return False
    return name in _WRITING or (name.endswith("_") and name[-2:] != "__")


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else 0
