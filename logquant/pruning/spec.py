"""How much of a prompt stays, and who chooses: the setting ``prune`` of a cache."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..nested import parse_nested, read_settings
from . import PRUNERS
from .prompt import Pruner

_BUDGETS: dict[str, type] = {"keep": float, "tokens": int, "bytes": int}
_KINDS: dict[str, type] = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class PruneSpec:
    """What ``prune="snapkv(keep=0.25;window=32)"`` says.

    Args:
        pruner: who says what tokens are worth, with its settings.
        keep: the share of a prompt's tokens that stays, the exact ones among them, above 0, up to 1.
        tokens: given, so many tokens stay instead of a share.
        nbytes: given, so many bytes of pages stay for each KV head instead of a share.

    Raises:
        ValueError: naming the setting, what it was and what it must be.
    """

    pruner: Pruner
    keep: float = 0.5
    tokens: int | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep of prune must be a share above 0, up to 1, got {self.keep!r}")
        for name, value in (("tokens", self.tokens), ("bytes", self.nbytes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} of prune must be a positive whole number, got {value!r}")

    @staticmethod
    def parse(text: str) -> PruneSpec:
        """What a text says.

        Raises:
            ValueError: an unknown pruner or setting, a bad one, or more than one of ``keep``, ``tokens``, ``bytes``.
        """
        name, given = parse_nested("prune", text)
        if name not in PRUNERS:
            raise ValueError(f"pruner of prune must be one of {', '.join(PRUNERS)}, got {name!r}")
        own = {f.name: _KINDS[str(f.type)] for f in dataclasses.fields(PRUNERS[name])}  # type: ignore[arg-type]
        found = read_settings("prune", given, _BUDGETS | own)
        budget: dict[str, Any] = {key: value for key, value in found.items() if key in _BUDGETS}
        if len(budget) > 1:
            raise ValueError(f"prune must have one of {', '.join(_BUDGETS)}, got {', '.join(budget)}")
        if "bytes" in budget:
            budget["nbytes"] = budget.pop("bytes")
        return PruneSpec(PRUNERS[name](**{key: found[key] for key in own if key in found}), **budget)


@dataclass(frozen=True)
class Budget:
    """How many packed tokens stay of a prompt, and whether in the order in which they came.

    Args:
        spec: what the cache says; None if all stay.
        page_tokens: tokens of a page.
        page_nbytes: bytes of a page; None if they are not known.
        reorders: whether each KV head has them in an order of its own.

    Raises:
        ValueError: bytes that stay are given, those of a page are not known.
    """

    spec: PruneSpec | None
    page_tokens: int
    page_nbytes: int | None
    reorders: bool = False

    def __post_init__(self) -> None:
        if self.nbytes is not None and self.page_nbytes is None:
            raise ValueError("prune must be given keep or tokens where the size of a page is not known, got bytes")

    @property
    def nbytes(self) -> int | None:
        """Bytes of pages that stay for each KV head; None if another budget says how many stay."""
        return None if self.spec is None else self.spec.nbytes

    def check(self, page_nbytes: int) -> None:
        """Refuse (ValueError) pages of another size, where bytes say how many stay."""
        if self.nbytes is not None and page_nbytes != self.page_nbytes:
            raise ValueError(
                f"prune must be given keep or tokens where a layer's pages have {page_nbytes} bytes, not the "
                f"{self.page_nbytes} that follow from the model's configuration; got bytes"
            )

    def kept(self, tokens: int, left: int) -> int:
        """How many of the tokens that leave the window stay, in whole pages: at least one page.

        Args:
            tokens: of the prompt.
            left: those that leave the window, a multiple of ``page_tokens``; the others stay exact.
        """
        if self.spec is None:
            return left
        if self.nbytes is not None:
            assert self.page_nbytes is not None
            pages = self.nbytes // self.page_nbytes
        else:
            wanted = self.spec.keep * tokens if self.spec.tokens is None else self.spec.tokens
            pages = math.ceil((wanted - (tokens - left)) / self.page_tokens)
        return min(left, max(1, pages) * self.page_tokens)
