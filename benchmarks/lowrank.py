"""KL of a model of low rank to the whole model with its full cache: ``python -m benchmarks.lowrank TEXT ...``.

Every variant takes the same prompt of each text, and then the same tokens, as ``logquant eval`` does.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logquant.eval.divergence import log_probabilities
from logquant.lowrank import compress
from logquant.methods.accounting import cache_nbytes, commit
from logquant.methods.registry import parse_cache
from logquant.models import load


def token_ids(tokenizer: Any, files: list[str], length: int) -> list[Tensor]:
    return [tokenizer(Path(file).read_text(), return_tensors="pt").input_ids[:, :length] for file in files]


@torch.inference_mode()
def steps(model: Any, cache: Any, ids: Tensor, prefill: int, chunk: int) -> Iterator[Tensor]:
    """Log-probabilities of next tokens after the prompt, ``chunk`` tokens at a time, ``[n, vocabulary]``."""
    log_probabilities(model, ids[:, :prefill], cache)
    for part in ids[:, prefill:].split(chunk, 1):
        yield log_probabilities(model, part, cache)[0]


def divergence(truth: Iterable[Tensor], guess: Iterable[Tensor]) -> float:
    """Mean KL of a text's tokens, nats."""
    parts = [(want.exp() * (want - got)).sum(-1) for want, got in zip(truth, guess, strict=True)]
    return torch.cat(parts).mean().item()


def share(text: str) -> float | tuple[float, float]:
    """``0.75``, or ``1:0.5`` for progressive ranks."""
    parts = [float(part) for part in text.split(":")]
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--data", nargs="*", default=[], help="texts that ranks are fitted to")
    parser.add_argument("--data-tokens", type=int, default=2048, help="of each")
    parser.add_argument("--values", nargs="+", default=["0.75"])
    parser.add_argument("--keys", nargs="+", default=["1"])
    parser.add_argument("--fit", nargs="+", default=["outputs"])
    parser.add_argument("--caches", nargs="+", default=["full", "recent"])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=8)
    given = parser.parse_args()
    model, tokenizer = load(given.model)
    texts = token_ids(tokenizer, given.texts, given.prefill + given.tokens)
    data = token_ids(tokenizer, given.data, given.data_tokens)
    settings = given.prefill, given.chunk
    # Of 1,000 tokens, 200 MB where the vocabulary is 49,152.
    truth = [list(steps(model, parse_cache("full").make(model.config), ids, *settings)) for ids in texts]
    for fit in given.fit:
        for values in given.values:
            for keys in given.keys:
                small = copy.deepcopy(model)
                seen = None if fit == "weights" else data
                compress(small, share(values), share(keys), seen, fit)
                for cache in given.caches:
                    kls, size = [], 0
                    for ids, want in zip(texts, truth, strict=True):
                        made = parse_cache(cache).make(small.config)
                        kls.append(divergence(want, steps(small, made, ids, *settings)))
                        commit(made)
                        size += cache_nbytes(made)
                    print(
                        f"fit={fit} values={values} keys={keys} {cache}: KL {sum(kls) / len(kls):.4f} "
                        f"({min(kls):.4f} to {max(kls):.4f}), {size / len(texts) / 1e6:.1f} MB a text",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
