"""What a cache costs in accuracy: teacher forcing on real text, compared with the full-precision cache."""

from .run import CacheScores, evaluate
from .stats import bootstrap_interval
from .text import read_tokens

__all__ = ["CacheScores", "bootstrap_interval", "evaluate", "read_tokens"]
