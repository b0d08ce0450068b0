"""What a measurement ran on: every JSON file carries it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import ops
from ._version import __version__


def cpu_model() -> str:
    """The CPU's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def last_level_cache_bytes(default: int = 64 << 20) -> int:
    """Bytes of the CPU's largest cache, or ``default`` where the system does not tell."""
    sizes = [default // 1024]
    known = list(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    if known:
        sizes = [int(path.read_text().strip().removesuffix("K")) for path in known]
    return 1024 * max(sizes)


def transformers_version() -> str | None:
    """Of the transformers that is installed, which is not imported for that; None without."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def build() -> dict[str, Any]:
    """What was compiled, what of it runs here, and why not if it does not."""
    error = ops.extension_error()
    facts: dict[str, Any] = {
        "logquant": __version__,
        "torch": torch.__version__,
        "transformers": transformers_version(),
        "extension_error": error,
    }
    if error is None:
        from . import _C

        facts |= {
            "instruction_set": _C.cpu_isa(),
            "instruction_sets_available": _C.available_cpu_isas(),
            "instruction_sets_compiled": _C.compiled_cpu_isas(),
            "cuda_architectures": list(_C.cuda_architectures),
            "compiler": _C.compiler,
            "built_with_torch": _C.torch_version,
        }
    return facts


def cuda() -> dict[str, Any]:
    """The GPU that torch finds, or why there is none, and whether the kernels were compiled for it."""
    if torch.version.cuda is None:
        return {"cuda_device": "none: this build of torch has no CUDA"}
    if not torch.cuda.is_available():
        return {"cuda_device": "none: torch finds no GPU, or no driver for it"}
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    facts: dict[str, Any] = {
        "cuda_device": f"{properties.name}, compute capability {capability}",
        "cuda_version": torch.version.cuda,
        "cuda_multiprocessors": properties.multi_processor_count,
        "cuda_memory_bytes": properties.total_memory,
    }
    if ops.extension_error() is None and not ops.has_cuda_kernels():
        facts["cuda_kernels"] = "off: built without CUDA; reinstall with nvcc on the PATH and LOGQUANT_CUDA=1"
    return facts


def describe() -> dict[str, Any]:
    """Machine, threads and build, for JSON files."""
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **build(),
        **cuda(),
    }
