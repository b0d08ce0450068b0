"""The cache: tokens in exact windows and packed pages."""

from .. import compat as compat  # first: it refuses a transformers that is too old
from .cache import LogQuantCache
from .layer import LogQuantLayer

__all__ = ["LogQuantCache", "LogQuantLayer"]
