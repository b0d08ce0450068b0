"""Builds logquant._C: the operators and the kernels of every instruction set, in one shared object.

setuptools compiles each source once with one set of flags; the CPU kernels need one object per instruction set. So the
table of objects goes to ninja, which also makes rebuilds incremental.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# The oldest torch whose stable ABI the operators use; the binary works with every later one.
TORCH_TARGET_VERSION = 0x020D000000000000  # 2.13

FLAGS = [
    "-std=c++20",
    "-O3",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-fno-math-errno",
    "-fno-trapping-math",
    # The quantiser is bit-exact across instruction sets, and a contracted multiply-add would not be.
    "-ffp-contract=off",
]
# For `make sanitize`: LOGQUANT_SANITIZE=address,undefined or thread.
SANITIZE = [f"-fsanitize={kinds}" for kinds in filter(None, [os.environ.get("LOGQUANT_SANITIZE")])]
if SANITIZE:
    FLAGS += [*SANITIZE, "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
KERNELS = ["quantize", "dequantize", "evict", "attend"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = AVX2
    INSTRUCTION_SETS["avx512"] = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni"))]
    # gcc's own AVX-512 headers warn.
    INSTRUCTION_SETS["avx512"] += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]


class NinjaBuild(build_ext):
    """Compiles and links with ninja."""

    def build_extension(self, extension: Extension) -> None:
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        # -isystem keeps the warnings of others' headers out.
        include = [f"-isystem{path}" for path in [*cpp_extension.include_paths(), pybind11.get_include()]]
        python = [f"-isystem{path}" for path in self.include_dirs]
        binding_flags = [*include, *python, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION:#x}"]
        binding_flags.append(f'-DLOGQUANT_VERSION=\\"{self.distribution.get_version()}\\"')
        objects = {
            "ops.o": (CSRC / "ops.cpp", binding_flags),
            "module.o": (CSRC / "module.cpp", binding_flags),
            "dispatch.o": (CSRC / "cpu" / "dispatch.cpp", []),
        }
        for isa, isa_flags in INSTRUCTION_SETS.items():
            for kernel in KERNELS:
                source = CSRC / "cpu" / f"{kernel}.cpp"
                objects[f"{kernel}.{isa}.o"] = (source, [f"-DLOGQUANT_ISA={isa}", *isa_flags])

        libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        compiler = (self.compiler.compiler_cxx or ["c++"])[0]
        (build_dir / "build.ninja").write_text(ninja_file(compiler, objects, target, libraries))
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build_dir, *jobs], check=True)


def ninja_file(compiler: str, objects: dict[str, tuple[Path, list[str]]], target: Path, libraries: list[str]) -> str:
    """The build as ninja reads it: each object with its source and its own flags, then the shared object."""
    link_flags = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--exclude-libs,ALL"]
    link_flags += SANITIZE
    lines = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {' '.join(FLAGS)} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in {' '.join([*link_flags, *libraries])} -o $out",
    ]
    for name, (source, flags) in objects.items():
        lines += [f"build {name}: compile {escape(source)}", f"  flags = {' '.join(flags)}"]
    lines += [f"build {escape(target)}: link {' '.join(objects)}", f"default {escape(target)}", ""]
    return "\n".join(lines)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=[Extension("logquant._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
