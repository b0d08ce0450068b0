"""What LogQuant's cache costs in vLLM: the whole of SmolLM2 on a book, against vLLM's own cache."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm")


def test_kl_to_vllms_own_cache(data_dir, smollm2, smollm2_tokenizer, tmp_path):
    """In float32: bfloat16 takes twice as long where processors lack its instructions, and two ways to compute the same
    attention are then 0.0007 apart. In small chunks: however a text is cut, pages and what queries see are the same
    (test_pool.py)."""
    import torch

    from logquant.quantizer.calibrate import calibrate

    texts = ["books/frankenstein_84.txt", "code_long/attrs_validators.py.txt"]
    ids = [smollm2_tokenizer((data_dir / "dev" / text).read_text())["input_ids"][:2048] for text in texts]
    file = tmp_path / "calibration.safetensors"
    calibrate(smollm2, map(torch.tensor, ids)).save(file)
    book = data_dir / "dev/books/pride_and_prejudice_1342.txt"
    command = [sys.executable, "-m", "benchmarks.vllm_kl", str(book), "--calibration", str(file)]
    command += ["--chunks", "64", "--dtype", "float32"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (kl,) = re.findall(r"chunks of 64: KL (\S+) over 2,000 positions", done.stdout)
    assert 0.001 < float(kl) <= 0.0035
