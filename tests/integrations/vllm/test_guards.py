"""What is refused, and which versions; without vLLM."""

from __future__ import annotations

import types

import pytest
import torch

from logquant.integrations.vllm import guards, plugin
from logquant.integrations.vllm.layout import BlockLayout
from logquant.integrations.vllm.maps import key_map
from logquant.quantizer.calibration import Calibration
from tests.helpers.models import tiny_config


def vllm_config(**changes):
    """A configuration of vLLM as it is by default, of what is looked at; ``__`` stands for a dot."""
    config = types.SimpleNamespace(
        additional_config={},
        kv_transfer_config=None,
        speculative_config=None,
        scheduler_config=types.SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=types.SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        cache_config=types.SimpleNamespace(cache_dtype="auto"),
    )
    for name, value in changes.items():
        *owner, field = name.split("__")
        setattr(getattr(config, owner[0]) if owner else config, field, value)
    return config


def test_the_default_is_served():
    guards.check(vllm_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"speculative_config": types.SimpleNamespace(method="eagle")}, "speculative_config"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"parallel_config__use_ubatching": True}, "enable_dbo"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype fp8"),
    ],
)
def test_what_it_cannot_serve_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        guards.check(vllm_config(**changes))


def test_drafts_of_ngrams_are_served_as_many_as_there_is_room_for():
    drafting = types.SimpleNamespace(method="ngram", num_speculative_tokens=48)
    guards.check(vllm_config(speculative_config=drafting))
    guards.check_drafts(vllm_config(speculative_config=drafting), 48)
    guards.check_drafts(vllm_config(), 0)
    with pytest.raises(ValueError, match="num_speculative_tokens must be at most 47 here, got 48"):
        guards.check_drafts(vllm_config(speculative_config=drafting), 47)


def test_all_reasons_are_said_at_once():
    changes = {"kv_transfer_config": object(), "cache_config__cache_dtype": "fp8"}
    with pytest.raises(ValueError, match=r"kv_transfer_config.*kv_cache_dtype"):
        guards.check(vllm_config(**changes))


@pytest.mark.parametrize("options", [{"window": 64}, {"rule": "log"}, ["calibration"]])
def test_unknown_settings_are_refused(options):
    with pytest.raises(
        ValueError, match=r"additional_config\['logquant'\] must be (a dict|among calibration, .*)[,;] got"
    ):
        guards.config_of(vllm_config(additional_config={"logquant": options}))


def test_a_bad_value_is_named():
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8, got 3"):
        guards.config_of(vllm_config(additional_config={"logquant": {"bits": 3}}))


@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (128, 4), (128, 8)])
def test_five_pages_of_the_default_fill_a_block_of_bfloat16(head_dim, group):
    layout = BlockLayout.of(guards.config_of(vllm_config()), head_dim, group, torch.bfloat16)
    assert layout.pages == 5 and layout.tokens == 320 and layout.queries >= 8


def test_other_bits_have_the_usual_pages():
    config = guards.config_of(vllm_config(additional_config={"logquant": {"bits": 4}}))
    assert (config.value_bits, config.fine_values, config.key_columns) == (4, 0, 1.0)


# ----------------------------------------------------------------------------------------------------- calibration
def calibration(config, path, layers: int) -> str:
    heads, dim = config.num_key_value_heads, config.head_dim
    from logquant.files import fingerprint

    Calibration({i: torch.rand(heads, dim) for i in range(layers)}, fingerprint(config), 100).save(path)
    return str(path)


def settings(path: str | None):
    return guards.config_of(vllm_config(additional_config={"logquant": {} if path is None else {"calibration": path}}))


def test_without_a_calibration_the_command_that_makes_one_is_named():
    config = settings(None)
    with pytest.raises(ValueError, match=r"logquant calibrate TEXT1 TEXT2 --model .* --output calibration.safetensors"):
        key_map(config, tiny_config(), 0, config.page_format(64), 2)


def test_the_map_is_that_of_the_calibration(tmp_path):
    model = tiny_config()
    config = settings(calibration(model, tmp_path / "c.safetensors", 2))
    fmt = config.page_format(model.head_dim)
    found = key_map(config, model, 1, fmt, model.num_key_value_heads)
    assert torch.equal(found, Calibration.load(config.calibration).key_map(1, fmt, len(found[0]), torch.device("cpu")))


def test_a_calibration_of_another_model_is_refused(tmp_path):
    model = tiny_config()
    config = settings(calibration(model, tmp_path / "c.safetensors", 2))
    other = tiny_config(rms_norm_eps=0.5)
    with pytest.raises(ValueError, match="calibration was made for another model"):
        key_map(config, other, 0, config.page_format(model.head_dim), model.num_key_value_heads)


def test_a_calibration_that_lacks_a_layer_is_refused(tmp_path):
    model = tiny_config()
    config = settings(calibration(model, tmp_path / "c.safetensors", 1))
    with pytest.raises(ValueError, match=r"lacks \[1\]"):
        key_map(config, model, 1, config.page_format(model.head_dim), model.num_key_value_heads)


def test_a_missing_file_is_named(tmp_path):
    config = settings(str(tmp_path / "none.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        key_map(config, tiny_config(), 0, config.page_format(64), 2)


def test_no_calibration_is_needed_where_all_channels_have_the_same_bits():
    config = guards.config_of(vllm_config(additional_config={"logquant": {"key_columns": 1}}))
    assert key_map(config, tiny_config(), 0, config.page_format(64), 2) is None


# --------------------------------------------------------------------------------------------------------- versions
@pytest.mark.parametrize(
    ("version", "works"), [("0.32.0", True), ("0.32.1+cpu", True), ("0.33.0", False), ("dev", False)]
)
def test_versions(version, works):
    reason = plugin.unsupported(version)
    assert (reason is None) is works
    if reason:
        assert version in reason and "0.32" in reason


def test_nothing_of_it_is_loaded_by_logquant_and_nothing_of_vllm_by_it():
    import subprocess
    import sys

    code = """
import sys, logquant, logquant.cli
assert not [name for name in sys.modules if name.startswith('logquant.integrations.vllm')]
import logquant.integrations.vllm, logquant.integrations.vllm.attention, logquant.integrations.vllm.maps
assert 'vllm' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
