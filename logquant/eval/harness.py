"""Any task of lm-evaluation-harness with any cache of :mod:`logquant.methods.registry`.

As a program it is the harness's own, with one more model::

    python -m logquant.eval.harness run --model logquant --model_args 'cache=kivi:bits=4;residual=64' --tasks gsm8k

Settings of a cache are separated by semicolons here, for commas separate the model's arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.logging import tqdm

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness is missing ({error}): pip install 'logquant[lm-eval]'") from error

from ..compat import as_argument
from ..methods.registry import parse_cache
from .divergence import log_probabilities

# What the harness asks for: a key or None, token ids of the context, token ids of the continuation.
Request = tuple[Any, list[int], list[int]]


@register_model("logquant")
class CacheLM(HFLM):  # type: ignore[misc]
    """A model of transformers whose keys and values are in a cache of our choice.

    Prompts attend to themselves exactly. What is generated, and continuations whose likelihood is asked for, are fed
    through the cache. (The harness's own ``hf`` model scores a continuation in one pass with its context, in which no
    cache takes part.)

    Args:
        pretrained: a directory, a hub id or a model; by default the packaged SmolLM2-135M-Instruct.
        cache: a name as :func:`logquant.methods.registry.parse_cache` takes it, with semicolons for commas.
        chunk: tokens of a continuation that are scored at once. Only 1 is decoding as it happens.
        **options: of the harness's ``hf`` model. ``batch_size`` counts for generation alone; some baselines take no
            padding and need 1.

    Raises:
        ImportError: a cache of a package that is not installed.
        ValueError: an unknown cache or setting, or a chunk that is not positive.
    """

    def __init__(self, pretrained: Any = None, cache: str = "logquant", chunk: int = 1, **options: Any) -> None:
        self.spec = parse_cache(cache.replace(";", ","))
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.chunk = chunk
        if pretrained is None:
            from ..models import default_model

            pretrained = default_model()
        super().__init__(pretrained=pretrained, **options)
        self.model.set_attn_implementation("logquant")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside results; with the cache's name."""
        return {**super().get_model_info(), "cache": self.spec.name}

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        cache = as_argument(self.spec.make(self.model.config))
        out: Tensor = super()._model_generate(context, max_length, stop, **cache, **options)
        return out

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood, and whether greedy decoding would have written it.

        One after the other, so that no padding is in the way; requests with the same prompt share its cache.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        prompts = [self._split(context, continuation)[0] for _, context, continuation in requests]
        last: tuple[list[int], Cache, Tensor] | None = None
        for i in tqdm(sorted(range(len(requests)), key=prompts.__getitem__), disable=disable_tqdm or self.rank != 0):
            key, context, continuation = requests[i]
            prompt, targets = self._split(context, continuation)
            if last is None or last[0] != prompt:
                cache = self.spec.make(self.model.config)
                ids = torch.tensor([prompt], device=self.device)
                logits = self.model(ids, **as_argument(cache), logits_to_keep=1).logits
                last = prompt, cache, logits[0].float().log_softmax(-1)
            answers[i] = self._score(copy.deepcopy(last[1]), last[2], targets)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[i])
        return answers

    def _split(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The prompt, cut at its start to what the model can see, and the continuation."""
        tokens = (context + continuation)[-(self.max_length + 1) :]
        first = len(tokens) - len(continuation)
        return tokens[:first], tokens[first:]

    def _score(self, cache: Cache, first: Tensor, targets: list[int]) -> tuple[float, bool]:
        """Feed targets through a cache; ``first`` ``[1, vocabulary]`` predicts the first of them."""
        ids = torch.tensor(targets, device=self.device)
        predicted = [first]
        for part in ids[:-1].split(self.chunk) if len(ids) > 1 else ():
            predicted.append(log_probabilities(self.model, part[None], cache)[0])
        log_p = torch.cat(predicted)
        total = log_p.gather(1, ids[:, None]).double().sum().item()
        return total, bool((log_p.argmax(-1) == ids).all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
