"""The operators in plain torch: short, obviously right, and the definition of correct.

Every backend is tested against this package: codes and parameters bit for bit, attention within twice the error of a
low-precision torch computation. The page is described in csrc/format.h, which :class:`logquant.PageFormat` mirrors.
"""

from .attend import attend
from .choose_leaving import by_rank, choose_leaving
from .choose_pages import choose_pages
from .decode_step import append_, decode_step_
from .page_scores import page_scores
from .quantize import dequantize, evict_, quantize

__all__ = [
    "append_",
    "attend",
    "by_rank",
    "choose_leaving",
    "choose_pages",
    "decode_step_",
    "dequantize",
    "evict_",
    "page_scores",
    "quantize",
]
