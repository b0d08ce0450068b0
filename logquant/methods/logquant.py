"""LogQuant (arXiv 2503.19950): as it is by default, as the paper has it, and with other rules and sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..cache.cache import LogQuantCache
from ..config import LogQuantConfig
from ..quantizer.calibration import with_calibration
from ..residual.trained import with_residual
from .layers.base import Settings
from .registry import method


@dataclass(frozen=True)
class LogQuant(Settings):
    """A LogQuant cache.

    Args:
        config: its configuration.
    """

    config: LogQuantConfig

    @property
    def quantization(self) -> LogQuantConfig:
        return self.config

    def make(self, config: PreTrainedConfig) -> Cache:
        return LogQuantCache(config, self.config)


def _preset(name: str, make: Callable[..., LogQuantConfig]) -> None:
    """Register a name for a configuration. It says which rule that has, so the rule cannot be written after it."""

    @method(name, options=LogQuantConfig, without=("rule",))
    def settings(**options: Any) -> LogQuant:
        return LogQuant(with_residual(with_calibration(make(**options))))


_preset("logquant", LogQuantConfig)
_preset("fine", LogQuantConfig.fine)
_preset("small", LogQuantConfig.small)
_preset("log", functools.partial(LogQuantConfig, rule="log"))
_preset("recent", functools.partial(LogQuantConfig, rule="recent"))
_preset("paper", LogQuantConfig.paper)
