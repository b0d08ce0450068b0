"""Recall: a decode step reads only those pages that its query asks for; nothing is thrown away.

A *chooser* (:mod:`logquant.recall.chooser`) says which pages those are, for each KV head and query; a file each. What
it goes by beyond the pages themselves is kept in a :class:`logquant.recall.index.PageIndex`.
"""

from .both import both
from .bounds import bounds
from .chooser import Chooser
from .means import means

CHOOSERS: dict[str, Chooser] = {"both": both, "means": means, "bounds": bounds}

__all__ = ["CHOOSERS"]
