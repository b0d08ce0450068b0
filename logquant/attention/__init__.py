"""Attention over a cache layer, for models of transformers: importing it registers ``"logquant"``."""

from .. import compat as compat  # first: it refuses a transformers that is too old
from .forward import logquant_attention_forward

__all__ = ["logquant_attention_forward"]
