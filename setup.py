"""Builds logquant._C: the operators and the kernels of every instruction set, in one shared object.

CUDA kernels are built where a CUDA build of torch and a toolkit are found. LOGQUANT_CUDA=0 leaves them out and
LOGQUANT_CUDA=1 insists on them, also with a CPU build of torch; TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX") chooses their
architectures. No GPU is needed to build.

setuptools compiles each source once with one set of flags; the CPU kernels need one object per instruction set. So the
table of objects goes to ninja, which also makes rebuilds incremental.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# The oldest torch whose stable ABI the operators use; the binary works with every later one.
TORCH_TARGET_VERSION = 0x020B000000000000  # 2.11

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
    # Every inlined function's variables have a scope of their own: watching them takes gcc minutes a kernel.
    FLAGS += ["-fno-sanitize-address-use-after-scope"]
# For `make sanitize`, too: the library of CPU kernels that CMake has built, to link instead of compiling them again.
CPU_KERNELS = os.environ.get("LOGQUANT_CPU_KERNELS")
# Those that take longest to compile first.
KERNELS = ["attend", "quantize", "evict", "dequantize", "page_scores", "choose_pages"]
ATTEND_ONLY = ["avxvnni", "amx", "avx512bf16"]  # sets that share everything else with avx2 or avx512 (csrc/cpu/tasks.h)
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = AVX2
    INSTRUCTION_SETS["avxvnni"] = [*AVX2, "-mavxvnni"]
    INSTRUCTION_SETS["avx512"] = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni"))]
    # gcc's own AVX-512 headers warn.
    INSTRUCTION_SETS["avx512"] += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    INSTRUCTION_SETS["avx512bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
    INSTRUCTION_SETS["amx"] = [*INSTRUCTION_SETS["avx512"], "-mamx-tile", "-mamx-int8"]
elif platform.machine() in ("aarch64", "arm64"):
    # gcc's scheduling before register allocation has inner loops spill and copy: a quarter to a half more instructions.
    INSTRUCTION_SETS["neon"] = ["-DLOGQUANT_NEON", "-fno-schedule-insns"]

NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Ampere, Ada, Hopper and Blackwell; whatever comes next compiles the PTX of the last.
CUDA_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"


def cuda_home() -> Path | None:
    """The toolkit to build CUDA kernels with, or None where they are not to be built."""
    wanted = os.environ.get("LOGQUANT_CUDA", "").strip()
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"LOGQUANT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0" or (wanted == "" and torch.version.cuda is None):
        return None
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parents[1], "/usr/local/cuda"]
    needed = ("bin/nvcc", "include/cuda_runtime_api.h")
    if found := [Path(home) for home in homes if home and all((Path(home) / part).exists() for part in needed)]:
        return found[0]
    if wanted == "1":
        raise SystemExit("LOGQUANT_CUDA=1 needs a CUDA toolkit: put nvcc on the PATH or set CUDA_HOME")
    print("logquant: torch has CUDA but no toolkit (nvcc) was found: building for the CPU only", file=sys.stderr)
    return None


def cuda_architectures(home: Path) -> list[str]:
    """Those asked for ("8.0", "12.0+PTX"), or of ours those that the toolkit knows."""
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        names = re.split(r"[\s;,]+", asked.strip())
        if wrong := [name for name in names if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name)]:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold numbers such as 9.0 or 9.0+PTX, got {wrong}")
        return names
    listed = subprocess.run([home / "bin" / "nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True)
    return [name for name in CUDA_ARCHITECTURES.split() if f"sm_{virtual(name)}" in listed.stdout.split()]


def virtual(architecture: str) -> str:
    return architecture.removesuffix("+PTX").replace(".", "")


def gencode(architectures: list[str]) -> list[str]:
    """nvcc's options for machine code of every architecture, and PTX where asked for."""
    flags = [f"-gencode=arch=compute_{virtual(name)},code=sm_{virtual(name)}" for name in architectures]
    ptx = [virtual(name) for name in architectures if name.endswith("+PTX")]
    return flags + [f"-gencode=arch=compute_{name},code=compute_{name}" for name in ptx]


def static_cudart(home: Path) -> Path:
    places = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    found = [place / "libcudart_static.a" for place in places if (place / "libcudart_static.a").exists()]
    if not found:
        raise SystemExit(f"the CUDA toolkit in {home} has no libcudart_static.a")
    return found[0]


class NinjaBuild(build_ext):
    """Compiles and links with ninja."""

    def objects_dir(self) -> Path:
        """Where objects are kept. An editable install would compile them in a directory that it throws away."""
        if self.editable_mode:
            return ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        return Path(self.build_temp).resolve()

    def build_extension(self, extension: Extension) -> None:
        build_dir = self.objects_dir()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        # -isystem keeps the warnings of others' headers out.
        torch_flags = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        operator_flags = [*torch_flags, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION:#x}"]
        # pybind11 comes first: torch ships one, too, which is older and refuses TORCH_TARGET_VERSION.
        module_flags = [f"-isystem{path}" for path in [pybind11.get_include(), *self.include_dirs]] + torch_flags
        module_flags.append(f'-DLOGQUANT_VERSION=\\"{self.distribution.get_version()}\\"')
        objects: dict[str, tuple[Path, list[str]]] = {
            "ops.o": (CSRC / "ops.cpp", operator_flags),
            "arguments.o": (CSRC / "arguments.cpp", operator_flags),
            "module.o": (CSRC / "module.cpp", module_flags),
        }
        archives = [escape(Path(CPU_KERNELS).resolve())] if CPU_KERNELS else []
        if not CPU_KERNELS:
            objects |= cpu_kernels()
        libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        nvcc = "nvcc"
        if home := cuda_home():
            nvcc = escape(home / "bin" / "nvcc")
            architectures = cuda_architectures(home)
            objects["ops_cuda.o"] = (CSRC / "ops_cuda.cpp", [*operator_flags, f"-isystem{home / 'include'}"])
            module_flags = [*module_flags, f'-DLOGQUANT_CUDA_ARCHITECTURES=\\"{",".join(architectures)}\\"']
            objects["module_cuda.o"] = (objects.pop("module.o")[0], module_flags)
            objects |= cuda_kernels(gencode(architectures))
            libraries += [escape(static_cudart(home)), "-ldl", "-lrt", "-lpthread"]
        compiler = (self.compiler.compiler_cxx or ["c++"])[0]
        if cache := shutil.which("ccache"):
            compiler, nvcc = f"{cache} {compiler}", f"{cache} {nvcc}"
        # Builds with CUDA kernels and without share objects; tests/helpers/cubins.py reads what is in the former.
        name = "cuda.ninja" if home else "build.ninja"
        (build_dir / name).write_text(ninja_file(compiler, nvcc, objects, archives, target, libraries))
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build_dir, "-f", name, *jobs], check=True)


def cpu_kernels() -> dict[str, tuple[Path, list[str]]]:
    """The kernels' objects, one per instruction set, each with its source and its flags."""
    objects: dict[str, tuple[Path, list[str]]] = {}
    for kernel in KERNELS:
        for isa, flags in INSTRUCTION_SETS.items():
            if kernel == "attend" or isa not in ATTEND_ONLY:
                objects[f"{kernel}.{isa}.o"] = (CSRC / "cpu" / f"{kernel}.cpp", [f"-DLOGQUANT_ISA={isa}", *flags])
    return objects | {
        f"{name}.o": (CSRC / "cpu" / f"{name}.cpp", []) for name in ("append", "choose_leaving", "dispatch")
    }


def cuda_kernels(flags: list[str]) -> dict[str, tuple[Path, list[str]]]:
    """The CUDA kernels' objects; of decoding on tensor cores, one per format (instantiations/formats.def)."""
    cuda = CSRC / "cuda"
    objects = {f"{path.stem}.cu.o": (path, flags) for path in sorted([*cuda.glob("*.cu"), *cuda.glob("tensor/*.cu")])}
    formats = (cuda / "instantiations" / "formats.def").read_text()
    for name in re.findall(r"^LOGQUANT_FORMAT\((\w+),", formats, re.MULTILINE):
        own = [*flags, f"-DLOGQUANT_FORMAT_NAME={name}"]
        objects[f"attend_{name}.cu.o"] = (cuda / "instantiations" / "attend.cu", own)
    return objects


def ninja_file(
    compiler: str,
    nvcc: str,
    objects: dict[str, tuple[Path, list[str]]],
    archives: list[str],
    target: Path,
    libraries: list[str],
) -> str:
    """The build as ninja reads it: each object with its source and its own flags, then the shared object."""
    # libtorch.so is needed for the libtorch_cuda.so behind it, whose only symbol is weak (csrc/ops_cuda.cpp).
    linux = ["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed"]
    link_flags = [*(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else linux), *SANITIZE]
    lines = [
        "rule compile",
        "  description = compile $out",
        f"  command = {compiler} -MMD -MF $out.d {' '.join(FLAGS)} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_cuda",
        "  description = compile $out",
        # What ptxas says of registers and spills is for tests/helpers/cubins.py; everything else is for whoever builds.
        f"  command = {nvcc} -MD -MF $out.d {' '.join(NVCC_FLAGS)} -Xptxas -v $flags -c $in -o $out > $out.log 2>&1; "
        "failed=$$?; grep -vE '^ptxas info|^ +[0-9]+ bytes stack frame' $out.log; exit $$failed",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  description = link $out",
        f"  command = {compiler} -shared $in {' '.join([*link_flags, *libraries])} -o $out",
    ]
    for name, (source, flags) in objects.items():
        rule = "compile_cuda" if source.suffix == ".cu" else "compile"
        lines += [f"build {name}: {rule} {escape(source)}", f"  flags = {' '.join(flags)}"]
    lines += [f"build {escape(target)}: link {' '.join([*objects, *archives])}", f"default {escape(target)}", ""]
    return "\n".join(lines)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=[Extension("logquant._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
