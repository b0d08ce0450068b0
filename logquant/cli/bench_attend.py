"""``logquant bench attend``: how long one token's attention takes."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import machine
from .shared import Dtype, Json, errors_of, megabytes, number_list, progress, result_table, write_json

if TYPE_CHECKING:
    from ..bench.attend import AttendResult


class Device(str, Enum):
    """Of torch."""

    cpu = "cpu"
    cuda = "cuda"


def command(
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 8,
    dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    context: Annotated[str, typer.Option(help="Cached tokens; several separated by commas.")] = "2048,8192,32768",
    batch: Annotated[str, typer.Option(help="Sequences; several numbers separated by commas.")] = "1",
    bits: Annotated[int, typer.Option(help="Bits of a quantised element.")] = 2,
    cache: Annotated[
        str, typer.Option(help="Whose pages: logquant, recent or paper; settings follow a colon.")
    ] = "logquant",
    window: Annotated[int, typer.Option(help="W: between 2W and 3W tokens stay exact.")] = 64,
    dtype: Annotated[Dtype, typer.Option(help="Of queries and exact tokens.")] = Dtype.bfloat16,
    rounds: Annotated[int, typer.Option(min=3, help="Timed calls of each contender.")] = 20,
    device: Annotated[Device, typer.Option(help="Where attention runs.")] = Device.cpu,
    json_file: Json = None,
) -> None:
    """Time one token's attention: fused, dequantise + SDPA, and SDPA over a full cache; with cold caches."""
    arguments = dict(locals())
    from ..bench.attend import Shape, bench_attend
    from ..bench.timing import WARMUP, read_bandwidth
    from ..methods.registry import parse_cache

    contexts, batches = number_list("--context", context), number_list("--batch", batch)
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter(machine.cuda()["cuda_device"], param_hint="--device")
    with errors_of("arguments"):
        shapes = [Shape(tokens, heads, kv_heads, dim, size) for size in batches for tokens in contexts]
        quantization = parse_cache(cache).replace(bits=bits, window=window).quantization
        if quantization is None:
            raise ValueError(f"cache must be a LogQuant cache, got {cache!r}")
        quantization.page_format(dim)
    with progress("rounds", len(shapes) * (rounds + WARMUP)) as advance:
        bandwidth = read_bandwidth(device.value)
        results = [bench_attend(shape, quantization, dtype.torch, rounds, advance, device.value) for shape in shapes]
    for result in results:
        Console().print(_table(result, bandwidth))
    write_json(
        json_file, "attend", arguments, read_bandwidth=bandwidth, results=[result.as_dict() for result in results]
    )


def _table(result: AttendResult, bandwidth: float) -> Table:
    from ..bench.attend import FUSED

    fused = result.timings[FUSED]
    rate = result.packed_nbytes / fused.median
    table = result_table(
        "contender",
        "median, ms",
        "slower by",
        "quartiles",
        title=f"{result.shape.context:,} tokens, batch {result.shape.batch}, "
        f"heads {result.shape.heads}/{result.shape.kv_heads}, dim {result.shape.dim}",
        caption=f"fused reads {megabytes(result.packed_nbytes)} (full cache {megabytes(result.full_nbytes)}) "
        f"at {rate / 1e9:.1f} GB/s, {rate / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s that torch reads here",
    )
    for name, timing in result.timings.items():
        slower = fused.speedup_over(timing)
        spread = f"{slower.low:.1f}-{slower.high:.1f}"
        table.add_row(name, f"{1e3 * timing.median:.2f}", f"{slower.median:.1f}x", spread)
    return table
