"""The README's examples, as they stand there, and the public names."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import logquant

ROOT = Path(__file__).parents[1]


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.usefixtures("one_thread")
def test_examples_run_without_a_warning(model_dir, monkeypatch):
    """One after the other, in one namespace, with a small model in the place of the one that they name."""
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        load = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda name, load=load: load(model_dir))
    found: dict = {}
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("error", FutureWarning)
        for example in examples():
            exec(example, found)
        found["model"].generate(**found["inputs"], max_new_tokens=3)
    cache = found["cache"]
    assert isinstance(cache, logquant.LogQuantCache) and cache.get_seq_length() == found["output"].shape[1] - 1
    assert cache.nbytes < cache.full_precision_nbytes
    assert f"{cache.nbytes:,} bytes instead of {cache.full_precision_nbytes:,}" in printed.getvalue()
    assert hasattr(found["model"], "_logquant_enabled")


def test_public_names_are_there_and_import_nothing_before_they_are_used():
    script = """
import sys, logquant
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
assert set(logquant.__all__) <= set(dir(logquant))
names = {name: getattr(logquant, name) for name in logquant.__all__}
from logquant import *
assert all(globals()[name] is value for name, value in names.items())
assert LogQuantConfig(bits=4).bits == 4 and PageFormat(64).head_dim == 64 and callable(enable)
try:
    logquant.nothing
except AttributeError as error:
    assert "has no attribute 'nothing'" in str(error)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
