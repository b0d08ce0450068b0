"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against csrc/emulator, called through ctypes.

A backend (:mod:`logquant.ops.registry`) for CPU tensors. Nothing here checks arguments:
the tests only pass valid ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from types import SimpleNamespace

import ninja
import torch
from torch import Tensor

from logquant.format import DTYPES, PageFormat
from logquant.ops import reference
from tests.helpers.cuda_sources import Objects, plain, sources
from tests.helpers.locks import locked

ROOT = Path(__file__).parents[2]
FLAGS = [
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-march=native",
]
ORDERS = ("forward", "reverse", "random")
COPIES = ("lazy", "eager", "random")
COUNTERS = ("blocks", "barriers", "collectives", "mma", "shared_bytes", "async_bytes", "load_bytes")


def cuda_include() -> Path | None:
    """CUDA's headers: of a toolkit, or of the PyPI package nvidia-cuda-runtime."""
    versions = sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *versions]
    candidates = [Path(place) / "include" for place in places if place]
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    candidates += [*packages.glob("cu*/include"), *packages.glob("cuda_runtime/include")]
    return next((path for path in candidates if (path / "cuda_fp16.h").exists()), None)


def build(name: str, objects: Objects, flags: list[str], *, shared: bool) -> Path:
    """Compile objects, each of its source and with its own flags, with ninja, again only where something changed."""
    include = cuda_include()
    if include is None:
        raise RuntimeError("the emulated kernels need CUDA's headers: set CUDA_HOME to a toolkit")
    directory = ROOT / "build" / f"emulated-{name}"
    compiler = os.environ.get("CXX", "g++")
    lines = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {' '.join(flags)} $own -isystem {include} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} {' '.join(flags)} {'-shared' if shared else ''} $in -o $out",
        *(f"build {target}.o: compile {source}\n  own = {' '.join(own)}" for target, (source, own) in objects.items()),
        f"build {name}: link {' '.join(f'{target}.o' for target in objects)}",
        "",
    ]
    with locked(directory):
        (directory / "build.ninja").write_text("\n".join(lines))
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", directory, "-j2"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the emulated kernels do not compile:\n{result.stdout[-4000:]}")
    return directory / name


@functools.cache
def library() -> ctypes.CDLL:
    glue = plain("emulator/emulator.cpp", "tests/emulated_module.cpp")
    lib = ctypes.CDLL(str(build("kernels.so", sources() | glue, FLAGS, shared=True)))
    for name in ("append", "choose_leaving", "quantize", "dequantize", "evict", "page_scores", "attend", "attend_path"):
        getattr(lib, f"emulated_{name}").restype = ctypes.c_char_p
    lib.emulated_attend_workspace.restype = ctypes.c_int64
    return lib


@dataclass(frozen=True)
class Machine:
    """How the imaginary GPU runs: order of threads, timing of cp.async, rounding of tensor cores (emulator.h)."""

    order: str = "forward"
    copies: str = "lazy"
    seed: int = 1
    mma_block: int = 0
    mma_guard_bits: int = 1
    multiprocessors: int = 2


def _configure(m: Machine) -> None:
    library().emulated_configure(
        ORDERS.index(m.order),
        COPIES.index(m.copies),
        ctypes.c_int64(m.seed),
        m.mma_block,
        m.mma_guard_bits,
        m.multiprocessors,
    )


@contextlib.contextmanager
def machine(**settings: object) -> Iterator[None]:
    """Run kernels on another machine within a ``with`` block."""
    _configure(Machine(**settings))  # type: ignore[arg-type]
    try:
        yield
    finally:
        _configure(Machine())


def counters() -> dict[str, int]:
    """What was counted since the last call; of mma, whole instructions."""
    values = (ctypes.c_int64 * len(COUNTERS))()
    library().emulated_counters(values)
    return dict(zip(COUNTERS, values, strict=True))


# ------------------------------------------------------------------------------------------------------ the operators
def _float(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def _format(fmt: PageFormat) -> list[int]:
    return list(astuple(fmt))


def _tokens(x: Tensor) -> list[int]:
    return [x.data_ptr(), DTYPES.index(x.dtype), *x.stride()[:3]]


def _pages(x: Tensor) -> list[int]:
    return [x.data_ptr(), *x.stride()[:3]]


def _broadcast(x: Tensor, dim: int) -> int:
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def _per_head(x: Tensor | None) -> list[int]:
    return [0, 0, 0] if x is None else [x.data_ptr(), _broadcast(x, 0), _broadcast(x, 1)]


def _rows(x: Tensor | None) -> list[int]:
    return [0, 0] if x is None else [x.data_ptr(), _broadcast(x, 0)]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _call(name: str, numbers: list[int]) -> None:
    error = getattr(library(), f"emulated_{name}")((ctypes.c_int64 * len(numbers))(*numbers))
    if error is not None:
        raise RuntimeError(error.decode())


def quantize(
    k: Tensor,
    v: Tensor,
    fmt: PageFormat,
    index: Tensor | None = None,
    key_map: Tensor | None = None,
    key_weights: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> Tensor:
    k, v = _dense(k), _dense(v)
    key_weights = None if key_weights is None else _dense(key_weights)
    index = None if index is None else index.contiguous()
    batch, heads, tokens, _ = k.shape
    count = (tokens if index is None else index.shape[1]) // fmt.page_tokens
    pages = torch.empty(batch, heads, count, fmt.words, dtype=torch.int32)
    numbers = [*_format(fmt), *_tokens(k), *_tokens(v), *_pages(pages), *_per_head(key_map), *_per_head(key_weights)]
    numbers += _per_head(value_feedback)
    if pages.numel():
        _call("quantize", [*numbers, *_rows(index), batch, heads, count, tokens])
    return pages


def dequantize(
    pages: Tensor, fmt: PageFormat, dtype: torch.dtype = torch.float32, key_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    pages = _dense(pages)
    batch, heads, count, _ = pages.shape
    k = torch.empty(batch, heads, count * fmt.page_tokens, fmt.head_dim, dtype=dtype)
    v = torch.empty(batch, heads, count * fmt.page_tokens, fmt.value_dim, dtype=dtype)
    numbers = [*_format(fmt), *_tokens(k), *_tokens(v), *_pages(pages), *_per_head(key_map), batch, heads, count]
    if pages.numel():
        _call("dequantize", numbers)
    return k, v


def evict_(
    window_k: Tensor,
    window_v: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    page: int,
    tokens: int,
    start: int,
    step: int,
    count: int,
    key_map: Tensor | None = None,
    key_weights: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> None:
    target = pages[:, :, page:]
    key_weights = None if key_weights is None else _dense(key_weights)
    numbers = [*_format(fmt), *_tokens(window_k), *_tokens(window_v), *_pages(target), *_per_head(key_map)]
    numbers += [*_per_head(key_weights), *_per_head(value_feedback)]
    _call("evict", [*numbers, *window_k.shape[:2], tokens, start, step, count])


def page_scores(
    q: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    scale: float,
    key_map: Tensor | None = None,
    means: Tensor | None = None,
    mean_scales: Tensor | None = None,
) -> Tensor:
    q, pages = _dense(q), _dense(pages)
    batch, kv_heads, count, _ = pages.shape
    scores = torch.full((*q.shape[:3], count), torch.nan)
    numbers = [*_format(fmt), batch, kv_heads, q.shape[1] // kv_heads, q.shape[2], count, *_tokens(q), *_pages(pages)]
    numbers += [*_per_head(key_map), _float(scale)]
    numbers += [0] * 4 if means is None else [means.data_ptr(), *means.stride()[:3]]
    numbers += [0] * 3 if mean_scales is None else [mean_scales.data_ptr(), *mean_scales.stride()[:2]]
    if scores.numel():
        _call("page_scores", [*numbers, scores.data_ptr()])
    return scores


choose_pages = reference.choose_pages  # has no kernel for CUDA


def choose_leaving(weight: Tensor, first: int, last: int, count: int, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous()
    rows, slots = weight.shape
    leaving, staying = (torch.full((rows, n), -1, dtype=torch.int32) for n in (count, slots - count))
    numbers = [weight.data_ptr(), rows, slots, first, last, count, leaving.data_ptr(), staying.data_ptr()]
    if rows:
        _call("choose_leaving", [*numbers, len(ranks), *ranks])
    return leaving, staying


MASK_KINDS = (None, torch.bool, *DTYPES)


def _attend_arguments(*args: object, **kwargs: object) -> SimpleNamespace:
    """The arguments of ``attend`` by their names, with rows that are dense."""
    call = inspect.signature(reference.attend).bind(*args, **kwargs)
    call.apply_defaults()
    a = SimpleNamespace(**call.arguments)
    a.q, a.pages, a.window_k, a.window_v = map(_dense, (a.q, a.pages, a.window_k, a.window_v))
    a.attention = None if a.attention is None else _dense(a.attention)
    for name in ("positions", "query_positions", "sinks", "page_table", "lengths"):
        if (x := getattr(a, name)) is not None:
            setattr(a, name, x.contiguous())
    return a


def _attend_numbers(a: SimpleNamespace, out: Tensor, lse: Tensor, given: Tensor) -> list[int]:
    kv_heads = a.window_k.shape[1]
    page_count, page_view = a.pages.shape[2], _pages(a.pages)
    if a.page_table is not None:
        page_count = a.page_table.shape[1]
        page_view = [a.pages.data_ptr(), 0, a.pages.stride(1), a.pages.stride(0)]
    numbers = [*_format(a.fmt), a.q.shape[0], kv_heads, a.q.shape[1] // kv_heads, a.q.shape[2], page_count]
    numbers += [a.window_k.shape[2], a.pages.shape[0]]
    numbers += [*_tokens(a.q), *page_view, *_tokens(a.window_k), *_tokens(a.window_v)]
    numbers += [*_per_head(a.key_map), _float(a.scale), _float(a.softcap)]
    for rows in (a.page_table, a.lengths, a.positions, a.query_positions):
        numbers += _rows(rows)
    mask = a.mask
    numbers.append(MASK_KINDS.index(None if mask is None else mask.dtype))
    if mask is None:
        numbers += [0] * 6
    else:
        numbers += [mask.data_ptr(), *(_broadcast(mask, dim) for dim in range(3)), mask.stride(3), mask.shape[3]]
    numbers += [0 if a.sinks is None else a.sinks.data_ptr(), out.data_ptr(), lse.data_ptr()]
    slots = 0 if a.attention is None else a.attention.shape[2]
    return [*numbers, *_per_head(a.attention), slots, given.data_ptr() if given.numel() else 0]


def _workspace(numbers: list[int]) -> int:
    return int(library().emulated_attend_workspace((ctypes.c_int64 * len(numbers))(*numbers)))


def attend(*args: object, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
    a = _attend_arguments(*args, **kwargs)
    out = torch.full((*a.q.shape[:3], a.fmt.value_dim), torch.nan, dtype=a.q.dtype)
    lse = torch.full(a.q.shape[:3], torch.nan)
    given = torch.full((0,) if a.attention is None else a.window_k.shape[:3], torch.nan)
    numbers = _attend_numbers(a, out, lse, given)
    if lse.numel():
        workspace = torch.full((_workspace(numbers),), torch.nan)
        _call("attend", [*numbers, workspace.data_ptr()])
    return out, lse, given


def decode_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    positions: Tensor,
    lengths: Tensor,
    attention: Tensor,
    queries: Tensor,
    seen: Tensor,
    fmt: PageFormat,
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    q, k, v = map(_dense, (q, k, v))
    numbers = [n for x in (q, k, v, window_k, window_v, queries) for n in _tokens(x)]
    numbers += [len(q), k.shape[1], q.shape[1], fmt.head_dim, fmt.value_dim, window_k.shape[2], queries.shape[2]]
    first = positions.data_ptr() + 4 * pages.shape[2] * fmt.page_tokens
    _call("append", [*numbers, first, positions.stride(0), lengths.data_ptr(), seen.data_ptr()])
    counted = attention if attention.shape[2] else None
    options = key_map, None if mask is None else positions, mask, None, sinks, None, lengths, counted
    out, _, given = attend(q, pages, window_k, window_v, fmt, scale, softcap, *options)
    if counted is not None:
        attention.copy_(given)
    return out


def attend_workspace(*args: object, **kwargs: object) -> int:
    """Floats of workspace that :func:`attend` takes for these arguments."""
    a = _attend_arguments(*args, **kwargs)
    return _workspace(_attend_numbers(a, a.q, a.q, a.q if a.attention is not None else a.q[:0]))


def attend_path(*args: object, **kwargs: object) -> str:
    """The kernel that :func:`attend` takes for these arguments: ``"tensor"``, ``"general"`` or ``"prefill"``."""
    a = _attend_arguments(*args, **kwargs)
    numbers = _attend_numbers(a, a.q, a.q, a.q[:0])
    return library().emulated_attend_path((ctypes.c_int64 * len(numbers))(*numbers)).decode()


if __name__ == "__main__":
    # Builds the library, or with a NAME runs csrc/tests/NAME.cu as a program.
    if len(sys.argv) == 1:
        if cuda_include() is not None:
            library()
        sys.exit()
    name = sys.argv[1]
    program = build(name, plain(f"tests/{name}.cu", "emulator/emulator.cpp"), FLAGS, shared=False)
    sys.exit(subprocess.run([program], check=False).returncode)
