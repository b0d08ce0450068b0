"""Texts as token ids of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_ids(tokenizer: Any, file: Path) -> list[int]:
    """All token ids of a file.

    Raises:
        ValueError: a file that is no UTF-8 text.
        OSError: a file that cannot be read.
    """
    # Not verbose: a text may be longer than the model takes, and is cut.
    ids: list[int] = tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return ids


def read_tokens(tokenizer: Any, files: Sequence[Path], length: int) -> Tensor:
    """The first ``length`` tokens of each file, int64 ``[files, length]``.

    Raises:
        ValueError: no files, or a file with fewer tokens.
        OSError: a file that cannot be read.
    """
    if not files:
        raise ValueError("text must name at least one file, got none")
    rows = []
    for file in files:
        ids = read_ids(tokenizer, file)
        if len(ids) < length:
            raise ValueError(f"text {file} must have at least {length} tokens (prefill + tokens + 1), got {len(ids)}")
        rows.append(ids[:length])
    return torch.tensor(rows)
