"""What a cache costs in accuracy: divergence from the full cache on real text, greedy agreement, passkey recall."""

from .divergence import CacheScores, evaluate
from .greedy import GreedyScores, greedy_agreement
from .passkey import DEPTHS, PasskeyScores, passkey, passkey_text
from .stats import bootstrap_interval
from .text import read_ids, read_tokens

__all__ = [
    "DEPTHS",
    "CacheScores",
    "GreedyScores",
    "PasskeyScores",
    "bootstrap_interval",
    "evaluate",
    "greedy_agreement",
    "passkey",
    "passkey_text",
    "read_ids",
    "read_tokens",
]
