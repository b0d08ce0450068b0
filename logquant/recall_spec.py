"""How much of the pages a decode step reads, and who chooses: the setting ``recall`` of a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .nested import parse_nested, read_settings

# Their code is in logquant/recall.
CHOOSERS = ("both", "means", "bounds")
ORDERS = ("time", "clusters")


@dataclass(frozen=True)
class RecallSpec:
    """What ``recall="both(pages=0.25;skip=2)"`` says.

    Args:
        chooser: one of :data:`CHOOSERS`.
        pages: the share of a sequence's pages that a query reads, above 0, up to 1.
        tokens: given, so many tokens of pages, rounded up to whole pages, instead of a share.
        skip: layers of the model, from the first on, that read all pages.
        order: how the tokens of a prompt share pages: as they came (``"time"``), or ``"clusters"``, each KV head those
            whose keys are alike (:mod:`logquant.recall.clusters`).

    Raises:
        ValueError: naming the setting, what it was and what it must be.
    """

    chooser: str = "both"
    pages: float = 0.25
    tokens: int | None = None
    skip: int = 2
    order: str = "time"

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{name} of recall must be {what}, got {getattr(self, name)!r}")

        need(self.chooser in CHOOSERS, "chooser", " or ".join(CHOOSERS))
        need(0 < self.pages <= 1, "pages", "a share above 0, up to 1")
        need(self.tokens is None or self.tokens > 0, "tokens", "a positive whole number")
        need(self.skip >= 0, "skip", "a whole number of layers, 0 or more")
        need(self.order in ORDERS, "order", " or ".join(ORDERS))

    @staticmethod
    def parse(text: str) -> RecallSpec:
        """What a text says.

        Raises:
            ValueError: an unknown chooser or setting, a bad one, or both ``pages`` and ``tokens``.
        """
        chooser, given = parse_nested("recall", text)
        options = read_settings("recall", given, {"pages": float, "tokens": int, "skip": int, "order": str})
        if {"pages", "tokens"} <= given.keys():
            raise ValueError("recall must have either pages or tokens, got both")
        return RecallSpec(chooser, **options)

    @property
    def uses_means(self) -> bool:
        """Whether the mean key of each page is kept."""
        return self.chooser != "bounds"

    def count(self, pages: int, page_tokens: int) -> int:
        """How many of ``pages`` pages of ``page_tokens`` tokens a query reads."""
        wanted = round(self.pages * pages) if self.tokens is None else math.ceil(self.tokens / page_tokens)
        return min(pages, max(1, wanted))
