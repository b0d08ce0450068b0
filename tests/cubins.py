"""Compiles csrc/cuda/*.cu for GPUs, without one: ``python -m tests.cubins [ARCH ...]``.

Each source becomes a cubin for each architecture in build/cubins, and beside it what ptxas says of registers and
spills.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import ninja

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cubins"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
FLAGS = ["-std=c++20", "-O3", "-cubin", "-Xptxas", "-v"]


def nvcc() -> str | None:
    home = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))[::-1]]
    places = [shutil.which("nvcc"), *(f"{place}/bin/nvcc" for place in home if place)]
    return next((place for place in places if place and Path(place).exists()), None)


def build(sources: list[str], architectures: list[str]) -> None:
    """Compile, where something changed, with two jobs."""
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule cubin",
        f"  command = {nvcc()} {' '.join(FLAGS)} -arch=sm_$arch -MD -MF $out.d $in -o $out > $out.log 2>&1 "
        "|| (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for arch in architectures:
        for name in sources:
            lines += [f"build {name}.{arch}.cubin: cubin {SOURCES / name}.cu", f"  arch = {arch}"]
    (BUILD / "build.ninja").write_text("\n".join([*lines, ""]))
    result = subprocess.run(
        [Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "-j2"], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"the CUDA kernels do not compile:\n{result.stdout[-4000:]}")


@dataclass(frozen=True)
class Usage:
    kernel: str  # mangled
    registers: int
    spilled: int  # bytes stored


def usage(name: str, arch: str) -> list[Usage]:
    """What ptxas reported of the kernels of one source."""
    text = (BUILD / f"{name}.{arch}.cubin.log").read_text()
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return [Usage(m[1], int(m[3]), int(m[2])) for m in re.finditer(pattern, text, re.DOTALL)]


def all_sources() -> list[str]:
    return [path.stem for path in sorted(SOURCES.glob("*.cu"))]


if __name__ == "__main__":
    architectures = sys.argv[1:] or list(ARCHITECTURES)
    build(all_sources(), architectures)
    for architecture in architectures:
        for source in all_sources():
            for kernel in usage(source, architecture):
                print(f"sm_{architecture} {kernel.registers:4} registers {kernel.spilled:4} spilled  {kernel.kernel}")
