"""The cache: tokens in exact windows and packed pages."""

from .cache import LogQuantCache
from .layer import LogQuantLayer

__all__ = ["LogQuantCache", "LogQuantLayer"]
