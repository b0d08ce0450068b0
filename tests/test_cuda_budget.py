"""Registers, spills, shared memory and instructions of the CUDA kernels, from what the compiler made of them."""

from __future__ import annotations

import re

import pytest

from tests import cubins, sass

if cubins.nvcc() is None:
    pytest.skip("needs nvcc", allow_module_level=True)

# Registers that the occupancy written beside each kernel allows.
REGISTERS = {"quantize": 64, "evict": 64, "dequantize": 64, "attend": 48, "attend_general": 128}
# Warp instructions of the page loop a cached token and KV head, for up to 8 query rows: fp16 and bf16 models.
INSTRUCTIONS = {
    "attend_d64": (6.0, 5.7),
    "attend_d64_c80": (7.5, 7.0),
    "attend_d128": (9.7, 9.2),
    "attend_d128_c160": (12.0, 11.2),
    "attend_d256": (18.0, 17.0),
    "attend_d256_c320": (22.0, 20.5),
}
PAGE_TOKENS = 64


@pytest.mark.parametrize("name", REGISTERS)
@pytest.mark.parametrize("arch", ["80", "90"])
def test_registers(name, arch):
    cubins.build([name], [arch])
    kernels = cubins.usage(name, arch)
    assert kernels
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= REGISTERS[name], kernel


@pytest.mark.parametrize("name", ["attend_d64", "attend_d128"])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_attend_for_8_rows_does_not_spill(name, arch):
    cubins.build([name], [arch])
    kernels = [kernel for kernel in cubins.usage(name, arch) if "Li1EEE" in kernel.kernel]
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= 168, kernel


@pytest.mark.skipif(sass.cuobjdump() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("name", INSTRUCTIONS)
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_instructions_of_the_page_loop(name, arch):
    cubins.build([name], [arch])
    counts = {}
    for kernel, code in sass.functions(cubins.BUILD / f"{name}.{arch}.cubin").items():
        path = [x.opcode for x in sass.page_loop(code)]
        dtype, tiles = "bf16" if "bfloat16" in kernel else "f16", int(re.search(r"Li(\d)EEEv", kernel)[1])
        counts[dtype, tiles] = len(path) / PAGE_TOKENS
        for opcode in ("HMMA", "LDGSTS", "MOVM"):
            assert any(x.startswith(opcode) for x in path), (kernel, opcode)
    for dtype, most in zip(("f16", "bf16"), INSTRUCTIONS[name], strict=True):
        assert counts[dtype, 1] <= most, counts
        assert counts.get((dtype, 2), 0) <= 1.6 * counts[dtype, 1], counts
