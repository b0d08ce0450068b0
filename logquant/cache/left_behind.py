"""Noticing that a model leaves the cache that it was given.

Phi-3, PhiMoE and Phi-4-multimodal rotate keys in another way once a text is longer than
``original_max_position_embeddings``. ``generate`` then computes all of it again, into a ``DynamicCache``, and tells
neither the user nor the cache. But it asks the cache whether it is true, and then, only once the text is that long, how
many tokens it holds. Where it keeps the cache, it asks next whether that can be compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig


class LeftBehind:
    """Warns where a model leaves its cache.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._model = config.model_type
        self._switch: int = getattr(config, "original_max_position_embeddings", None) or 0
        self._asked_at: int | None = None
        self._expected = False

    @property
    def may_be(self) -> bool:
        """Whether it is such a model."""
        return self._switch > 0

    def asked_for_truth(self, length: int) -> None:
        """The cache was asked whether it is true, with so many tokens."""
        self._asked_at = length

    def kept(self) -> None:
        """What was asked for goes on with the cache."""
        self._asked_at = None

    def asked_for_length(self, length: int) -> None:
        """The cache was asked how many tokens it holds, and says so many."""
        if not 0 < length <= self._switch or length != self._asked_at or self._expected:
            return
        self._asked_at = None
        warnings.warn(
            f"{self._model} leaves this LogQuantCache with {length} tokens and goes on with a DynamicCache in full "
            f"precision, for its text passes {self._switch} tokens, from where on keys are other ones. After "
            "logquant.enable(model) the cache is filled with those instead",
            RuntimeWarning,
            stacklevel=4,
        )

    @contextmanager
    def expected(self) -> Iterator[None]:
        """No warnings within, for the caller sees to it."""
        self._expected = True
        try:
            yield
        finally:
            self._expected, self._asked_at = False, None
