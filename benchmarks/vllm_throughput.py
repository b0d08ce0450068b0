"""Tokens a second of many requests in a small KV cache: ``python -m benchmarks.vllm_throughput --calibration FILE``.

vLLM's own cache and LogQuant's take turns, each in a process of its own; others that use the machine slow down both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from benchmarks.vllm_engine import engine
from logquant.models import default_model


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """All requests in one engine, each of as many tokens, prompt and answer together, as its number says."""
    from vllm import SamplingParams

    llm = engine(
        arguments.model,
        arguments.calibration or None,
        arguments.mib,
        dtype=arguments.dtype,
        max_model_len=arguments.longest + 64,
        max_num_seqs=arguments.requests,
        max_num_batched_tokens=arguments.chunk,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    step = (arguments.longest - arguments.shortest) / max(1, arguments.requests - 1)
    lengths = [int(arguments.shortest + i * step) for i in range(arguments.requests)]
    prompts = [
        {"prompt_token_ids": [(7 * t + i) % 40_000 + 100 for t in range(length - arguments.new)]}
        for i, length in enumerate(lengths)
    ]
    greedy = SamplingParams(max_tokens=arguments.new, ignore_eos=True, temperature=0.0)
    wall, cpu = time.perf_counter(), time.process_time()
    llm.generate(prompts, greedy, use_tqdm=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    preempted = next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    return {"tokens": sum(lengths), "wall": wall, "cpu": cpu, "preemptions": preempted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mib", type=int, default=96)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=2000)
    parser.add_argument("--longest", type=int, default=4000)
    parser.add_argument("--new", type=int, default=512, help="tokens of each that are written, not read")
    parser.add_argument("--chunk", type=int, default=512, help="max_num_batched_tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(run(arguments)))
        return
    for _ in range(arguments.rounds):
        for name, calibration in (("vLLM", ""), ("LogQuant", arguments.calibration)):
            command = [sys.executable, "-m", "benchmarks.vllm_throughput", *sys.argv[1:], "--once"]
            done = subprocess.run(
                [*command, "--calibration", calibration], check=True, stdout=subprocess.PIPE, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}: {found['tokens'] / found['wall']:.0f} tokens/s, {found['tokens'] / found['cpu']:.0f} a CPU "
                f"second, {found['preemptions']:.0f} preemptions, {found['wall']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
