"""``logquant bench attend``: how long one token's attention takes."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from .interrupt import interruptible
from .shared import (
    OWN,
    Dtype,
    Json,
    bad,
    errors_of,
    megabytes,
    number_list,
    one_cache,
    progress,
    with_settings,
    write_json,
)
from .tables import ResultTable

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
    bits: Annotated[
        int | None, typer.Option(help="Bits of a quantised element: 2, 4 or 8; by default the cache's.")
    ] = None,
    cache: Annotated[str, typer.Option(help=f"Whose pages: {', '.join(OWN)}; settings follow a colon.")] = "logquant",
    window: Annotated[
        int | None, typer.Option(help="W: between 2W and 3W tokens stay exact; by default the cache's.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of queries and exact tokens.")] = Dtype.bfloat16,
    rounds: Annotated[int, typer.Option(min=3, help="Timed calls of each contender.")] = 20,
    device: Annotated[Device, typer.Option(help="Where attention runs.")] = Device.cpu,
    others: Annotated[bool, typer.Option(help="Whether torch's contenders are timed, too.")] = True,
    json_file: Json = None,
) -> None:
    """Time one token's attention: fused, dequantise + SDPA, and SDPA over a full cache; with cold caches.

    A cache with recall, as logquant:recall=both(pages=0.25), is timed with and without it.
    """
    arguments = dict(locals())
    contexts, batches = number_list("--context", context), number_list("--batch", batch)
    spec = one_cache("--cache", cache)
    if spec.quantization is None:
        raise bad("--cache", f"a LogQuant cache is needed, one of {', '.join(OWN)}; got {cache!r}")
    import torch

    from .. import machine
    from ..bench.attend import Shape, bench_attend
    from ..bench.timing import WARMUP, read_bandwidth

    if device is Device.cuda and not torch.cuda.is_available():
        raise bad("--device", machine.cuda()["cuda_device"])
    with errors_of("--heads, --kv-heads, --dim"):
        shapes = [Shape(tokens, heads, kv_heads, dim, size) for size in batches for tokens in contexts]
    quantization = with_settings("--cache", spec, bits=bits, window=window).quantization
    assert quantization is not None
    if quantization.prune is not None or quantization.evict is not None:
        needed = "a cache without prune and evict is needed (give --context of what they leave)"
        raise bad("--cache", f"{needed}, got {cache!r}")
    if quantization.layers is not None:
        raise bad("--cache", f"a cache without layers is needed (give what one layer has), got {cache!r}")
    with errors_of("--dim"):
        quantization.page_format(dim)
    results = []
    with interruptible() as interrupted, progress("rounds", len(shapes) * (rounds + WARMUP)) as advance:
        bandwidth = read_bandwidth(device.value)
        for shape in shapes:
            if interrupted():
                break
            results.append(bench_attend(shape, quantization, dtype.torch, rounds, advance, device.value, others))
    for result in results:
        _table(result, bandwidth).show()
    if results:
        rows = [result.as_dict() for result in results]
        write_json(json_file, "attend", arguments, read_bandwidth=bandwidth, results=rows)
    interrupted.leave()


def _table(result: AttendResult, bandwidth: float) -> ResultTable:
    from ..bench.attend import FUSED

    fused = result.timings[FUSED]
    rate = result.packed_nbytes / fused.median
    table = ResultTable(
        ("contender", "median, ms", "slower by", "quartiles"),
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
