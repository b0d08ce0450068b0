"""StreamingLLM (arXiv 2309.17453), as QPruningKV applies it to a prompt: its first tokens and its newest stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .prompt import Prompt


@dataclass(frozen=True)
class Streaming:
    """A :class:`logquant.pruning.prompt.Pruner`.

    Args:
        sinks: so many of the first tokens stay.

    Raises:
        ValueError: a negative number.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks of streaming must be a number of tokens, 0 or more, got {self.sinks}")

    @property
    def queries(self) -> int:
        return 0

    def scores(self, prompt: Prompt) -> Tensor:
        keys = prompt.keys
        age = torch.arange(keys.shape[2], dtype=torch.float32, device=keys.device)
        age[: self.sinks] = torch.inf
        return age.expand(keys.shape[:3])
