"""Tensor parallelism: two processes on the CPU, each with its own heads' cache, give the tokens of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.models import tiny_model

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, os, sys, torch
from transformers import AutoModelForCausalLM, DistributedConfig
from logquant import LogQuantCache
from logquant.compat import as_argument
from tests.helpers.masks import pad_mask

torch.set_num_threads(1)
folder, rule, bits, rank = *sys.argv[1:], os.environ.get("RANK")
parallel = {} if rank is None else {"distributed_config": DistributedConfig(tp_plan="auto")}
model = AutoModelForCausalLM.from_pretrained(folder, **parallel)
model.set_attn_implementation("logquant")
ids = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(0))
mask = pad_mask([300, 170], "left")
cache = LogQuantCache(model.config, rule=rule, bits=int(bits))
settings = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_scores=True)
out = model.generate(ids, attention_mask=mask, **as_argument(cache), **settings)
found = {"tokens": out.sequences[:, 300:].tolist(), "second": out.scores[1].tolist()}
found |= {"heads": cache.layers[0].held.storage.pages.shape[1], "nbytes": cache.nbytes}
with open(f"{folder}/result-{rank}.json", "w") as file:
    json.dump(found, file)
"""


def run(folder: Path, rule: str, bits: int, *launcher: str) -> None:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(program), str(folder), rule, str(bits)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tensor_parallel")
    tiny_model().save_pretrained(path)
    return path


@pytest.mark.parametrize("rule", ["log", "recent", "attention"])
def test_two_processes_give_the_tokens_of_one(folder, rule):
    """Under ``attention`` each chooses by its own heads, so later tokens may be others; 8 bits keep scores close."""
    bits = 8 if rule == "attention" else 2
    run(folder, rule, bits)
    run(folder, rule, bits, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    alone, *ranks = (json.loads((folder / f"result-{rank}.json").read_text()) for rank in (None, 0, 1))
    assert alone["heads"] == 2 and [rank["heads"] for rank in ranks] == [1, 1]
    assert ranks[0]["tokens"] == ranks[1]["tokens"]
    if rule != "attention":
        assert ranks[0]["tokens"] == alone["tokens"]
    # The first token attends to exact ones alone; the second, after the same first, reads pages.
    assert [row[0] for row in ranks[0]["tokens"]] == [row[0] for row in alone["tokens"]]
    got, want = torch.tensor(ranks[0]["second"]), torch.tensor(alone["second"])
    assert ((got - want).norm(dim=1) < 0.01 * want.norm(dim=1)).all()
    # Each holds half of the pages and windows, and all of the positions.
    assert all(0.45 < rank["nbytes"] / alone["nbytes"] < 0.55 for rank in ranks)
