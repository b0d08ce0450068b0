"""Low rank as its papers state it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def truncated(weight: Tensor, rank: int) -> Tensor:
    """2410.03111: the nearest matrix of that rank. float64."""
    u, s, v = torch.linalg.svd(weight.double())
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]


def whitened(weight: Tensor, rank: int, moment: Tensor) -> Tensor:
    """2403.07378: that whose products with inputs of this second moment are nearest."""
    moment = moment.double()
    c = torch.linalg.cholesky(moment + 1e-4 * moment.diagonal().mean() * torch.eye(len(moment)))
    return truncated(weight.double() @ c, rank) @ torch.linalg.inv(c)


def progressive(weights: list[tuple[Tensor, Tensor]], most: float, least: float, step: int) -> list[int]:
    """2410.03111's ranks by layer: from condition numbers of keys' and values' projections, cumulated from the end."""

    def log_condition(w: Tensor) -> Tensor:
        s = torch.linalg.svdvals(w.detach().double())
        return (s[0] / s[-1]).log()

    logs = [sum(log_condition(k) + log_condition(v) for k, v in weights[i:]) for i in range(len(weights))]
    high, low = max(logs), min(logs)
    return [round(float(most * (1 - (high - x) / (high - low) * (1 - least / most))) / step) * step for x in logs]


def moments(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The second moment of what goes into attention, layer by layer."""
    seen: list[Tensor] = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda module, args, x: seen.append(x.flatten(0, 1)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [x.double().T @ x.double() / len(x) for x in seen]
