"""Training what a residual needs, a layer at a time; the model stays as it is.

As in LESS: the loss is the squared error of the attention block's output, after W_o, at the queries that miss tokens;
Adam with 1e-3, halved after each quarter of the epochs, two texts a step, dropout 0.3 in the nets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .examples import Example
from .less import Less
from .state import joined

_AT_ONCE = 2


@dataclass(frozen=True)
class Training:
    """How long, and of what size.

    Args:
        rank: R, features of a head.
        hidden: of the nets.
        epochs: how often each text is seen.
        rate: of Adam, at the start.
        dropout: of the nets' hidden layers.

    Raises:
        ValueError: naming the setting, what it was and what it must be.
    """

    rank: int = 8
    hidden: int = 512
    epochs: int = 12
    rate: float = 1e-3
    dropout: float = 0.3

    def __post_init__(self) -> None:
        for name in ("rank", "hidden", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive whole number, got {getattr(self, name)!r}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, got {self.rate!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a share from 0 on, below 1, got {self.dropout!r}")


class Errors(NamedTuple):
    """Of a block's output on texts, relative to the output: root of the squares' sums.

    Attributes:
        dropping: if dropped tokens are gone.
        residual: if the residual stands for them.
    """

    dropping: float
    residual: float


def output_projections(model: Any) -> list[nn.Module | None]:
    """W_o of each layer's attention; None where it has none of that name."""
    layers = getattr(model.get_decoder(), "layers", [])
    return [getattr(getattr(layer, "self_attn", None), "o_proj", None) for layer in layers]


def train(
    examples: Sequence[Example],
    project: nn.Module,
    training: Training,
    seed: int,
    on_progress: Callable[[int], None] = lambda epochs: None,
) -> Less:
    """Features of one layer.

    Args:
        examples: what it is to learn from.
        project: W_o, or what takes its place; it is not changed.
        training: how.
        seed: of what is random.
        on_progress: called after every epoch with 1.
    """
    query, keys = examples[0].query, examples[0].keys
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        random = torch.Generator().manual_seed(seed)
        start = Less.random(
            len(query), len(keys), query.shape[2], hidden=training.hidden, rank=training.rank, generator=random
        )
        net = start.map(lambda t: t.requires_grad_())
        optimizer = torch.optim.Adam(net, lr=training.rate)
        quarter = max(1, training.epochs // 4)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, quarter, 0.5)
        for _ in range(training.epochs):
            order = torch.randperm(len(examples), generator=random).tolist()
            for first in range(0, len(order), _AT_ONCE):
                optimizer.zero_grad()
                for i in order[first : first + _AT_ONCE]:
                    error = _project(project, attend(net, examples[i], training.dropout) - examples[i].want)
                    error.square().mean().backward()
                optimizer.step()
            schedule.step()
            on_progress(1)
    return net.map(lambda t: t.detach())


def attend(net: Less, example: Example, dropout: float = 0.0) -> Tensor:
    """Attention to what is held and to what was dropped, ``[Hq, L, Dv]``: :meth:`Residual.join`, to be learnt."""
    heads = len(example.keys)
    asked = net.of_queries(example.query[None], dropout)[0].unflatten(0, (heads, -1))
    weights = net.of_keys(example.keys[None], dropout)[0]
    values = torch.cat([example.values, torch.ones_like(example.values[..., :1])], -1)
    if example.dropped.shape[1] == 1:
        sums = (weights * example.dropped.mT).mT @ values
        left = asked @ sums.unsqueeze(1)
    else:
        shares = (asked @ weights.mT.unsqueeze(1)).masked_fill(~example.dropped.unsqueeze(1), 0)
        left = shares @ values.unsqueeze(1)
    return joined(left.flatten(0, 1), example.out, example.lse)


@torch.no_grad()
def errors(net: Less, examples: Sequence[Example], project: nn.Module) -> Errors:
    """How far blocks are from attention to all tokens on other texts, without the residual and with it."""
    squares = torch.zeros(3, dtype=torch.float64)
    for example in examples:
        found = example.out, attend(net, example), torch.zeros_like(example.want)
        squares += torch.stack([_project(project, x - example.want).double().square().sum() for x in found])
    dropping, residual, size = squares.sqrt().tolist()
    return Errors(dropping / size, residual / size)


def _project(project: nn.Module, out: Tensor) -> Tensor:
    """W_o of ``[Hq, L, Dv]``, ``[L, hidden size]``; of a difference, so without its bias."""
    weight = project.weight
    assert isinstance(weight, Tensor)
    return out.transpose(0, 1).flatten(1) @ weight.detach().float().cpu().T
