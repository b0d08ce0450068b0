"""A step of decoding of a model of an 8B's shape: caches that grow against those of fixed size in CUDA graphs.

    python benchmarks/decode_step.py --device cuda --json out.json
    python benchmarks/decode_step.py --tiny              on a CPU, with the compiler's graphs in place of CUDA's

Weights are random, which takes as long as real ones, and of 32 layers there are 8: the head and the embedding are
measured apart by ``--layers``. The full cache is in its fastest form that holds a graph, transformers' ``StaticCache``.
Times are medians of rounds in which the caches take turns; each result is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from logquant import LogQuantCache
from logquant.compat import as_argument

CACHES = ("full", "full static, compiled", "logquant", "logquant static, compiled")


def model_of(layers: int, tiny: bool, device: str) -> LlamaForCausalLM:
    wide = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, vocab_size=128256, head_dim=128)
    small = dict(hidden_size=128, intermediate_size=128, num_attention_heads=4, vocab_size=256, head_dim=64)
    shape: dict[str, Any] = small | {"num_key_value_heads": 2} if tiny else wide | {"num_key_value_heads": 8}
    config = LlamaConfig(**shape, num_hidden_layers=layers, max_position_embeddings=1 << 17)
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def stepper(model: LlamaForCausalLM, name: str, ids: Tensor, length: int, mode: str) -> Callable[[], None]:
    """A function that decodes one token after ``ids``."""
    compiles = name.endswith("compiled")
    cache: Cache
    if name.startswith("logquant"):
        model.set_attn_implementation("logquant")
        cache = LogQuantCache(model.config, max_length=length if compiles else None)
    else:
        model.set_attn_implementation("sdpa")
        static = StaticCache(config=model.config, max_cache_len=length)
        cache = static if compiles else DynamicCache(config=model.config)
    implementation = model.config._attn_implementation
    # A prompt of which only the last logits are wanted.
    model(ids, logits_to_keep=1, **as_argument(cache))
    forward = torch.compile(model.forward, mode=mode, fullgraph=True) if compiles else model.forward
    token = ids[:, -1:].clone()

    def step() -> None:
        model.config._attn_implementation = implementation
        if isinstance(cache, LogQuantCache):
            cache.make_room()
        forward(token, logits_to_keep=1, **as_argument(cache))

    return step


def milliseconds(step: Callable[[], None], steps: int, device: str) -> float:
    """Of one of so many steps."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - begin) / steps * 1e3


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--contexts", default="1024,8192,32768")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to see that it runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = model_of(args.layers, args.tiny, args.device)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": args.layers,
        "batch": args.batch,
        "milliseconds a step": [],
    }
    for context in map(int, args.contexts.split(",")):
        torch._dynamo.reset()
        ids = torch.randint(0, model.config.vocab_size, (args.batch, context), device=args.device)
        length = context + (args.rounds + 2) * args.steps
        mode = "reduce-overhead" if args.device == "cuda" else "default"
        times: dict[str, list[float]] = {}
        steps = {}
        for name in CACHES:
            try:
                steps[name] = stepper(model, name, ids, length, mode)
                milliseconds(steps[name], min(4, args.steps), args.device)
                times[name] = []
            except Exception as error:  # the others have something to say all the same
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
        for _ in range(args.rounds):
            for name, taken in times.items():
                taken.append(milliseconds(steps[name], args.steps, args.device))
        row = {name: round(median(taken), 3) for name, taken in times.items()}
        results["milliseconds a step"].append({"context": context} | row)
        print(context, row, flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        if len(times) < len(CACHES):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
