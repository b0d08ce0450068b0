"""LogQuant in vLLM's engine: its scheduler, its block pool, its prefix caching. Runs where vLLM is (.ci/vllm)."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm")

from benchmarks.vllm_capacity import held
from benchmarks.vllm_engine import engine, kv_cache_manager, ngrams
from logquant import plan_vllm
from logquant.integrations.vllm import guards
from tests.helpers.vllm_models import save_first_layers

NEW = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm2_and_tokenizer):
    return save_first_layers(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model):
    """With room for 40 blocks of 64 exact tokens, or of 640 packed ones."""
    directory, calibration = model
    return engine(
        directory,
        calibration,
        12,
        dtype="float32",
        max_model_len=2304,
        max_num_seqs=12,
        max_num_batched_tokens=256,
        disable_log_stats=False,
    )


@pytest.fixture(autouse=True)
def nothing_is_left(llm):
    """Every block is free before and after a test, and none is known by its contents."""
    assert llm.reset_prefix_cache()
    pool = kv_cache_manager(llm).block_pool
    free = pool.get_num_free_blocks()
    yield
    assert pool.get_num_free_blocks() == free


@pytest.fixture(scope="module")
def prompts(llm):
    """Of 100 to 2,100 tokens, different from the first one on."""
    from tests.helpers.vllm_models import TEXT

    ids = llm.get_tokenizer()(TEXT)["input_ids"]
    lengths = [100, 129, 400, 641, 700, 1000, 1500, 2100]
    return [{"prompt_token_ids": ids[7 * i :][:length]} for i, length in enumerate(lengths)]


@pytest.mark.parametrize("tokens", [300, 900, 1700, 2200])
def test_as_many_requests_fit_as_the_plan_says(llm, tokens):
    config = llm.llm_engine.model_config
    blocks = plan_vllm.blocks_of(guards.config_from({}, "logquant"), config.hf_text_config, torch.float32)
    budget = llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes
    assert held(kv_cache_manager(llm), tokens, 256) == blocks.requests(budget, tokens, 256)


class Written:
    """What greedy decoding gives: tokens and their logarithmic probabilities, which batches may round differently."""

    def __init__(self, out) -> None:
        self.tokens = list(out.token_ids)
        self.logprobs = [own[token].logprob for token, own in zip(out.token_ids, out.logprobs, strict=True)]

    def __eq__(self, other) -> bool:
        return self.tokens == other.tokens and self.logprobs == pytest.approx(other.logprobs, abs=2e-3)

    def __repr__(self) -> str:
        return str(list(zip(self.tokens, self.logprobs, strict=True)))


def written(llm, prompts, new: int = NEW):
    """What greedy decoding gives each prompt, and how many of its tokens were found in the cache."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=1)
    outs = llm.generate(prompts, greedy, use_tqdm=False)
    return [Written(out.outputs[0]) for out in outs], [out.num_cached_tokens for out in outs]


def preemptions(llm) -> int:
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


@pytest.fixture(scope="module")
def alone(llm, prompts):
    """What each prompt gives alone, in an empty cache."""
    results = []
    for prompt in prompts:
        llm.reset_prefix_cache()
        results += written(llm, [prompt])[0]
    return results


def test_the_cache_is_logquants(llm):
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    assert [type(layer).__name__ for layer in layers.values()] == ["Attention"] * 3 + ["ExactCache"] * 3
    assert all("LogQuant" in type(layer.impl).__name__ for layer in layers.values() if hasattr(layer, "impl"))


def test_weights_may_be_loaded_again_and_blocks_taken_away(llm, prompts, alone):
    """What vLLM does with the layers when it reloads weights, and with the caches after it has profiled a step."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    before = dict(layers)
    serving = [layer for layer in layers.values() if hasattr(layer, "impl")]
    for layer in serving:
        layer.impl.process_weights_after_loading(torch.float32)
    assert layers == before
    assert written(llm, prompts[:1])[0] == alone[:1]
    for layer in serving:
        exact = layers[layer.impl.exact_name]
        assert exact.pool is not None
        exact.kv_cache = exact.kv_cache
        assert exact.pool is None
    assert written(llm, prompts[:1])[0] == alone[:1]


def test_a_batch_gives_what_each_gives_alone(llm, prompts, alone):
    together, cached = written(llm, prompts)
    assert together == alone and not any(cached)


def test_a_prefix_that_is_found_gives_what_it_gives_cold(llm, prompts, alone):
    written(llm, prompts[-2:])
    again, cached = written(llm, prompts[-2:])
    assert again == alone[-2:] and cached == [1280, 1920]


def test_requests_that_share_a_prefix_and_part_give_what_they_give_alone(llm, prompts):
    own = prompts[-2]["prompt_token_ids"]
    parting = [{"prompt_token_ids": own[:n] + prompts[0]["prompt_token_ids"]} for n in (1281, 1300, 1400)]
    cold = []
    for prompt in parting:
        llm.reset_prefix_cache()
        cold += written(llm, [prompt])[0]
    llm.reset_prefix_cache()
    written(llm, [prompts[-2]])
    shared, cached = written(llm, parting)
    assert shared == cold and cached == [1280] * 3


def test_what_is_preempted_gives_what_it_gives_undisturbed(llm, prompts):
    """Twelve requests begin in a cache that cannot hold them to their ends."""
    ids = prompts[-1]["prompt_token_ids"]
    many = [{"prompt_token_ids": ids[i : i + 60]} for i in range(12)]
    before = preemptions(llm)
    together, _ = written(llm, many, 200)
    assert preemptions(llm) > before
    for i in (0, 10, 11):
        llm.reset_prefix_cache()
        assert written(llm, [many[i]], 200)[0][0] == together[i]


def test_aborted_requests_free_their_blocks_and_disturb_nobody(llm, prompts, alone):
    from vllm import SamplingParams

    core = llm.llm_engine
    endless = SamplingParams(max_tokens=2000, ignore_eos=True)
    for i, prompt in enumerate(prompts[:4]):
        core.add_request(f"aborted {i}", prompt, endless)
    for _ in range(20):
        core.step()
    core.abort_request([f"aborted {i}" for i in range(4)])
    assert not core.has_unfinished_requests()
    assert written(llm, prompts[-1:])[0] == alone[-1:]


def test_three_processes_write_what_one_does(model, prompts, alone, tmp_path):
    """Tensor parallelism over gloo: each process has one of three KV heads. Sums are rounded in another order."""
    directory, calibration = model
    script = tmp_path / "three.py"
    script.write_text(f"""
from benchmarks.vllm_engine import engine
from vllm import SamplingParams

if __name__ == "__main__":
    three = dict(tensor_parallel_size=3, distributed_executor_backend="mp")
    common = dict(dtype="float32", max_model_len=1100, max_num_seqs=2, max_num_batched_tokens=256)
    llm = engine({directory!r}, {calibration!r}, 6, **common, **three)
    greedy = SamplingParams(temperature=0.0, max_tokens={NEW}, ignore_eos=True)
    out = llm.generate([{prompts[5]!r}], greedy, use_tqdm=False)[0]
    print("written", list(out.outputs[0].token_ids))
""")
    here = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="1", PYTHONPATH=os.getcwd(), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=here)
    assert f"written {alone[5].tokens}" in done.stdout, done.stderr[-4000:]


def test_drafts_of_ngrams_give_what_greedy_decoding_gives(model, prompts, monkeypatch):
    """Texts of some hundred tokens, three at once, beyond the ends of blocks.

    A model this small repeats itself, so that all drafts are right: of some the last tokens are changed.
    """
    directory, calibration = model
    drafting = engine(
        directory,
        calibration,
        12,
        dtype="float32",
        max_model_len=2304,
        max_num_seqs=3,
        max_num_batched_tokens=256,
        disable_log_stats=False,
        **ngrams(5),
    )
    blocks = plan_vllm.blocks_of(
        guards.config_from({}, "logquant"), drafting.llm_engine.model_config.hf_text_config, torch.float32, drafts=True
    )
    budget = drafting.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes
    assert held(kv_cache_manager(drafting), 900, 256) == blocks.requests(budget, 900, 256)
    proposer = drafting.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter
    propose, random = proposer.propose, np.random.default_rng(0)

    def spoil(*args, **kwargs) -> list[list[int]]:
        found = propose(*args, **kwargs)
        right = random.integers(0, 6, len(found))
        return [[*own[:n], *(token + 1 for token in own[n:])] for own, n in zip(found, right, strict=True)]

    asked = [{"prompt_token_ids": prompts[i]["prompt_token_ids"][:n]} for i, n in ((0, 100), (3, 520), (7, 1100))]
    results, counts = [], []
    for drafts in (spoil, lambda *args, **kwargs: [[] for _ in propose(*args, **kwargs)]):
        monkeypatch.setattr(proposer, "propose", drafts)
        assert drafting.reset_prefix_cache()
        before = drafted(drafting)
        results.append(written(drafting, asked, 250)[0])
        counts.append([new - old for new, old in zip(drafted(drafting), before, strict=True)])
    assert results[0] == results[1]
    (made, accepted), (none, _) = counts
    assert none == 0 < accepted < made


def drafted(llm) -> list[int]:
    """Drafts so far, and how many were accepted."""
    metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return [metrics[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted")]


REFUSED = {
    "no calibration": ("additional_config={}", "logquant calibrate"),
    "hybrid manager off": ("disable_hybrid_kv_cache_manager=True", "disable_hybrid_kv_cache_manager"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_serve_is_refused_at_start(what, model):
    """All that is: test_guards.py."""
    change, message = REFUSED[what]
    directory, calibration = model
    code = f"""
from benchmarks.vllm_engine import engine
engine({directory!r}, {calibration!r}, 12, max_model_len=512, {change})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stdout + done.stderr
