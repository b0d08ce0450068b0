"""Low rank: a model whose attention caches fewer channels (LoRC, arXiv 2410.03111; whitened by data as in SVD-LLM)."""

from __future__ import annotations

from .transform import compress, load, save

__all__ = ["compress", "load", "save"]
