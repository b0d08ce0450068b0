"""What evictions take of decoding: ``python -m benchmarks.evictions [--context 4000]``.

Every W tokens a cache packs W: that step takes longer. Caches take turns, step by step, for several times W steps. Of
all steps with the same place between two evictions the median is taken, of which there are W; the greatest of those is
the step that evicts.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch

from logquant.bench.generate import bench_generate
from logquant.methods.registry import parse_caches
from logquant.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--caches", default="logquant,log,recent")
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--evictions", type=int, default=6, help="times W steps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    given = parser.parse_args()
    model, _ = load(given.model, dtype=getattr(torch, given.dtype))
    specs = parse_caches(given.caches)
    windows = {spec.quantization.window for spec in specs if spec.quantization is not None}
    if len(windows) != 1:
        parser.error(f"--caches must be LogQuant caches with one window, got {given.caches}")
    window = windows.pop()
    results = bench_generate(model, specs, context=given.context, batch=given.batch, steps=given.evictions * window)
    first = 0.0
    for result in results:
        samples = result.timing.samples
        *others, evicts = sorted(median(samples[place::window]) for place in range(window))
        step = median(others)
        first = first or step
        share = (evicts - step) / (sum(others) + evicts)
        print(
            f"{result.cache}: a step {1e3 * step:.2f} ms ({step / first:.3f} of {results[0].cache}'s), one that evicts "
            f"{1e3 * evicts:.1f} ms: evictions are {share:.1%} of decoding"
        )


if __name__ == "__main__":
    main()
