"""Registers, spills, shared memory and instructions of the CUDA kernels, from what the compiler made of them.

The budgets stand beside the kernels (csrc/cuda). The slow tests look at Hopper, and at two kernels on the oldest and
the newest architecture; the quick ones at the kernels of one format on Hopper.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.helpers import cubins, emulated, sass
from tests.helpers.cuda_sources import formats, sources
from tests.helpers.problems import problem_of

if cubins.nvcc() is None:
    pytest.skip("needs nvcc", allow_module_level=True)
needs_cuobjdump = pytest.mark.skipif(sass.cuobjdump() is None, reason="needs cuobjdump")

# Registers that the occupancy written beside each kernel allows; of the others, 255.
REGISTERS = {
    "append": 40,
    "choose_leaving": 40,
    "quantize": 64,
    "evict": 64,
    "dequantize": 64,
    "attend": 48,
    "attend_general": 128,
    "page_scores": 64,
}
# Warp instructions of the page loop a cached token and KV head: fp16 and bf16 models with up to 8 query rows, then with
# 9 to 16 (of both warps, where two share a page). GOALS: 8 rows of plain formats by head dim; 16 rows may take 1.6
# times as much, 1.25 key columns a channel 1.25 times.
GOALS = {64: 6.0, 128: 10.0, 256: 20.0}
INSTRUCTIONS = {
    "attend_d64": (5.7, 5.4, 8.1, 7.5),
    "attend_d64_c80": (7.4, 7.2, 9.9, 9.5),
    "attend_d64_c80_f4": (7.5, 7.4, 10.1, 9.7),
    "attend_d64_c96_f8": (7.9, 7.7, 10.5, 10.1),
    "attend_d128": (9.7, 9.2, 14.0, 13.0),
    "attend_d128_c160": (12.0, 11.6, 16.2, 15.4),
    "attend_d128_c160_f4": (12.5, 12.1, 16.6, 15.7),
    "attend_d128_c192_f8": (13.3, 12.8, 17.6, 16.8),
    "attend_d128_c224_f8": (14.1, 13.9, 18.9, 18.0),
    "attend_d192": (14.0, 13.3, 25.0, 17.2),
    "attend_d192_c240": (17.8, 17.1, 31.4, 30.1),
    "attend_d256": (17.5, 16.5, 31.0, 28.2),
    "attend_d256_c320": (21.9, 21.2, 37.6, 36.2),
    "attend_d256_c384_f8": (23.9, 23.1, 41.2, 39.7),
}
PAGE_TOKENS = 64
# An H100: 3.35 TB/s, 800 ns, 132 SMs, 65536 registers and 227 KB of shared memory each.
BYTES_TO_HIDE_LATENCY = 3.35e12 * 800e-9 / 132
SHORT = {"attend_d80": 1.8, "attend_d80_c96": 1.79, "attend_d64_c80": 1.9, "attend_d64_c64": 1.76}
SM_REGISTERS, SM_SHARED = 65536, 227 << 10

# Machine code for the oldest and the newest differs little from that for 90.
OTHERS = ["quantize", "attend_d128"]
cheap = ["append", "choose_leaving", "quantize", "evict", "dequantize", "attend", "attend_d128"]
quick = [pytest.param(name, "90", id=f"{name}-90") for name in cheap]
thorough = [
    pytest.param(name, arch, id=f"{name}-{arch}", marks=pytest.mark.slow)
    for name in sources()
    for arch in ("80", "90", "120")
    if (name not in cheap if arch == "90" else name in OTHERS)
]


@pytest.mark.parametrize(("name", "arch"), quick + thorough)
def test_registers(name, arch):
    # All at once: who compiles holds a lock, and other processes would wait for each.
    cubins.build([name] if arch == "90" else OTHERS, [arch])
    for kernel in cubins.usage(name, arch):
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= REGISTERS.get(name, 255), kernel


@needs_cuobjdump
@pytest.mark.parametrize(
    ("name", "arch"), [x for x in quick + thorough if x.values[0] in INSTRUCTIONS and x.values[1] != "120"]
)
def test_instructions_of_the_page_loop(name, arch):
    cubins.build([name], [arch])
    counts, in_one_warp = {}, set()
    for kernel, code in sass.functions(cubins.path(name, arch), arch).items():
        path = [x.opcode for x in sass.page_loop(code)]
        key = sass.tiles(kernel), "bf16" if "bfloat16" in kernel else "f16"
        counts[key] = sass.warps(kernel) * len(path) / PAGE_TOKENS
        for opcode in ("HMMA", "LDGSTS", "MOVM"):
            assert any(x.startswith(opcode) for x in path), (kernel, opcode)
        if sass.warps(kernel) == 1:
            in_one_warp.add(key)
    for key, most in zip(product((1, 2), ("f16", "bf16")), INSTRUCTIONS[name], strict=True):
        assert counts[key] <= most, counts
    for tiles, dtype in in_one_warp:
        assert counts[tiles, dtype] <= 1.6 * counts[1, dtype], counts


def test_the_budgets_are_within_the_goals():
    for name, budget in INSTRUCTIONS.items():
        fmt = formats()[name.removeprefix("attend_")]
        if goal := GOALS.get(fmt.head_dim):
            goal *= fmt.key_columns / fmt.head_dim
            assert max(budget[:2]) <= goal
            assert max(budget[2:]) <= 1.6 * goal


@pytest.mark.parametrize(
    "name", [pytest.param(f"attend_{name}", marks=[] if name == "d128" else pytest.mark.slow) for name in formats()]
)
def test_bytes_in_flight_hide_the_latency_of_memory(name):
    """On Hopper, warps x stages x page is at least twice latency times bandwidth.

    While a warp works on a page, only the other page of its ring is on its way: those alone are twice as much, too, but
    for the formats of SHORT.
    """
    fmt = formats()[name.removeprefix("attend_")]
    problem = problem_of(fmt, torch.float16, heads=1)
    emulated.counters()
    problem.run("emulated")
    shared = emulated.counters()["shared_bytes"]
    cubins.build([name], ["90"])
    registers = max(kernel.registers for kernel in cubins.usage(name, "90") if sass.tiles(kernel.kernel) == 1)
    threads, stages = 128, 2
    blocks = min(SM_REGISTERS // (threads * ((registers + 7) // 8 * 8)), SM_SHARED // (shared + 1024))
    on_their_way = blocks * (threads // 32) * 4 * fmt.words / BYTES_TO_HIDE_LATENCY
    assert stages * on_their_way >= 2, (registers, shared, blocks)
    assert on_their_way >= SHORT.get(name, 2), (registers, shared, blocks)
