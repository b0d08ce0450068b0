"""The machine code of the CUDA kernels, without a GPU: ``python -m tests.helpers.cubins [ARCH ...]``.

What setup.py has compiled for an architecture is read from its objects. Otherwise each source becomes a cubin for each
architecture in build/cubins. Beside either lies what ptxas says of registers and spills.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import ninja

from tests.helpers.cuda_sources import sources
from tests.helpers.locks import locked

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cubins"
EXTENSION = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"  # see setup.py
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
FLAGS = ["-std=c++20", "-O3", "-cubin", "-Xptxas", "-v"]


def nvcc() -> str | None:
    home = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))[::-1]]
    places = [shutil.which("nvcc"), *(f"{place}/bin/nvcc" for place in home if place)]
    return next((place for place in places if place and Path(place).exists()), None)


def in_extension(arch: str) -> bool:
    """Whether setup.py compiles for this architecture."""
    rules = EXTENSION / "cuda.ninja"
    return rules.exists() and f"code=sm_{arch} " in rules.read_text().replace("\n", " ")


def path(name: str, arch: str) -> Path:
    """The object or cubin that holds a source's machine code for an architecture."""
    return EXTENSION / f"{name}.cu.o" if in_extension(arch) else BUILD / f"{name}.{arch}.cubin"


def build(names: list[str], architectures: list[str]) -> None:
    """Compile, where something changed, with two jobs."""
    targets = [path(name, arch).name for name in names for arch in architectures if in_extension(arch)]
    if targets:
        run_ninja(EXTENSION, "cuda.ninja", sorted(set(targets)))
    own = [arch for arch in architectures if not in_extension(arch)]
    if not own:
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule cubin",
        f"  command = {nvcc()} {' '.join(FLAGS)} $flags -arch=sm_$arch -MD -MF $out.d $in -o $out > $out.log 2>&1 "
        "|| (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for arch in ARCHITECTURES:
        for name, (source, flags) in sources().items():
            lines += [f"build {name}.{arch}.cubin: cubin {source}", f"  arch = {arch}", f"  flags = {' '.join(flags)}"]
    with locked(BUILD):
        (BUILD / "build.ninja").write_text("\n".join([*lines, ""]))
    run_ninja(BUILD, "build.ninja", [f"{name}.{arch}.cubin" for name in names for arch in own])


def run_ninja(directory: Path, rules: str, targets: list[str]) -> None:
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", directory, "-f", rules, "-j2", *targets]
    with locked(directory):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the CUDA kernels do not compile:\n{result.stdout[-4000:]}")


@dataclass(frozen=True)
class Usage:
    kernel: str  # mangled
    registers: int
    spilled: int  # bytes stored


def usage(name: str, arch: str) -> list[Usage]:
    """What ptxas reported of the kernels of one source."""
    text = Path(f"{path(name, arch)}.log").read_text()
    pattern = rf"entry function '(\w+)' for 'sm_{arch}'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return [Usage(m[1], int(m[3]), int(m[2])) for m in re.finditer(pattern, text, re.DOTALL)]


if __name__ == "__main__":
    architectures = sys.argv[1:] or list(ARCHITECTURES)
    build(list(sources()), architectures)
    for architecture in architectures:
        for name in sources():
            for kernel in usage(name, architecture):
                print(f"sm_{architecture} {kernel.registers:4} registers {kernel.spilled:4} spilled  {kernel.kernel}")
