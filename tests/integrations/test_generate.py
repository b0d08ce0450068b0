"""Every feature of ``generate``: the tokens of a ``DynamicCache`` while nothing is packed, and at 8 bits.

The table in docs/generate.md names these tests; one of them checks that it names no others.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import logquant
from logquant import LogQuantCache
from logquant.compat import CACHE, as_argument
from tests.helpers.masks import pad_mask
from tests.helpers.memo import digest
from tests.helpers.models import tiny_config, tiny_model


class Case(NamedTuple):
    """A model, prompts, settings under which a LogQuantCache gives a full cache's tokens, and how many of these."""

    model: Any
    ids: Tensor
    settings: dict[str, Any]
    count: int

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def lengths(self) -> list[int]:
        """Of prompts to be padded, a batch of them; of a real model's two have packed tokens."""
        return [self.length, max(self.length * 7 // 10, 100), 40]

    def caches(self) -> tuple[LogQuantCache, DynamicCache]:
        return LogQuantCache(self.model.config, **self.settings), DynamicCache(config=self.model.config)


CASES = [pytest.param("exact"), pytest.param("attention", id="8 bits", marks=pytest.mark.slow)]
LOG = pytest.param("log", id="8 bits, log", marks=pytest.mark.slow)
with_another_rule = pytest.mark.parametrize("case", [*CASES, LOG], indirect=True)
"""For features that reorder rows or take tokens back: what the rules keep of a token differs there."""


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    """A tiny model whose window never overflows; a real one at 8 bits, for random ones choose between near ties."""
    if request.param == "exact":
        model = tiny_model()
        model.set_attn_implementation("logquant")
        ids = torch.randint(0, 256, (3, 300), generator=torch.Generator().manual_seed(0))
        return Case(model, ids, {"window": 512}, 60)
    model, tokenizer = request.getfixturevalue("smollm2_and_tokenizer")
    model.set_attn_implementation("logquant")
    books = sorted((request.getfixturevalue("data_dir") / "dev/books").glob("*.txt"))
    rows = [tokenizer(b.read_text()[2000:5000], return_tensors="pt").input_ids[:, :104] for b in books[:3]]
    return Case(model, torch.cat(rows), {"bits": 8, "window": 32, "rule": request.param}, 24)


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.set_attn_implementation("logquant")
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 256, (3, 300), generator=torch.Generator().manual_seed(0))


def run(model, ids: Tensor, cache, **options):
    torch.manual_seed(0)
    defaults = {"max_new_tokens": 60, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    return model.generate(ids, **as_argument(cache), **defaults | options)


# What full caches have given: every rule is compared with the same.
FULL: dict[str, Any] = {}


def both(case: Case, ids: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    """Tokens with a LogQuantCache and with a DynamicCache."""
    ids = case.ids if ids is None else ids
    options = {"max_new_tokens": case.count} | options
    cache, full = case.caches()
    key = str([digest(ids), *((name, digest(option)) for name, option in options.items())])
    if key not in FULL:
        FULL[key] = run(case.model, ids, full, **options)
    return run(case.model, ids, cache, **options), FULL[key]


FEATURES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "nucleus": {"do_sample": True, "top_p": 0.9},
    "several_samples": {"do_sample": True, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    "beam_search": {"num_beams": 4},
    "beam_search_returning_several": {"num_beams": 4, "num_return_sequences": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "chunked_prefill": {"prefill_chunk_size": 70},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_tokens_are_those_of_a_full_cache(case, feature):
    options = FEATURES[feature]
    if "bits" not in case.settings or not options.get("do_sample") or "num_beams" in options:
        got, want = both(case, **options)
        assert torch.equal(got, want)
        return
    # A draw may fall between the two distributions, and then the row goes on differently: they must be that close.
    got, want = both(case, **options, return_dict_in_generate=True, output_scores=True)
    different = (got.sequences != want.sequences)[:, case.length :]
    assert different.any(1).sum() <= 1, "46 of 48 rows of 24 tokens were the same, over four seeds"
    for row, differs in enumerate(different):
        same = int(differs.nonzero()[0]) + 1 if differs.any() else case.count
        for p, q in zip(got.scores[:same], want.scores[:same], strict=True):
            assert (p[row].softmax(-1) - q[row].softmax(-1)).abs().sum() / 2 < 0.02


@with_another_rule
@pytest.mark.parametrize("kind", ["prompt_lookup", "assistant", "early_exit"])
def test_speculative_decoding(case, kind):
    options = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": case.model, "num_assistant_tokens": 6},
        "early_exit": {"assistant_early_exit": 1},
    }[kind]
    if kind == "assistant" and case.ids.max() < 256:
        options["assistant_model"] = tiny_model(num_hidden_layers=1)
    prompt = case.ids[:1, : case.length // 5].repeat(1, 5)
    got, want = both(case, prompt, **options)
    assert torch.equal(got, want)
    assert torch.equal(got, both(case, prompt)[0]), "what greedy decoding gives"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(case, side):
    got, want = both(case, attention_mask=pad_mask(case.lengths, side))
    assert torch.equal(got, want)


@with_another_rule
def test_padded_beam_search(case):
    got, want = both(case, attention_mask=pad_mask(case.lengths, "left"), num_beams=3)
    assert torch.equal(got, want)


@with_another_rule
def test_rows_that_end_early(case):
    end = int(both(case)[0][0, case.length + 10])
    got, want = both(case, eos_token_id=end, pad_token_id=0)
    assert torch.equal(got, want) and (got[:, case.length :] == 0).any()


def test_chat_of_several_turns(case):
    results = []
    for cache in case.caches():
        text = case.ids[:1, :100]
        for turn in range(3):
            text = torch.cat([text, case.ids[1:2, 50 * turn : 50 * turn + 50]], 1)
            text = run(case.model, text, cache, max_new_tokens=20)
        results.append(text)
        assert cache.get_seq_length() == text.shape[1] - 1
    assert torch.equal(*results)


def test_one_prefix_many_continuations(case):
    results, prefix = [], max(case.length - 50, 100)
    for cache in case.caches():
        with torch.no_grad():
            case.model(case.ids[:1, :prefix], **as_argument(cache))
        questions = [torch.cat([case.ids[:1, :prefix], row[None, prefix:]], 1) for row in case.ids]
        results.append([run(case.model, q, copy.deepcopy(cache), max_new_tokens=case.count) for q in questions])
        assert cache.get_seq_length() == prefix
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_input_embeddings(case):
    embeddings = case.model.get_input_embeddings()(case.ids)
    results = [
        case.model.generate(inputs_embeds=embeddings, **as_argument(cache), max_new_tokens=case.count, do_sample=False)
        for cache in case.caches()
    ]
    assert torch.equal(*results)


def test_streaming(case):
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Streamer()
    got = run(case.model, case.ids[:1], case.caches()[0], streamer=streamer, max_new_tokens=case.count)
    assert streamer.tokens == [*got[0].tolist(), -1]


def test_scores_and_the_cache_are_returned(case):
    results = [
        run(case.model, case.ids, cache, return_dict_in_generate=True, output_scores=True, max_new_tokens=20)
        for cache in case.caches()
    ]
    assert isinstance(getattr(results[0], CACHE), LogQuantCache)
    for a, b in zip(results[0].scores, results[1].scores, strict=True):
        assert (a - b).abs().mean() < 5e-3 * b.abs().mean()


def test_stopping_criteria(case):
    stop = StoppingCriteriaList([lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= case.length + 17)])
    got, want = both(case, stopping_criteria=stop)
    assert torch.equal(got, want) and got.shape[1] == case.length + 17


# --------------------------------------------------------------------------------------------------------- by default
def test_enabled_models_make_it_by_themselves(ids):
    model = tiny_model()
    before = model.config._attn_implementation
    want = run(model, ids, LogQuantCache(model.config, bits=4))
    logquant.enable(model, bits=4)
    for options in ({}, {"cache_implementation": "dynamic"}):
        out = run(model, ids, None, return_dict_in_generate=True, **options)
        assert isinstance(getattr(out, CACHE), LogQuantCache) and getattr(out, CACHE).quantization.bits == 4
        assert torch.equal(out.sequences, want)
    assert model.config._attn_implementation == "logquant"
    logquant.enable(model, bits=8)
    assert getattr(run(model, ids, None, return_dict_in_generate=True), CACHE).quantization.bits == 8
    full = DynamicCache(config=model.config)
    assert getattr(run(model, ids, full, return_dict_in_generate=True), CACHE) is full
    assert not getattr(run(model, ids, None, return_dict_in_generate=True, use_cache=False), CACHE)
    logquant.disable(model)
    logquant.disable(model)
    assert type(getattr(run(model, ids, None, return_dict_in_generate=True), CACHE)) is DynamicCache
    assert model.config._attn_implementation == before


def test_an_enabled_assistant_rolls_back(model, ids):
    drafts = tiny_model(num_hidden_layers=1)
    logquant.enable(drafts, bits=8)
    prompt = ids[:1, :60].repeat(1, 5)
    got = run(model, prompt, LogQuantCache(model.config, bits=8), assistant_model=drafts)
    assert torch.equal(got, run(model, prompt, LogQuantCache(model.config, bits=8)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "logquant"])
def test_enabled_models_tell_what_is_padding(ids, implementation):
    """At 2 bits padding that were kept would change the ranges of pages."""
    model = tiny_model()
    logquant.enable(model)
    model.set_attn_implementation(implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        together = run(model, ids, None, attention_mask=pad_mask([300, 211, 40], "left"))
        for row, length in enumerate((300, 211, 40)):
            alone = run(model, ids[row : row + 1, 300 - length :], None)
            assert torch.equal(together[row, 300:], alone[0, length:])


@pytest.mark.parametrize("name", ["past_key_values", CACHE])
def test_both_names_of_the_argument_work(ids, name):
    model = tiny_model()
    logquant.enable(model)
    model.set_attn_implementation("sdpa")
    mask = pad_mask([300, 211, 40], "left")
    want = run(model, ids, None, attention_mask=mask)
    options = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **{name: LogQuantCache(model.config)}, **options), want)


def test_enable_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match="model must be a model of transformers that generates, got LlamaConfig"):
        logquant.enable(tiny_config())
    with pytest.raises(TypeError, match="that generates, got LlamaModel"):
        logquant.enable(tiny_model().model)
    model = tiny_model()
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8, got 3"):
        logquant.enable(model, bits=3)
    assert model.config._attn_implementation != "logquant" and "_prepare_cache_for_generation" not in vars(model)


# ------------------------------------------------------------------------------------------- what transformers refuses
REFUSALS = {
    "both a cache and an implementation": ({"cache_implementation": "static"}, ValueError, "Passing both"),
    "an implementation of that name": ({"cache_implementation": "logquant"}, ValueError, "cache_implementation"),
    "speculative decoding of a batch": (
        {"prompt_lookup_num_tokens": 3},
        ValueError,
        "for batch_size = 1",
    ),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "trust_remote_code"),
    "group beam search": ({"num_beams": 4, "num_beam_groups": 2}, ValueError, "trust_remote_code"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_of_transformers(model, ids, what):
    options, error, message = REFUSALS[what]
    with pytest.raises(error, match=message):
        run(model, ids, LogQuantCache(model.config), **options)


def test_the_table_in_the_docs_names_these_tests_and_no_others():
    source = Path(__file__)
    table = (source.parents[2] / "docs/generate.md").read_text()
    named = set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", table))
    tests = source.parents[1].rglob("test_*.py")
    there = {name for file in tests for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    assert named <= there, named - there
    own = set(re.findall(r"^def (test_\w+)", source.read_text(), re.M)) - {
        "test_the_table_in_the_docs_names_these_tests_and_no_others"
    }
    assert own <= named, own - named
