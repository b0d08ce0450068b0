"""Page stores in files (``page_directory``): the same pages, in less memory than they take."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from logquant import LogQuantCache
from logquant.cache import mapped
from logquant.compat import as_argument
from logquant.rule import RULES
from tests.helpers.layers import contents
from tests.helpers.models import generate, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    made = tiny_model()
    made.set_attn_implementation("logquant")
    return made


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 500), generator=torch.Generator().manual_seed(0))


def is_mapped(cache: LogQuantCache) -> bool:
    """Whether the page stores of all layers are in files, as the process's memory map has it."""
    places = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if " rw-s " in line
    ]
    stores = [layer.held.storage.pages.data_ptr() for layer in cache.layers]
    return all(any(first <= store < last for first, last in places) for store in stores)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.parametrize("options", [*({"rule": rule} for rule in RULES), {"recall": "both(pages=0.25)"}], ids=str)
def test_it_holds_and_writes_what_a_cache_in_memory_does(model, ids, tmp_path, options):
    plain, cache = (LogQuantCache(model.config, **options, page_directory=d) for d in (None, tmp_path))
    outs = [generate(model, ids[:, :300], each, max_new_tokens=150) for each in (plain, cache)]
    assert torch.equal(*outs) and is_mapped(cache) and not is_mapped(plain)
    assert cache.nbytes == plain.nbytes and list(tmp_path.iterdir()) == [], "files have no name"
    twin = copy.deepcopy(cache)
    for each in (plain, cache, twin):
        each.crop(-330)
        with torch.no_grad():
            model(ids[:, 200:], **as_argument(each))
    for one, other, third in zip(plain.layers, cache.layers, twin.layers, strict=True):
        for a, b, c in zip(contents(one), contents(other), contents(third), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
    assert is_mapped(cache) and is_mapped(twin)


PROGRAM = """
import hashlib, json, resource, sys, torch
from logquant import LogQuantCache
from tests.helpers.models import tiny_config

torch.set_num_threads(1)
directory, spare = json.loads(sys.argv[1]), int(sys.argv[2])
heads, dim = 16, 128
config = tiny_config(num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads, head_dim=dim)
cache = LogQuantCache(config, bits=8, rule="recent", param_bits=16, page_directory=directory)
random = torch.Generator().manual_seed(0)


def come(count):
    k, v, q = (torch.randn(1, heads, count, dim, generator=random) for _ in range(3))
    keys, values = cache.update(k, v, 0)
    if count == 1:
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    keys.kv_view.observe(None)


with torch.no_grad():
    come(512)
    come(1)
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    if spare:
        resource.setrlimit(resource.RLIMIT_DATA, (used + spare, used + spare))
    for _ in range(40):
        come(512)
    out = torch.cat([come(1) for _ in range(80)])
digest = hashlib.sha256(out.numpy().tobytes()).hexdigest()
print(json.dumps({"digest": digest, "pages": cache.layers[0].held.storage.pages.nbytes}))
"""


def run(directory: Path | None, spare: int) -> subprocess.CompletedProcess[str]:
    name = json.dumps(directory and str(directory))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, name, str(spare)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@linux
def test_pages_may_be_more_than_the_process_may_have_in_memory(tmp_path):
    """With a limit on its data a cache in memory ends with an error; one in files gives what it gives without."""
    spare = 48 << 20
    free, bound, in_files = run(None, 0), run(None, spare), run(tmp_path, spare)
    assert free.returncode == 0, free.stderr[-2000:]
    assert bound.returncode != 0 and "can't allocate memory" in bound.stderr
    assert in_files.returncode == 0, in_files.stderr[-2000:]
    want, got = (json.loads(each.stdout) for each in (free, in_files))
    assert got == want and got["pages"] > spare


def test_what_does_not_go_with_it_is_named(model, tmp_path):
    for options, name in (({"max_length": 500}, "max_length"), ({"evict": "corm", "window": 128}, "evict")):
        rule = {"rule": "recent"} if name == "evict" else {}
        with pytest.raises(ValueError, match=f"{name} does not go with page_directory"):
            LogQuantCache(model.config, **options, **rule, page_directory=tmp_path)
    with pytest.raises(NotADirectoryError, match=r"page_directory must be a directory, got .*nowhere"):
        LogQuantCache(model.config, page_directory=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="page_directory is for caches on the CPU, got tokens on meta"):
        mapped.MappedAllocator([], tmp_path).pages(torch.empty(0, device="meta"), (1,))


def test_a_full_disk_is_an_error_that_leaves_the_cache_as_it_was(model, ids, tmp_path, monkeypatch):
    cache, plain = (LogQuantCache(model.config, page_directory=d) for d in (tmp_path, None))
    for each in (cache, plain):
        with torch.no_grad():
            model(ids[:, :100], **as_argument(each))

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mapped, "_take_space", full)
        with torch.no_grad(), pytest.raises(OSError, match=r"page_directory .* must have room for .* more bytes"):
            model(ids[:, 100:400], **as_argument(cache))
    cache.rewind()
    outs = []
    for each in (cache, plain):
        with torch.no_grad():
            outs.append(model(ids[:, 100:400], **as_argument(each)).logits)
    assert torch.equal(*outs)
