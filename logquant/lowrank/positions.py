"""Where the cached tokens of each row stand, from what a forward pass is told of the new ones."""

from __future__ import annotations

import torch
from torch import Tensor

# What is added to the scores of tokens that are hidden is this or less.
_HIDDEN = -1e4


def key_positions(new: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    """The position of each cached token; of what no query sees, any number.

    Tokens that are seen follow one another, and what is hidden between them, padding, has no position. So it is counted
    back from the newest one.

    Args:
        new: int64 ``[1 or B, n]``, those of the newest n tokens.
        mask: bool ``[1 or B, 1 or Hq, n, T]``, what each query sees, or a number that is added to scores; or
            ``[B, T]``, 1 where there is no padding; None: all is seen.
        tokens: T.

    Returns:
        int64 ``[1 or B, T]``.

    Raises:
        ValueError: another kind of mask.
    """
    if mask is None:
        seen = torch.ones(len(new), tokens, dtype=torch.bool, device=new.device)
    elif not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < tokens:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be a tensor over {tokens} tokens where keys are of low rank, got {shape}"
        )
    else:
        seen = mask > _HIDDEN if mask.is_floating_point() else mask.bool()
        seen = (seen.any(1).any(1) if mask.dim() == 4 else seen)[:, -tokens:]
    rows, count = max(len(seen), len(new)), seen.expand(max(len(seen), len(new)), -1).cumsum(-1)
    came = seen[:, tokens - new.shape[1] :].expand(rows, -1)
    newest = (came * torch.arange(1, new.shape[1] + 1, device=new.device)).argmax(-1, keepdim=True)
    at = new.expand(rows, -1).gather(1, newest)
    return (at - count.gather(1, newest + tokens - new.shape[1]) + count).clamp_min(0)
