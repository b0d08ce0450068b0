"""KL divergence to vLLM's own KV cache, over positions of a text: ``python -m benchmarks.vllm_kl TEXT ...``.

Each engine computes the text as the prompt of one request, in a process of its own, in chunks
(``max_num_batched_tokens``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.vllm_engine import engine, ngrams
from logquant.models import default_model


def run(arguments: argparse.Namespace) -> None:
    """Write what the model gives each position, before its last matrix, and that matrix."""
    from vllm import SamplingParams

    total = arguments.skip + arguments.positions
    if arguments.without:
        leave_out(arguments.without)
    llm = engine(
        arguments.model,
        arguments.calibration or None,
        arguments.mib,
        json.loads(arguments.settings),
        dtype=arguments.dtype,
        max_model_len=total + 64,
        max_num_seqs=4,
        max_num_batched_tokens=arguments.chunk,
        enable_prefix_caching=False,
        **ngrams(arguments.drafts),
    )
    ids = llm.get_tokenizer()(Path(arguments.text).read_text())["input_ids"][arguments.first :][:total]
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    parts, forward = [], model.forward

    def recording(*args: object, **kwargs: object) -> torch.Tensor:
        out = forward(*args, **kwargs)
        parts.append(out.clone())
        return out

    model.forward = recording
    llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
    hidden = torch.cat(parts)[arguments.skip : total]
    torch.save((hidden, model.lm_head.weight.detach().clone()), arguments.save)


def leave_out(advice: str) -> None:
    """Have pages made without what recent queries say of them: ``key_weights``, ``value_feedback`` or both."""
    from logquant.integrations.vllm import packing

    quantize = packing.ops.quantize

    def with_less(*args: object, **options: object) -> torch.Tensor:
        return quantize(*args, **{name: value for name, value in options.items() if name not in advice.split(",")})

    packing.ops.quantize = with_less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--drafts", type=int, default=0, help="of n-grams, a step; with them a block holds fewer pages")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chunks", default="64,512")
    parser.add_argument("--first", type=int, default=2000, help="the token of the text where the prompt begins")
    parser.add_argument("--skip", type=int, default=500, help="positions of the prompt that do not count")
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--settings", default="{}", help="others of LogQuant's, as JSON")
    parser.add_argument("--without", help="key_weights, value_feedback or both: what pages are to be made without")
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.save:
        run(arguments)
        return
    with tempfile.TemporaryDirectory() as directory:

        def results(calibration: str, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
            file = f"{directory}/{chunk}.pt"
            changes = ["--save", file, "--chunk", str(chunk), "--calibration", calibration]
            subprocess.run([sys.executable, "-m", "benchmarks.vllm_kl", *sys.argv[1:], *changes], check=True)
            return torch.load(file)

        hidden, weight = results("", 512)
        for chunk in map(int, arguments.chunks.split(",")):
            other, _ = results(arguments.calibration, chunk)
            print(f"chunks of {chunk}: KL {kl(hidden, other, weight):.5f} over {len(hidden):,} positions", flush=True)


def kl(hidden: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> float:
    """The mean divergence of the tokens that follow from ``other``, from those that follow from ``hidden``, in nats."""
    total = 0.0
    for own, others in zip(hidden.float().split(256), other.float().split(256), strict=True):
        p, q = ((x @ weight.float().T).log_softmax(-1) for x in (own, others))
        total += (p.exp() * (p - q)).sum().item()
    return total / len(hidden)


if __name__ == "__main__":
    main()
