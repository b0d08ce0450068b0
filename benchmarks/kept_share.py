"""How much ``evict`` keeps of texts, and what whole pages add: ``python -m benchmarks.kept_share TEXT ...``.

Shares of the tokens of a text, exact ones included, over layers and KV heads: what the rule keeps, and what is held.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from logquant import LogQuantCache
from logquant.eval.divergence import log_probabilities
from logquant.methods.registry import parse_cache
from logquant.models import load


def shares(cache: LogQuantCache) -> str:
    kept, held = [], []
    for layer in cache.layers:
        layer.commit()
        ragged, exact, tokens = layer.held.ragged, layer.rows.exact, layer.get_seq_length()
        kept.append((ragged.kept + exact) / tokens)
        held.append((ragged.counts * layer.format.page_tokens + exact) / tokens)
    by_rule, in_pages = torch.cat(kept).flatten(), torch.cat(held).flatten()
    return (
        f"kept {by_rule.mean():.3f} ({by_rule.min():.2f} to {by_rule.max():.2f}), "
        f"held {in_pages.mean():.3f} ({in_pages.min():.2f} to {in_pages.max():.2f}), {cache.nbytes / 1e6:.1f} MB"
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--caches", nargs="+", default=["recent:window=128,evict=corm(window=256)"])
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--chunk", type=int, default=16)
    given = parser.parse_args()
    model, tokenizer = load(given.model)
    for name in given.caches:
        for text in given.texts:
            ids: Any = tokenizer(Path(text).read_text(), return_tensors="pt").input_ids
            cache: Any = parse_cache(name).make(model.config)
            log_probabilities(model, ids[:, : given.prefill], cache)
            at_first = shares(cache)
            for part in ids[:, given.prefill : given.prefill + given.tokens].split(given.chunk, 1):
                log_probabilities(model, part, cache)
            print(f"{name} {Path(text).name}: prompt: {at_first}; end: {shares(cache)}", flush=True)


if __name__ == "__main__":
    main()
