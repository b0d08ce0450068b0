"""LogQuant (arXiv 2503.19950): as it is by default, as the paper has it, and with two other rules."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..cache.cache import LogQuantCache
from ..config import LogQuantConfig
from ..quantizer.calibration import with_calibration
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


# The name says which rule it is, so that cannot be written after it.
_configured = functools.partial(method, options=LogQuantConfig, without=("rule",))


@_configured("logquant")
def logquant(**options: Any) -> LogQuant:
    """The log rule and a quantiser that loses less than the paper's."""
    return LogQuant(with_calibration(LogQuantConfig(**options)))


@_configured("attention")
def attention(**options: Any) -> LogQuant:
    """The most attended tokens stay exact, the others are quantised as by ``logquant``."""
    return LogQuant(with_calibration(LogQuantConfig(rule="attention", **options)))


@_configured("paper")
def paper(**options: Any) -> LogQuant:
    """The log rule and the paper's quantiser."""
    return LogQuant(with_calibration(LogQuantConfig.paper(**options)))


@_configured("recent")
def recent(**options: Any) -> LogQuant:
    """The newest tokens stay exact, the others are quantised as by ``logquant``."""
    return LogQuant(with_calibration(LogQuantConfig(rule="recent", **options)))
