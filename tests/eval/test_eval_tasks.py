"""Greedy agreement and passkeys: scores that are known beforehand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from logquant.compat import as_argument
from logquant.eval import greedy_agreement, passkey
from logquant.eval.passkey import passkey_text
from logquant.methods.registry import parse_cache, parse_caches
from tests.helpers.models import save_tiny_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model")))


def test_agreement_is_up_to_the_first_token_that_differs(model):
    ids = torch.randint(256, (5, 150), generator=torch.Generator().manual_seed(1))
    names = ["full", "logquant", "paper:window=32", "kivi:residual=32", "paper:window=32,bits=8"]
    scores = greedy_agreement(model, ids, [parse_cache(name) for name in names], tokens=25, batch_size=2)
    assert [each.cache for each in scores] == names
    assert scores[0].agreement == [25] * 5
    assert scores[1].agreement == [25] * 5  # 174 tokens all stay exact
    for each in scores:
        for row, text in enumerate(ids):
            written = []
            for name in ("full", each.cache):
                options = {
                    "max_new_tokens": 25,
                    "do_sample": False,
                    **as_argument(parse_cache(name).make(model.config)),
                }
                written.append(model.generate(text[None], **options)[0, 150:].tolist())
            alike = 0
            while alike < 25 and written[0][alike] == written[1][alike]:
                alike += 1
            assert each.agreement[row] == alike
    two_bits, eight_bits = (scores[i].as_dict() for i in (2, 4))
    assert two_bits["agreement"] < eight_bits["agreement"] <= 25
    low, high = two_bits["agreement_interval"]
    assert low <= two_bits["agreement"] <= high and two_bits["texts"] == scores[2].agreement


@pytest.mark.parametrize("options", [{"tokens": 0}, {"tokens": 1, "batch_size": 0}])
def test_bad_sizes_of_greedy_decoding_are_named(model, options):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        greedy_agreement(model, torch.ones(1, 5, dtype=torch.long), parse_caches("full"), **options)


def test_a_passkey_lies_where_it_should(tokenizer):
    places = []
    for depth in (0.0, 0.5, 1.0):
        ids = passkey_text(tokenizer, "12345", depth, 700)
        text = tokenizer.decode(ids)
        assert len(ids) == 700 and text.count("12345") == 2 and text.startswith("There is an important info")
        places.append(text.index(" The pass key is 12345."))
    assert places[0] < 100 and abs(places[1] - 370) < 20 and places[2] > 630
    with pytest.raises(ValueError, match="length must be at least 150, got 100"):
        passkey_text(tokenizer, "12345", 0.5, 100)


def test_passkeys_are_scored_as_decoding_would_find_them(model, tokenizer):
    """A model with random weights finds nothing, at a price that is the same whichever way it is added up."""
    (scores,) = passkey(model, tokenizer, parse_caches("full"), length=200, texts=2, depths=(0.5,), digits=1)
    assert scores.found == {0.5: [False, False]} and min(scores.nll[0.5]) > 0
    written = scores.as_dict()
    assert written["found"] == 0 and written["nll"] == written["nll_by_depth"][0.5] == sum(scores.nll[0.5]) / 2
    with pytest.raises(ValueError, match="texts must be at least 1, got 0"):
        passkey(model, tokenizer, parse_caches("full"), length=200, texts=0)


def test_a_real_model_recalls_what_its_cache_holds(smollm2, smollm2_tokenizer):
    """And does not recall what it has forgotten: nothing but the cache tells it."""
    specs = [parse_cache(name) for name in ("full", "logquant", "streaming:recent=100")]
    full, ours, forgetful = passkey(smollm2, smollm2_tokenizer, specs, length=500, texts=2, depths=(0.4, 1.0))
    assert full.found[0.4] == ours.found[0.4] == [True] * 2 and forgetful.found[0.4] == [False] * 2
    # The key at the end is within every window.
    assert min(forgetful.nll[0.4]) > 1 > max(full.nll[0.4] + ours.nll[0.4] + forgetful.nll[1.0])


def test_stopped_tasks_score_what_was_done(model, tokenizer):
    """Every cache the same prompts or texts; depths of which none was tried are not there."""
    specs, done = parse_caches("full,logquant"), []
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(1))
    options = {"on_progress": done.append, "stop": lambda: len(done) == 4}
    scores = greedy_agreement(model, ids, specs, tokens=3, batch_size=1, **options)
    assert [each.agreement for each in scores] == [[3, 3], [3, 3]] and len(done) == 4
    done.clear()
    for each in passkey(model, tokenizer, specs, length=150, texts=1, **options):
        assert list(each.as_dict()["found_by_depth"]) == [0.0, 0.25] and len(each.nll[0.25]) == 1
    assert greedy_agreement(model, ids, specs, tokens=3, stop=lambda: True)[0].agreement == []
