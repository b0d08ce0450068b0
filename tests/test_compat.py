"""What logquant needs of torch and transformers: the binary's symbols, and versions that are refused."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from logquant import _C, compat

ROOT = Path(__file__).parents[1]

# What came to torch's C interface with 2.10 and 2.11, and is called. Before adding to it, look up when torch got it.
SINCE_2_10 = {
    "torch_call_dispatcher",
    "torch_delete_list",
    "torch_get_const_data_ptr",
    "torch_library_impl",
    "torch_list_get_item",
    "torch_list_push_back",
    "torch_list_size",
    "torch_new_list_reserve_size",
    "torch_parallel_for",
}
SINCE_2_11 = {"torch_dtype_float4_e2m1fn_x2", "torch_dtype_float8_e8m0fnu"}


def undefined_symbols() -> list[str]:
    command = ["nm", "--dynamic", "--undefined-only", "--format=posix", _C.__file__]
    return [line.split()[0].split("@")[0] for line in subprocess.check_output(command, text=True).splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_the_binary_calls_nothing_that_torch_2_11_lacks():
    symbols = undefined_symbols()
    assert {name for name in symbols if name.startswith("torch_")} <= SINCE_2_10 | SINCE_2_11
    assert "aoti_torch_library_def" in symbols
    # torch's C++ interface is not stable.
    assert not [name for name in symbols if re.match(r"_ZNK?(2at|3c10|5torch)\d", name)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_the_current_stream_is_found_where_torch_has_cuda():
    library = ctypes.CDLL(_C.__file__)  # looks into everything that the binary needs, as its weak symbols do
    assert hasattr(library, "aoti_torch_get_current_stream")
    assert hasattr(library, "aoti_torch_get_current_cuda_stream") == (torch.version.cuda is not None)


@pytest.mark.parametrize("version", ["5.17.0", "5.17.1.dev0", "5.18", "6.0.0rc1"])
def test_transformers_from_the_oldest_on_are_accepted(version):
    compat.check_version(version)


@pytest.mark.parametrize("version", ["4.57.3", "5.0.0", "5.9.1", "5.16.1"])
def test_an_older_transformers_is_refused_by_name(version):
    with pytest.raises(ImportError, match=rf"needs transformers 5\.17 or newer, found {re.escape(version)}"):
        compat.check_version(version)


def test_the_name_of_the_argument_is_the_one_that_transformers_has():
    """It is chosen by the version."""
    outputs = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
    assert compat.CACHE in outputs and len({"cache", "past_key_values"} & outputs) == 1
    assert compat.as_argument("it") == {compat.CACHE: "it"}


def test_compat_does_not_import_generation():
    """It would take seconds; what needs it is imported with a model."""
    script = (
        "import sys, logquant.compat; assert not [m for m in sys.modules if m.startswith('transformers.generation')]"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_whatever_needs_transformers_refuses_an_older_one():
    script = """
import importlib, transformers
transformers.__version__ = "5.16.1"
import logquant, logquant.ops, logquant.quantizer.columns
logquant.LogQuantConfig(), logquant.PageFormat(128)
for name in ("cache.layer", "attention.forward", "methods.kivi", "integrations.transformers", "eval", "plan"):
    try:
        importlib.import_module("logquant." + name)
    except ImportError as error:
        assert "found 5.16.1" in str(error), error
    else:
        raise AssertionError(name)
for name in ("LogQuantCache", "enable", "disable"):
    try:
        getattr(logquant, name)
    except ImportError as error:
        assert "found 5.16.1" in str(error), error
    else:
        raise AssertionError(name)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_package_asks_for_the_same_versions():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'"transformers>=([\d.]+)"', text) == [compat.OLDEST]
    assert set(re.findall(r'"torch>=([\d.]+)"', text)) == {"2.11"}
    assert "TORCH_TARGET_VERSION = 0x020B000000000000" in (ROOT / "setup.py").read_text()
