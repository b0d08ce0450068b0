"""``logquant.enable`` and what else is done with a model: adapters, copies, pickles, files, continuous batching."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    DynamicCache,
    GenerationConfig,
    pipeline,
)
from transformers.generation import ContinuousBatchingConfig

import logquant
from logquant import LogQuantCache
from logquant.cache.mapped import MappedAllocator
from logquant.compat import CACHE, as_argument
from logquant.models import load
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def generated(model: Any, ids: Tensor, **options: Any) -> Any:
    defaults = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **defaults | options)


def cache_of(model: Any, ids: Tensor, **options: Any) -> Any:
    return getattr(generated(model, ids, **options), CACHE)


def made(model: Any, ids: Tensor) -> type:
    """The kind of cache that the model's ``generate`` makes."""
    return type(cache_of(model, ids))


# ------------------------------------------------------------------------------------------- models that hold a model
class Adapter(nn.Module):
    """As ``peft.PeftModel``: no model of transformers, but one in it that generates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def generate(self, **inputs: Any) -> Any:
        return self.base_model.generate(**inputs)


@pytest.mark.parametrize("wrap", [Adapter, torch.compile], ids=["adapter", "torch.compile"])
def test_a_module_that_holds_a_model_is_enabled(ids, wrap):
    inner = tiny_model()
    outer = wrap(inner)
    logquant.enable(outer, bits=4)
    assert made(inner, ids) is LogQuantCache and inner.config._attn_implementation == "logquant"
    logquant.disable(outer)
    assert made(inner, ids) is DynamicCache and inner.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["LoRA", "prompt tuning"])
def test_peft_models(ids, kind):
    peft = pytest.importorskip("peft", reason="needs peft")
    settings = {
        "LoRA": peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    }[kind]
    model = peft.get_peft_model(tiny_model(), settings).eval()
    want = generated(model, ids).sequences
    logquant.enable(model)
    for _ in range(2):
        assert torch.equal(generated(model, ids).sequences, want) and made(model, ids) is LogQuantCache
    assert made(pickle.loads(pickle.dumps(model)), ids) is LogQuantCache
    logquant.disable(model)
    assert made(model, ids) is DynamicCache


def test_a_model_whose_part_generates(ids):
    """BLIP-2 hands all to its language model's ``generate``."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        qformer_config=sizes | {"vocab_size": 64, "encoder_hidden_size": 32},
        text_config={
            "model_type": "opt",
            "vocab_size": 256,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
        },
        num_query_tokens=4,
        image_token_index=255,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval()
    prompt = torch.cat([torch.full((1, 4), 255), ids[:1] % 250], 1)
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    want = generated(model, prompt, pixel_values=image)
    logquant.enable(model)
    got = generated(model, prompt, pixel_values=image)
    assert type(getattr(want, CACHE)) is DynamicCache and type(getattr(got, CACHE)) is LogQuantCache
    assert torch.equal(want.sequences, got.sequences)


def test_the_model_of_a_pipeline(model_dir):
    model, tokenizer = load(model_dir)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(type(getattr(output, CACHE))))
    with pytest.raises(TypeError, match="that generates, got TextGenerationPipeline"):
        logquant.enable(text)
    logquant.enable(text.model)
    text("once upon a time", max_new_tokens=3)
    assert set(seen) == {LogQuantCache}


# ----------------------------------------------------------------------------------------------- attention, settings
def test_its_caches_may_have_their_pages_in_files_and_always_grow(ids, tmp_path):
    model = tiny_model()
    options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    outs = []
    for directory in (None, tmp_path):
        logquant.enable(model, page_directory=directory)
        out = model.generate(ids[:, :250], **options)
        outs.append(out.sequences)
        assert isinstance(getattr(out, CACHE)._shared.allocator, MappedAllocator) == (directory is not None)
    assert torch.equal(*outs)
    with pytest.raises(NotADirectoryError, match="page_directory must be a directory"):
        logquant.enable(model, page_directory=tmp_path / "nowhere")
    with pytest.raises(TypeError, match="enable makes caches that grow, got max_length=500"):
        logquant.enable(model, max_length=500)


def test_disable_leaves_attention_that_was_set_since(ids):
    model = tiny_model()
    logquant.enable(model)
    model.set_attn_implementation("eager")
    logquant.enable(model, bits=8)
    assert model.config._attn_implementation == "logquant" and cache_of(model, ids).quantization.bits == 8
    logquant.disable(model)
    assert model.config._attn_implementation == "eager"
    logquant.enable(model)
    model.set_attn_implementation("sdpa")
    logquant.disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_methods_that_were_replaced_before_are_called_and_come_back(ids):
    model, calls = tiny_model(), []
    before = model.prepare_inputs_for_generation

    def counted(*args, **kwargs):
        calls.append(args)
        return before(*args, **kwargs)

    model.prepare_inputs_for_generation = counted
    logquant.enable(model)
    assert made(model, ids) is LogQuantCache and len(calls) == 4
    logquant.disable(model)
    assert model.prepare_inputs_for_generation is counted
    assert "_prepare_cache_for_generation" not in vars(model) and not model._forward_pre_hooks


def test_the_arguments_of_generate_are_still_checked(ids):
    model = tiny_model()
    logquant.enable(model)
    with pytest.raises(ValueError, match="not used by the model"):
        generated(model, ids, unknown=3)


# ------------------------------------------------------------------------------------------------- copies and files
def copied(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copied, pickled, saved])
def test_copies_of_an_enabled_model_are_enabled_and_their_own(ids, way):
    model = tiny_model()
    logquant.enable(model, bits=4)
    twin = way(model)
    assert cache_of(twin, ids).quantization.bits == 4
    assert torch.equal(generated(twin, ids).sequences, generated(model, ids).sequences)
    logquant.disable(twin)
    assert made(twin, ids) is DynamicCache and twin.config._attn_implementation == "sdpa"
    assert made(model, ids) is LogQuantCache and model.config._attn_implementation == "logquant"
    again = way(model)
    logquant.disable(model)
    assert made(again, ids) is LogQuantCache


def test_another_process_unpickles_an_enabled_model(ids, tmp_path):
    """It need not have imported logquant: a spawned worker has not."""
    model = tiny_model()
    logquant.enable(model, bits=4)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, ids)))
    code = (
        "import pickle, sys; model, ids = pickle.load(open(sys.argv[1], 'rb'));"
        "out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True);"
        f"print(type(out.{CACHE}).__name__, out.{CACHE}.quantization.bits)"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", code, str(file)]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["LogQuantCache", "4"]


def test_save_pretrained_of_an_enabled_model_writes_nothing_of_it(ids, tmp_path):
    model = tiny_model()
    logquant.enable(model)
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "logquant" not in json.dumps(json.loads(file.read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert made(loaded, ids) is DynamicCache and loaded.config._attn_implementation == "sdpa"


# ----------------------------------------------------------------------------------------------- continuous batching
def batched(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    out = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
        **options,
    )
    return [one.generated_tokens for one in out.values()]


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_continuous_batching_keeps_its_own_cache(ids, before):
    model = tiny_model()
    model.set_attn_implementation(before)
    prompts = [row.tolist() for row in ids]
    want = batched(model, prompts)
    logquant.enable(model)
    alone = generated(model, ids).sequences
    for options in ({}, {"persistent_manager": True}, {"persistent_manager": True}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert batched(model, prompts, **options) == want
        assert [str(w.message) for w in caught if "logquant" in str(w.message)] == [
            "continuous batching (generate_batch) keeps keys and values in a paged cache of its own, in full "
            "precision: logquant.enable(model) has no effect on it"
        ]
        assert model.config._attn_implementation == "logquant"
        assert torch.equal(generated(model, ids).sequences, alone) and made(model, ids) is LogQuantCache
    model.destroy_cached_continuous_batching_manager()
    logquant.disable(model)
    assert model.config._attn_implementation == before and batched(model, prompts) == want


def test_an_error_of_continuous_batching_leaves_the_model_enabled(ids):
    model = tiny_model()
    logquant.enable(model)
    with pytest.warns(RuntimeWarning, match="paged cache"), pytest.raises(AttributeError):
        model.init_continuous_batching(generation_config=GenerationConfig(), continuous_batching_config="none")
    assert model.config._attn_implementation == "logquant" and made(model, ids) is LogQuantCache


# ------------------------------------------------------------------------------------------- caches that a model makes
def test_a_forward_pass_that_is_to_use_a_cache_makes_one_too(ids):
    model = tiny_model()
    logquant.enable(model)
    with torch.no_grad():
        assert type(getattr(model(ids, use_cache=True), CACHE)) is LogQuantCache
        assert type(getattr(model(ids), CACHE)) is DynamicCache, "as it may be called in training"
        given = DynamicCache(config=model.config)
        assert getattr(model(ids, use_cache=True, **as_argument(given)), CACHE) is given
        assert getattr(model(ids, use_cache=False), CACHE) is None


def test_both_caches_of_guidance_are_packed(ids, monkeypatch):
    model = tiny_model()
    logquant.enable(model)
    lengths: dict[int, int] = {}
    update = LogQuantCache.update

    def counted(self, *args, **kwargs):
        out = update(self, *args, **kwargs)
        lengths[id(self)] = self.get_seq_length()
        return out

    monkeypatch.setattr(LogQuantCache, "update", counted)
    kept = cache_of(model, ids, guidance_scale=1.5)
    assert sorted(lengths.values()) == [4, 43] and kept.get_seq_length() == 43
