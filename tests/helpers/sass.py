"""Reads machine code: the instructions of attend's page loop, from what cuobjdump prints of a cubin."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z0-9_.]+)(.*?);")


def cuobjdump() -> str | None:
    """The tool: of $CUOBJDUMP, the PATH, a toolkit, or the PyPI package nvidia-cuda-cuobjdump."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [os.environ.get("CUOBJDUMP"), shutil.which("cuobjdump"), *map(str, packages.glob("cu*/bin/cuobjdump"))]
    return next((place for place in places if place and Path(place).exists()), None)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        match = re.search(r"0x([0-9a-f]+)\s*$", self.operands.strip())
        return int(match[1], 16) if match and self.opcode.startswith("BRA") else None


def functions(compiled: Path, arch: str) -> dict[str, list[Instruction]]:
    """The kernels of an object or a cubin by their mangled names."""
    tool = cuobjdump()
    assert tool is not None
    text = subprocess.run(
        [tool, "-sass", "-arch", f"sm_{arch}", compiled], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = found.setdefault(match[1], [])
        elif match := LINE.match(line):
            current.append(Instruction(int(match[1], 16), (match[2] or "").strip(), match[3], match[4]))
    return found


def page_loop(code: list[Instruction]) -> list[Instruction]:
    """The instructions that a warp issues for one page on the common path.

    The loop is the shortest backward branch whose body copies pages and holds most HMMA. Of its forward branches, those
    around rare blocks are taken: what moves the reference exponent (SHFL), masks scores (calls, reciprocals, loads),
    takes out NaNs that a row does not see (FSEL), looks for poisoned scales (LDS.U8), looks a page up in a table (a
    load), or what two warps rarely exchange (BAR). Convergence branches: BRA.CONV is taken, BRA.DIV and @!PT are not.
    """
    at = {x.address: i for i, x in enumerate(code)}
    copies = [x.address for x in code if x.opcode.startswith("LDGSTS")]
    loops = [(x.target, x.address) for x in code if x.target is not None and x.target < x.address]
    loops = [(low, high) for low, high in loops if any(low <= address <= high for address in copies)]
    products = [x.address for x in code if x.opcode.startswith("HMMA")]
    held = {loop: sum(loop[0] <= address <= loop[1] for address in products) for loop in loops}
    # Blocks that were moved behind the loop jump back into it: they end larger loops.
    low, high = min((x for x in loops if held[x] >= 0.6 * max(held.values())), key=lambda loop: loop[1] - loop[0])

    def is_rare(first: int, last: int) -> bool:
        body = [x.opcode for x in code[first:last]]
        if any(op.startswith("LDGSTS") for op in body):
            return False
        return any(
            op.startswith(("SHFL", "CALL", "MUFU.RCP", "MUFU.TANH", "LDG", "FSEL", "LDS.U8", "BAR.")) for op in body
        )

    path: list[Instruction] = []
    i = at[low]
    while len(path) < 20_000:
        x = code[i]
        path.append(x)
        if x.address == high:
            break
        if x.target is not None and x.target > x.address:
            j = at[x.target]
            always = not x.predicate and not re.search(r"\bU?!?P\d", x.operands)
            never = ".DIV" in x.opcode or x.predicate == "@!PT"
            if not never and (".CONV" in x.opcode or always or is_rare(i + 1, j)):
                i = j
                continue
        i += 1
    return path


def tiles(mangled: str) -> int:
    """Of 8 query rows."""
    match = re.search(r"Li(\d)EEEv", mangled)
    assert match is not None
    return int(match[1])


def warps(mangled: str) -> int:
    """How many share a page (Config::kPaired)."""
    match = re.search(r"ShapeI((?:Li\d+E)+)E", mangled)
    assert match is not None
    numbers = [int(x) for x in re.findall(r"\d+", match[1])]
    value_dim, param_bits = numbers[1], numbers[7]
    alone = 192 if "bfloat16" in mangled and param_bits == 16 else 128
    return 2 if tiles(mangled) == 2 and value_dim > alone else 1


def counts(name: str, arch: str) -> dict[tuple[str, int], int]:
    """Instructions a page of one source's kernels, of all warps that share it, by dtype and tiles of 8 query rows."""
    from tests.helpers import cubins

    cubins.build([name], [arch])
    found = {}
    for kernel, code in functions(cubins.path(name, arch), arch).items():
        found["bf16" if "bfloat16" in kernel else "f16", tiles(kernel)] = warps(kernel) * len(page_loop(code))
    return found


if __name__ == "__main__":  # python -m tests.helpers.sass ARCH NAME...: instructions a cached token of pages of 64
    for source in sys.argv[2:]:
        for (dtype, n), count in counts(source, sys.argv[1]).items():
            print(f"{source} sm_{sys.argv[1]} {dtype:4} {8 * n - 7}-{8 * n} rows: {count / 64:.2f}")
