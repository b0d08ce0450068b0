"""The sources of the CUDA kernels and, from csrc/cuda/instantiations/formats.def, the formats on tensor cores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeAlias

from logquant.format import PageFormat

CSRC = Path(__file__).parents[2] / "csrc"
CUDA = CSRC / "cuda"

# Objects by name, each with its source and its own flags.
Objects: TypeAlias = dict[str, tuple[Path, list[str]]]


def formats() -> dict[str, PageFormat]:
    """The formats that decoding on tensor cores is compiled for, by name (``d128_c160``)."""
    found = {}
    text = (CUDA / "instantiations" / "formats.def").read_text()
    for name, numbers in re.findall(r"^LOGQUANT_FORMAT\((\w+), ([\d, ]+)\)$", text, re.MULTILINE):
        dim, value_dim, columns, key_bits, value_bits, page_tokens, group, param_bits, fine = map(
            int, numbers.split(", ")
        )
        found[name] = PageFormat(
            dim, value_dim, page_tokens, key_bits, value_bits, columns, group, param_bits, param_bits, fine
        )
    return found


def sources() -> Objects:
    """The CUDA kernels; setup.py and CMakeLists.txt compile the same."""
    found: Objects = {}
    for path in sorted([*CUDA.glob("*.cu"), *CUDA.glob("tensor/*.cu")]):
        found[path.stem] = path, []
    for name in formats():
        found[f"attend_{name}"] = CUDA / "instantiations" / "attend.cu", [f"-DLOGQUANT_FORMAT_NAME={name}"]
    return found


def plain(*paths: str) -> Objects:
    """Sources without flags of their own, given relative to csrc."""
    return {Path(path).stem: (CSRC / path, []) for path in paths}
