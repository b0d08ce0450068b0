"""Which tokens queries do not find any more, where a residual is trained: as a cache would drop them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..attention.call import AttentionCall
from ..config import LogQuantConfig
from ..pruning.prompt import Prompt, choose
from ..rule import split_positions


class Dropped(NamedTuple):
    """Of one text.

    Attributes:
        first: the first query that misses tokens.
        tokens: bool ``[1 or H, 1 or L - first, T]``, which of the T tokens queries from that one on miss.
    """

    first: int
    tokens: Tensor


class Dropping(Protocol):
    """A rule on a text that is computed at once."""

    def check(self, tokens: int) -> None:
        """Refuse (ValueError) texts of so many tokens, if nothing is dropped of them."""
        ...

    def of(self, call: AttentionCall, keys: Tensor) -> Dropped:
        """Of a text, with its queries ``[1, Hq, T, D]`` and keys ``[1, H, T, D]``."""
        ...


@dataclass(frozen=True)
class Window:
    """A query finds the first tokens and the newest.

    Args:
        sinks, recent: how many.
    """

    sinks: int = 4
    recent: int = 64

    def check(self, tokens: int) -> None:
        if tokens <= self.sinks + self.recent:
            raise ValueError(f"tokens must be more than {self.sinks + self.recent}, got {tokens}")

    def of(self, call: AttentionCall, keys: Tensor) -> Dropped:
        tokens = torch.arange(keys.shape[2], device=keys.device)
        first = self.sinks + self.recent
        return Dropped(first, ((tokens >= self.sinks) & (tokens <= tokens[first:, None] - self.recent))[None])


@dataclass(frozen=True)
class Pruning:
    """The first tokens of a text are a prompt, which is pruned when it ends.

    Under the rule ``attention`` the exact tokens are taken to be the newest ones, as under ``recent``: which they are
    depends on more than a prompt's last queries.

    Args:
        config: of a cache with ``prune``.
        share: of the text that is prompt.
    """

    config: LogQuantConfig
    share: float = 0.75

    def _leaving(self, tokens: int) -> tuple[Tensor, int]:
        """The tokens of the prompt that leave the window, and how many of those stay."""
        config, prompt = self.config, int(self.share * tokens)
        rule = config.rule if config.rule == "log" else "recent"
        leaving, _ = split_positions(prompt, config.window, rule, config.sinks)
        budget = config.budget(None)
        assert budget is not None
        return leaving, budget.kept(prompt, len(leaving)) if len(leaving) else 0

    def check(self, tokens: int) -> None:
        leaving, kept = self._leaving(tokens)
        if kept >= len(leaving):
            raise ValueError(f"tokens must be so many that {self.config.prune} drops some, got {tokens}")

    def of(self, call: AttentionCall, keys: Tensor) -> Dropped:
        tokens, heads = keys.shape[2], keys.shape[1]
        first, spec = int(self.share * tokens), self.config.prune_spec()
        assert spec is not None
        leaving, kept = self._leaving(tokens)
        leaving = leaving.long().to(keys.device)
        asked = call.query[:, :, first - min(max(1, spec.pruner.queries), first) : first]
        chosen = choose(spec.pruner, Prompt(asked, keys[:, :, :first], call.scale, call.softcap), leaving[None], kept)
        dropped = torch.zeros(heads, tokens, dtype=torch.bool, device=keys.device)
        dropped[:, leaving] = True
        dropped.scatter_(1, leaving[chosen[0]], False)
        return Dropped(first, dropped[:, None])
