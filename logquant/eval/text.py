"""Texts as token ids of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..texts import read_text


def read_ids(tokenizer: Any, file: Path, least: int = 1) -> list[int]:
    """All token ids of a file, at least ``least``.

    Raises:
        ValueError: a file that is no UTF-8 text, or has fewer tokens.
        OSError: a file that cannot be read.
    """
    # Not verbose: a text may be longer than the model takes, and is cut.
    ids: list[int] = tokenizer(read_text(file), verbose=False)["input_ids"]
    if len(ids) < least:
        raise ValueError(f"text {file} must have at least {least:,} tokens, got {len(ids):,}")
    return ids


def read_tokens(tokenizer: Any, files: Sequence[Path], length: int) -> Tensor:
    """The first ``length`` tokens of each file, int64 ``[files, length]``.

    Raises:
        ValueError: no files, or a file with fewer tokens.
        OSError: a file that cannot be read.
    """
    if not files:
        raise ValueError("text must name at least one file, got none")
    return torch.tensor([read_ids(tokenizer, file, length)[:length] for file in files])
