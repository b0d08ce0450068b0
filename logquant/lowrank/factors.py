"""Two factors in place of a matrix, and what they are to be near to: the weights, or what data make of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Added to the diagonal of second moments, as a share of its mean: what data never use still counts a little.
_RIDGE = 1e-4


def root(moment: Tensor) -> Tensor:
    """The lower Cholesky factor, float64, of a second moment ``[n, n]``."""
    moment = moment.double()
    ridge = _RIDGE * moment.diagonal().mean()
    factor: Tensor = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), device=moment.device))
    return factor


def factors(weight: Tensor, rank: int, inputs: Tensor | None = None, outputs: Tensor | None = None) -> list[Tensor]:
    """The two matrices of rank ``rank`` whose product is nearest to a matrix.

    Nearest by what comes out for inputs as they are, and by what is then made of it: ``|outputs.T (W - up down)
    inputs|``, the Frobenius norm. Without either it is the truncated singular value decomposition.

    Args:
        weight: W, ``[out, in]``.
        rank: up to the smaller dimension.
        inputs: a root of the second moment of inputs, ``[in, in]``, lower triangular.
        outputs: a root of what outputs are weighed by, ``[out, out]``, lower triangular.

    Returns:
        Up ``[out, rank]`` and down ``[rank, in]``, in the weight's dtype.
    """
    seen = weight.double()
    if inputs is not None:
        seen = seen @ inputs
    if outputs is not None:
        seen = outputs.mT @ seen
    u, s, v = torch.linalg.svd(seen, full_matrices=False)
    up, down = u[:, :rank] * s[:rank], v[:rank]
    if inputs is not None:
        down = torch.linalg.solve_triangular(inputs, down, upper=False, left=False)
    if outputs is not None:
        up = torch.linalg.solve_triangular(outputs.mT, up, upper=True)
    return [up.to(weight.dtype), down.to(weight.dtype)]


@torch.no_grad()
def second_moments(model: Any, layers: Sequence[nn.Module], data: Iterable[Tensor]) -> list[Tensor]:
    """The mean of ``x x^T`` over the inputs of some layers of a model that reads texts, float64 ``[hidden, hidden]``.

    Args:
        model: the model.
        layers: those whose inputs are looked at; each holds ``hidden ^ 2`` numbers meanwhile.
        data: token ids ``[B, T]``, without padding.

    Raises:
        ValueError: no tokens.
    """
    sums: list[Tensor] = [torch.zeros(()) for _ in layers]

    def looking(i: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2).double()
            sums[i] = sums[i].to(x.device) + x.mT @ x

        return hook

    hooks = [layer.register_forward_pre_hook(looking(i)) for i, layer in enumerate(layers)]
    tokens = 0
    try:
        for ids in data:
            if ids.dim() != 2:
                raise ValueError(f"data must be token ids [B, T], got a tensor of shape {list(ids.shape)}")
            if ids.numel():
                model(ids.to(model.device), use_cache=False, logits_to_keep=1)
                tokens += ids.numel()
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError("data must hold tokens, got none")
    return [total / tokens for total in sums]
