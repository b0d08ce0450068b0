"""Whether a number that was told once, at some depth of a long text, can still be recalled through a cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods.registry import CacheSpec
from .divergence import log_probabilities, take_prompt
from .stats import mean

# The task of Mohtashami and Jaggi (arXiv 2305.16300), as KIVI and many others have it.
TASK = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class PasskeyScores:
    """What one cache recalls.

    Args:
        cache: the cache's name.
        length: tokens of a text.
        found: by depth, for each text whether greedy decoding wrote the key.
        nll: by depth, for each text the negative log-likelihood of the key, nats a token: it tells more than ``found``
            where a model always or never finds the key.
    """

    cache: str
    length: int
    found: dict[float, list[bool]] = field(default_factory=dict)
    nll: dict[float, list[float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Means over texts, by depth and over all."""
        found = {depth: mean(each) for depth, each in self.found.items() if each}
        nll = {depth: mean(each) for depth, each in self.nll.items() if each}
        return {
            "cache": self.cache,
            "length": self.length,
            "found": mean(list(found.values())),
            "nll": mean(list(nll.values())),
            "found_by_depth": found,
            "nll_by_depth": nll,
        }


def passkey_text(tokenizer: Any, key: str, depth: float, length: int) -> list[int]:
    """A text of ``length`` tokens that tells a key once.

    Args:
        tokenizer: of the model.
        key: digits.
        depth: where the key is, from 0 (after the task) to 1 (at the end).
        length: tokens in all.

    Raises:
        ValueError: a length that does not hold task and key.
    """

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    task, needle, filler = tokenizer(TASK)["input_ids"], ids_of(NEEDLE.format(key=key)), ids_of(FILLER)
    room = length - len(task) - len(needle)
    if room < 0:
        raise ValueError(f"length must be at least {length - room}, got {length}")
    around = (filler * (room // len(filler) + 1))[:room]
    before = round(depth * room)
    return [*task, *around[:before], *needle, *around[before:]]


@torch.inference_mode()
def passkey(
    model: Any,
    tokenizer: Any,
    caches: Sequence[CacheSpec],
    *,
    length: int,
    texts: int = 5,
    depths: Sequence[float] = DEPTHS,
    digits: int = 5,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda texts: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[PasskeyScores]:
    """Tell a key in a long text, and ask for it once the text is in the cache, so that nothing but the cache knows it.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        caches: what to compare; every cache gets the same texts.
        length: tokens of a text, without the question.
        texts: texts for each depth, each with a key of its own.
        depths: where the key is, from 0 to 1.
        digits: of a key.
        seed: of the keys.
        on_progress: called after every text and cache with 1.
        stop: asked before every text; once it says so, the scores are those of the texts until then.

    Returns:
        What each cache recalls, in the order of ``caches``.

    Raises:
        ValueError: a number that is not positive, or a text that is too short.
    """
    for name, value in (("texts", texts), ("digits", digits), ("depths", len(depths))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    model.set_attn_implementation("logquant")
    numbers = random.Random(seed)
    results = [PasskeyScores(spec.name, length, {d: [] for d in depths}, {d: [] for d in depths}) for spec in caches]
    question = torch.tensor([tokenizer(QUESTION, add_special_tokens=False)["input_ids"]], device=model.device)
    for depth in depths:
        for _ in range(texts):
            if stop():
                return results
            key = "".join(numbers.choice("123456789") for _ in range(digits))
            text = torch.tensor([passkey_text(tokenizer, key, depth, length)], device=model.device)
            answer = torch.tensor([tokenizer(f" {key}", add_special_tokens=False)["input_ids"]], device=model.device)
            made = [spec.make(model.config) for spec in caches]
            take_prompt(model, text, made)
            for result, cache in zip(results, made, strict=True):
                log_p = log_probabilities(model, torch.cat([question, answer[:, :-1]], 1), cache)[0]
                told = log_p[question.shape[1] - 1 :]
                result.nll[depth].append(-told.gather(1, answer[0, :, None]).mean().item())
                # Greedy decoding writes the key if at every token of it the next one is the likeliest.
                result.found[depth].append(bool((told.argmax(-1) == answer[0]).all()))
                on_progress(1)
    return results
