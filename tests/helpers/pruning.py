"""Pruning as its papers state it, in plain torch: what each token of a prompt is worth to each KV head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.prompts import Prompt


def snapkv(prompt: Prompt, window: int = 64, kernel: int = 5, pool: str = "avg") -> Tensor:
    """2404.14469, with the scores of a group's query heads averaged as kvpress does. float64 ``[B, H, T]``."""
    keys, heads, tokens = prompt.keys.double(), prompt.keys.shape[1], prompt.keys.shape[2]
    query = prompt.queries[:, :, -window:].double().unflatten(1, (heads, -1))
    scores = torch.einsum("bhgld,bhtd->bhglt", query, keys) * keys.shape[-1] ** -0.5
    later = torch.arange(tokens) > torch.arange(tokens - window, tokens)[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)[..., : tokens - window].mean(3)
    padded = F.pad(weights, [kernel // 2] * 2, value=0.0 if pool == "avg" else -torch.inf).unfold(-1, kernel, 1)
    pooled = padded.mean(-1) if pool == "avg" else padded.amax(-1)
    return F.pad(pooled.mean(2), (0, window), value=torch.inf)


def keydiff(prompt: Prompt) -> Tensor:
    """2504.15364: minus the cosine between a key and the mean of the normalised keys."""
    unit = F.normalize(prompt.keys.double(), dim=-1)
    return -(unit * F.normalize(unit.mean(2, keepdim=True), dim=-1)).sum(-1)


def streaming(prompt: Prompt, sinks: int = 4) -> Tensor:
    """2309.17453: the first tokens and the newest."""
    age = torch.arange(float(prompt.keys.shape[2])).double()
    age[:sinks] = torch.inf
    return age.expand(prompt.keys.shape[:3])


SCORES = {
    "snapkv": snapkv,
    "snapkv(window=8;kernel=7;pool=max)": lambda prompt: snapkv(prompt, 8, 7, "max"),
    "keydiff": keydiff,
    "streaming": streaming,
}


def with_budget(pruner: str, budget: str) -> str:
    """``snapkv(window=8)`` and ``keep=0.5`` as one setting."""
    return f"{pruner[:-1]};{budget})" if pruner.endswith(")") else f"{pruner}({budget})"


def are_best(kept: Tensor, candidates: Tensor, scores: Tensor) -> bool:
    """Whether ``kept`` ``[H, n]``, of the tokens ``candidates`` ``[N]``, are those of the best ``scores`` ``[H, T]``.

    Of tokens that score the same, as the maximum of neighbours does, any may stay; no other may be among them.
    """
    for own, score in zip(kept, scores, strict=True):
        if len(own.unique()) != len(own) or not torch.isin(own, candidates).all():
            return False
        dropped = candidates[~torch.isin(candidates, own)]
        if len(dropped) and score[dropped].max() > score[own].min() * (1 + 1e-5 * score[own].min().sign()):
            return False
    return True
