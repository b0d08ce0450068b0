"""How many requests of N tokens vLLM's KV cache manager holds at once: ``python -m benchmarks.vllm_capacity``.

With ``--calibration FILE`` the cache is LogQuant's. Requests get their blocks chunk by chunk, as the scheduler gives
them, and one for a decoded token. Nothing is computed, but for ``--live N``: that many of the longest requests then run
in the engine, all at the same time.
"""

from __future__ import annotations

import argparse

from benchmarks.vllm_engine import engine, kv_cache_manager, ngrams
from logquant.models import default_model


def held(manager: object, tokens: int, chunk: int) -> int:
    """Requests of so many tokens that get all their blocks."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    requests = []
    while True:
        number = str(len(requests))
        prompt = [1] * tokens
        request = Request(
            number, prompt_token_ids=prompt, sampling_params=SamplingParams(max_tokens=1), pooling_params=None
        )
        requests.append(request)
        while request.num_computed_tokens < tokens:
            count = min(chunk, tokens - request.num_computed_tokens)
            # Blocks whose contents nobody computes must not be found by them.
            if manager.allocate_slots(request, count, delay_cache_blocks=True) is None:
                break
            request.num_computed_tokens += count
        else:
            if manager.allocate_slots(request, 1, delay_cache_blocks=True) is not None:
                continue
        for each in requests:
            manager.free(each)
        return len(requests) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration")
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--drafts", type=int, default=0, help="of n-grams, a step; with them a block holds fewer pages")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=512, help="max_num_batched_tokens")
    parser.add_argument("--tokens", default="1000,2000,4000,8000")
    parser.add_argument("--live", type=int, default=0)
    arguments = parser.parse_args()
    counts = [int(n) for n in arguments.tokens.split(",")]
    llm = engine(
        arguments.model,
        arguments.calibration,
        arguments.mib,
        dtype=arguments.dtype,
        # All decode until the last has been read.
        max_model_len=max(counts) + 64 + arguments.live * -(-max(counts) // arguments.chunk) * 2,
        max_num_seqs=max(64, arguments.live),
        max_num_batched_tokens=arguments.chunk,
        enable_prefix_caching=False,
        **ngrams(arguments.drafts),
        disable_log_stats=False,
    )
    for tokens in counts:
        found = held(kv_cache_manager(llm), tokens, arguments.chunk)
        print(f"{tokens:,} tokens: {found} requests, {found * tokens:,} tokens held at once", flush=True)
    if arguments.live:
        live(llm, arguments.live, max(counts))


def live(llm: object, requests: int, tokens: int) -> None:
    """Run so many requests, which decode until the last has been read, and say how many ran at once."""
    from vllm import SamplingParams

    core = llm.llm_engine
    for i in range(requests):
        prompt = {"prompt_token_ids": [100 + i] * tokens}
        core.add_request(str(i), prompt, SamplingParams(max_tokens=10**6, ignore_eos=True, temperature=0.0))
    scheduler = core.engine_core.engine_core.scheduler
    most = 0
    while most < requests * tokens and core.has_unfinished_requests():
        core.step()
        most = max(most, sum(request.num_computed_tokens for request in scheduler.running))
    print(f"live: {len(scheduler.running)} requests, {most:,} tokens held at once", flush=True)


if __name__ == "__main__":
    main()
