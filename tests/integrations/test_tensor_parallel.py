"""Tensor parallelism: two processes on the CPU, each with its own heads' cache, give the tokens of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
folder, bits, rank = sys.argv[1], json.loads(sys.argv[2]), os.environ.get("RANK")
parallel = {} if rank is None else {"distributed_config": DistributedConfig(tp_plan="auto")}
model = AutoModelForCausalLM.from_pretrained(folder, **parallel)
model.set_attn_implementation("logquant")
ids = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(0))
mask = pad_mask([300, 170], "left")
settings = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_scores=True)
found = {}
for rule in bits:
    cache = LogQuantCache(model.config, rule=rule, bits=bits[rule])
    out = model.generate(ids, attention_mask=mask, **as_argument(cache), **settings)
    found[rule] = {"tokens": out.sequences[:, 300:].tolist(), "second": out.scores[1].tolist()}
    found[rule] |= {"heads": cache.layers[0].held.storage.pages.shape[1], "nbytes": cache.nbytes}
with open(f"{folder}/result-{rank}.json", "w") as file:
    json.dump(found, file)
"""


# Under ``attention`` each process chooses by its own heads, so later tokens may be others; 8 bits keep scores close.
BITS = {"log": 2, "recent": 2, "attention": 8}


def run(folder: Path, *launcher: str) -> None:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(program), str(folder), json.dumps(BITS)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """By rule, what a process found alone, and what each of two found."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    tiny_model().save_pretrained(folder)
    run(folder)
    run(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (None, 0, 1)]


def test_two_processes_give_the_tokens_of_one(results):
    for rule in BITS:
        alone, *ranks = (result[rule] for result in results)
        assert alone["heads"] == 2 and [rank["heads"] for rank in ranks] == [1, 1]
        assert ranks[0]["tokens"] == ranks[1]["tokens"]
        if rule != "attention":
            assert ranks[0]["tokens"] == alone["tokens"], rule
        # The first token attends to exact ones alone; the second, after the same first, reads pages.
        assert [row[0] for row in ranks[0]["tokens"]] == [row[0] for row in alone["tokens"]]
        got, want = torch.tensor(ranks[0]["second"]), torch.tensor(alone["second"])
        assert ((got - want).norm(dim=1) < 0.01 * want.norm(dim=1)).all()
        # Each holds half of the pages and windows, and all of the positions.
        assert all(0.45 < rank["nbytes"] / alone["nbytes"] < 0.55 for rank in ranks)
