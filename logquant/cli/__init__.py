"""The command line: ``logquant generate``, ``plan``, ``calibrate``, ``eval``, ``bench ...``, ``report``, ``info``."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"the command line needs more packages ({error}): pip install 'logquant[cli]'") from error

import torch

from .. import machine
from ..compat import as_argument

if TYPE_CHECKING:
    from ..bench.attend import AttendResult
    from ..methods.registry import CacheSpec

app = typer.Typer(
    help="A 2-bit KV cache for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(bench, name="bench")


class Dtype(str, Enum):
    """Of weights and exact tokens."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[self.value]


class Device(str, Enum):
    """Of torch."""

    cpu = "cpu"
    cuda = "cuda"


Model = Annotated[
    str | None, typer.Option("--model", help="Directory or hub id; by default the packaged SmolLM2-135M-Instruct.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
GIB = 1 << 30
CACHE_HELP = (
    "logquant, paper, recent, full, or another method: partial, kivi, oscar, turboquant, quanto, hqq, streaming, h2o; "
    "settings follow a colon, as in logquant:bits=4,window=128 or logquant:calibration=FILE."
)


# ---------------------------------------------------------------------------------------------------- shared pieces
def main() -> None:
    """The entry point of ``logquant``."""
    app()


@contextmanager
def errors_of(option: str) -> Iterator[None]:
    """Report a bad value of ``option`` as such, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def load_model(model: str | None, dtype: Dtype) -> tuple[Any, Any]:
    with errors_of("--model"):
        from .. import models  # slow to import, so not for --help

        return models.load(model, dtype=dtype.torch)


def write_json(file: Path | None, kind: str, arguments: dict[str, Any], **result: Any) -> None:
    """Write a result with what produced it: the command, its arguments and the machine."""
    if file is None:
        return
    with errors_of("--json"):
        command = shlex.join(["logquant", *sys.argv[1:]])
        content = {"kind": kind, "command": command, "arguments": arguments, "machine": machine.describe(), **result}
        file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def number_list(option: str, text: str) -> list[int]:
    with errors_of(option):
        numbers = [int(part) for part in text.split(",")]
        if min(numbers) < 1:
            raise ValueError(f"numbers must be at least 1, got {text!r}")
        return numbers


def progress() -> Progress:
    """On stderr, so that stdout holds the result alone."""
    return Progress(console=Console(stderr=True), transient=True)


# --------------------------------------------------------------------------------------------------------- generate
@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option(help="What to continue, or to answer.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file to read it from; comes before --prompt.")] = None,
    model: Model = None,
    cache: Annotated[str, typer.Option(help=CACHE_HELP)] = "logquant",
    bits: Annotated[int | None, typer.Option(help="Bits of a quantised element: 2, 4 or 8.")] = None,
    key_bits: Annotated[int | None, typer.Option(help="The same for keys alone.")] = None,
    value_bits: Annotated[int | None, typer.Option(help="The same for values alone.")] = None,
    window: Annotated[int | None, typer.Option(help="W: between 2W and 3W tokens stay exact.")] = None,
    page_tokens: Annotated[int | None, typer.Option(help="Tokens of a page: 32, 64 or 128.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, always.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool | None, typer.Option(help="Use the chat template; by default if there is one.")] = None,
    json_file: Json = None,
) -> None:
    """Stream the model's answer to a prompt, then say what it cost."""
    arguments = dict(locals())
    from ..methods.accounting import cache_nbytes
    from ..methods.registry import parse_cache

    fields = {
        "bits": bits,
        "key_bits": key_bits,
        "value_bits": value_bits,
        "window": window,
        "page_tokens": page_tokens,
    }
    with errors_of("--cache"):
        spec = parse_cache(cache).replace(**{name: value for name, value in fields.items() if value is not None})
    text = _prompt_text(prompt, prompt_file)
    loaded, tokenizer = load_model(model, dtype)
    ids = _prompt_ids(tokenizer, text, chat)

    kv_cache = spec.make(loaded.config)
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    streamer = _timed_streamer(tokenizer)
    output = loaded.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **as_argument(kv_cache),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        streamer=streamer,
        **sampling,
    )
    new = output[0, ids.shape[1] :]
    prefill_seconds, decode_seconds = streamer.seconds()
    result = {
        "cache": spec.name,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "prefill_seconds": prefill_seconds,
        "decode_seconds": decode_seconds,
        # The first new token comes out of the prefill.
        "tokens_per_second": (len(new) - 1) / decode_seconds if len(new) > 1 else None,
        "bytes": cache_nbytes(kv_cache),
        "full_precision_bytes": getattr(kv_cache, "full_precision_nbytes", cache_nbytes(kv_cache)),
    }
    typer.echo(_summary(result), err=True)
    write_json(json_file, "text", arguments, **result)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    parts = []
    if prompt_file is not None:
        with errors_of("--prompt-file"):
            parts.append(prompt_file.read_text(encoding="utf-8"))
    if prompt is not None:
        parts.append(prompt)
    if not any(part.strip() for part in parts):
        raise typer.BadParameter("needed: --prompt TEXT, --prompt-file FILE, or both", param_hint="--prompt")
    return "\n\n".join(parts)


def _prompt_ids(tokenizer: Any, text: str, chat: bool | None) -> torch.Tensor:
    """Token ids ``[1, T]``."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise typer.BadParameter("this model's tokenizer has no chat template; use --no-chat", param_hint="--chat")
    if not has_template or chat is False:
        ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
        return ids
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
    return ids


def _timed_streamer(tokenizer: Any) -> Any:
    """transformers' streamer of text, which also notes when tokens come."""
    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())  # first for the prompt, before the prefill
            super().put(value)

        def seconds(self) -> tuple[float, float]:
            """Of the prefill and of all tokens after the first."""
            return self.times[1] - self.times[0], self.times[-1] - self.times[1]

    return TimedStreamer()


def _summary(result: dict[str, Any]) -> str:
    """One line."""
    speed = "" if result["tokens_per_second"] is None else f", {result['tokens_per_second']:.1f} tokens/s"
    held, full = result["bytes"], result["full_precision_bytes"]
    return (
        f"[{result['cache']}] {result['prompt_tokens']} + {result['new_tokens']} tokens{speed}; "
        f"cache {megabytes(held)}, in full precision {megabytes(full)}: {full / held:.2f}x"
    )


# ------------------------------------------------------------------------------------------------------------- info
@app.command()
def info(json_file: Json = None) -> None:
    """Say what is installed, what runs here, and why a fast path is off."""
    facts = machine.describe()
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name != "extension_error":
            text = ", ".join(value) or "none" if isinstance(value, list) else str(value)
            table.add_row(name.replace("_", " "), text)
    error = facts["extension_error"]
    table.add_row("compiled operators", "in use" if error is None else f"[bold red]off[/]: {error}")
    Console().print(table)
    write_json(json_file, "info", {})


# ------------------------------------------------------------------------------------------------------------- plan
@app.command(name="plan")
def plan_command(
    memory: Annotated[float, typer.Option(min=0.0, help="GiB for keys and values.")] = 1.0,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, prompt and generated.")] = 4000,
    caches: Annotated[str, typer.Option(help=f"Separated by commas: {CACHE_HELP}")] = "full,logquant",
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option(help="Of exact tokens.")] = Dtype.bfloat16,
    json_file: Json = None,
) -> None:
    """Say how many sequences fit into memory, and how long a one, from a model's configuration alone."""
    arguments = dict(locals())
    from .. import models
    from ..methods.registry import parse_caches
    from ..plan import plan

    with errors_of("--caches"):
        specs = parse_caches(caches)
    with errors_of("--model"):
        config = models.load_config(model)
    budget = int(memory * GIB)
    with errors_of("arguments"):
        plans = [plan(spec, config, budget=budget, tokens=context, itemsize=dtype.torch.itemsize) for spec in specs]
    table = Table(
        "cache",
        "a sequence",
        "sequences",
        "longest, tokens",
        title=f"{context:,} tokens of {config.model_type} in {memory:g} GiB",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for each in plans:
        table.add_row(each.cache, megabytes(each.nbytes), f"{each.batch:,}", f"{each.longest:,}")
    Console().print(table)
    write_json(json_file, "plan", arguments, results=[each.as_dict() for each in plans])


# -------------------------------------------------------------------------------------------------------- calibrate
@app.command(name="calibrate")
def calibrate_command(
    files: Annotated[list[Path], typer.Argument(help="Files of text, like those that the model will see.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file.")] = Path("calibration.safetensors"),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text, if it has as many.")] = 2048,
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    json_file: Json = None,
) -> None:
    """See which key channels of a model queries look at, for caches logquant:calibration=FILE of that model."""
    arguments = dict(locals())
    from ..eval import read_ids
    from ..quantizer.calibrate import calibrate

    with errors_of("--output"):
        if not output.absolute().parent.is_dir():
            raise ValueError(f"there is no directory {output.absolute().parent}")
    loaded, tokenizer = load_model(model, dtype)
    with errors_of("files"):
        texts = [torch.tensor(read_ids(tokenizer, file)[:tokens]) for file in files]
    with progress() as bar, errors_of("files"):
        task = bar.add_task(f"{len(texts)} texts", total=sum(len(text) for text in texts))
        calibration = calibrate(loaded, texts, on_progress=lambda done: bar.advance(task, done))
    with errors_of("--output"):
        calibration.save(output)
    typer.echo(f"{output}: {calibration.tokens:,} tokens, {output.stat().st_size / 1e3:.0f} kB")
    write_json(json_file, "calibrate", arguments, tokens=calibration.tokens, layers=calibration.layers)


# ------------------------------------------------------------------------------------------------------------- eval
class Task(str, Enum):
    """What ``eval`` measures."""

    kl = "kl"
    greedy = "greedy"
    passkey = "passkey"


@app.command(name="eval")
def evaluate(
    files: Annotated[list[Path] | None, typer.Argument(help="More files of text.", show_default=False)] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A file of text; may be given several times.")] = None,
    model: Model = None,
    caches: Annotated[str, typer.Option(help=f"Separated by commas: {CACHE_HELP}")] = "logquant,recent,full",
    tasks: Annotated[
        str, typer.Option(help="Separated by commas: kl, greedy (tokens written alike), passkey (needs no text).")
    ] = "kl",
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, which attends to itself exactly.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it, in every text.")] = 1000,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens decoded at once; more than 1 is faster and flatters.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts run at once.")] = 8,
    passkey_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text that holds a passkey.")] = 2000,
    passkey_texts: Annotated[int, typer.Option(min=1, help="Such texts for each of five depths.")] = 5,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    json_file: Json = None,
) -> None:
    """Measure what a cache costs: by teacher forcing on real text, in greedy decoding, and in recalling a passkey.

    kl is divergence from the full cache, perplexity and top-1 agreement.
    """
    arguments = dict(locals())
    from .. import eval as evaluation
    from ..methods.registry import parse_caches

    with errors_of("--caches"):
        specs = parse_caches(caches)
    with errors_of("--tasks"):
        wanted = {Task(name.strip()) for name in tasks.split(",")}
    loaded, tokenizer = load_model(model, dtype)
    paths = [*(text or []), *(files or [])]
    rows: list[dict[str, Any]] = [{"cache": spec.name} for spec in specs]
    if wanted & {Task.kl, Task.greedy}:
        with errors_of("--text"):
            ids = evaluation.read_tokens(tokenizer, paths, prefill + tokens + 1 if Task.kl in wanted else prefill)
    if Task.kl in wanted:
        with progress() as bar:
            task = bar.add_task(f"{len(paths)} texts, {tokens} tokens each", total=len(paths) * tokens)
            scores = evaluation.evaluate(
                loaded,
                ids,
                specs,
                prefill=prefill,
                chunk=chunk,
                batch_size=batch_size,
                on_progress=lambda done: bar.advance(task, done),
            )
        for row, each in zip(rows, scores, strict=True):
            row.update(each.as_dict())
        Console().print(_kl_table(rows))
    if Task.greedy in wanted:
        with progress() as bar:
            task = bar.add_task("greedy decoding", total=len(specs) * len(paths) * tokens)
            agreements = evaluation.greedy_agreement(
                loaded,
                ids[:, :prefill],
                specs,
                tokens=tokens,
                batch_size=batch_size,
                on_progress=lambda done: bar.advance(task, done),
            )
        for row, agreement in zip(rows, agreements, strict=True):
            row["greedy"] = agreement.as_dict()
        Console().print(_greedy_table(rows))
    if Task.passkey in wanted:
        with progress() as bar, errors_of("--passkey-tokens"):
            task = bar.add_task("passkeys", total=len(specs) * passkey_texts * len(evaluation.DEPTHS))
            recalls = evaluation.passkey(
                loaded,
                tokenizer,
                specs,
                length=passkey_tokens,
                texts=passkey_texts,
                on_progress=lambda done: bar.advance(task, done),
            )
        for row, recall in zip(rows, recalls, strict=True):
            row["passkey"] = recall.as_dict()
        Console().print(_passkey_table(rows))
    write_json(json_file, "eval", arguments, results=rows)


def _result_table(*columns: str, title: str | None = None) -> Table:
    """Numbers to the right, names to the left."""
    table = Table(*columns, title=title)
    for column in table.columns:
        column.no_wrap, column.justify = True, "right"
    table.columns[0].justify = "left"
    return table


def _kl_table(rows: list[dict[str, Any]]) -> Table:
    table = _result_table("cache", "KL", "95 % of KL", "ppl", "top-1", "bits", "bytes/token", "bytes/text")
    for row in rows:
        table.add_row(
            row["cache"],
            f"{row['kl']:.4f}",
            "{:.3f}-{:.3f}".format(*row["kl_interval"]) if row["kl_interval"] else "-",
            f"{row['ppl']:.2f}",
            f"{row['top1']:.3f}",
            f"{row['bits_per_element']:.2f}" if row["bits_per_element"] else "-",
            f"{row['bytes_per_token']:,.0f}" if row["bytes_per_token"] is not None else "-",
            megabytes(row["bytes"]),
        )
    return table


def _greedy_table(rows: list[dict[str, Any]]) -> Table:
    table = _result_table("cache", "tokens written alike", "95 %", title=f"of {rows[0]['greedy']['tokens']:,}")
    for row in (row["greedy"] for row in rows):
        interval = "{:.0f}-{:.0f}".format(*row["agreement_interval"]) if row["agreement_interval"] else "-"
        table.add_row(row["cache"], f"{row['agreement']:.1f}", interval)
    return table


def _passkey_table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]["passkey"]
    columns = [f"depth {depth:g}" for depth in first["found_by_depth"]]
    table = _result_table("cache", "found", "nats/token", *columns, title=f"passkeys in {first['length']:,} tokens")
    for row in (row["passkey"] for row in rows):
        by_depth = [f"{found:.2f}" for found in row["found_by_depth"].values()]
        table.add_row(row["cache"], f"{row['found']:.2f}", f"{row['nll']:.3f}", *by_depth)
    return table


# ------------------------------------------------------------------------------------------------------------ bench
@bench.command()
def attend(
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
    device: Annotated[Device, typer.Option(help="What attends.")] = Device.cpu,
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
    with progress() as bar:
        task = bar.add_task("rounds", total=len(shapes) * (rounds + WARMUP))
        bandwidth = read_bandwidth(device.value)
        results = [
            bench_attend(shape, quantization, dtype.torch, rounds, lambda: bar.advance(task), device.value)
            for shape in shapes
        ]
    for result in results:
        Console().print(_attend_table(result, bandwidth))
    write_json(
        json_file, "attend", arguments, read_bandwidth=bandwidth, results=[result.as_dict() for result in results]
    )


def _attend_table(result: AttendResult, bandwidth: float) -> Table:
    from ..bench.attend import FUSED

    fused = result.timings[FUSED]
    rate = result.packed_nbytes / fused.median
    table = Table(
        "contender",
        "median, ms",
        "slower by",
        "quartiles",
        title=f"{result.shape.context:,} tokens, batch {result.shape.batch}, "
        f"heads {result.shape.heads}/{result.shape.kv_heads}, dim {result.shape.dim}",
        caption=f"fused reads {megabytes(result.packed_nbytes)} (full cache {megabytes(result.full_nbytes)}) "
        f"at {rate / 1e9:.1f} GB/s, {rate / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s that torch reads here",
    )
    for column in table.columns:
        column.no_wrap, column.justify = True, "right"
    table.columns[0].justify = "left"
    for name, timing in result.timings.items():
        slower = fused.speedup_over(timing)
        spread = f"{slower.low:.1f}-{slower.high:.1f}"
        table.add_row(name, f"{1e3 * timing.median:.2f}", f"{slower.median:.1f}x", spread)
    return table


@bench.command(name="generate")
def bench_generate_command(
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 2000,
    batch: Annotated[str, typer.Option(help="Sequences decoded at once; several numbers separated by commas.")] = "1,8",
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each cache.")] = 40,
    baseline_steps: Annotated[
        int | None, typer.Option(min=3, help="Those of the other methods' caches, if they are to be fewer.")
    ] = None,
    peaks: Annotated[
        bool, typer.Option("--peaks", help="Also measure the peak memory of each cache, in processes of their own.")
    ] = False,
    caches: Annotated[str, typer.Option(help=f"Separated by commas: {CACHE_HELP}")] = "full,logquant,recent",
    full_attention: Annotated[
        str | None,
        typer.Option(
            help="Also decode a full cache with this attention of transformers, such as eager; without peaks."
        ),
    ] = None,
    memory_budget: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="GiB for keys and values: each cache decodes as many sequences as fit, not --batch."
        ),
    ] = None,
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.bfloat16,
    json_file: Json = None,
) -> None:
    """Decode with each cache in turn, a step at a time: tokens per second, also of the full cache's, and bytes held.

    All sequences of a batch have the same prompt, which is run once.
    """
    arguments = dict(locals())
    from ..bench.generate import bench_budget, bench_generate
    from ..bench.memory import bench_memory
    from ..bench.timing import WARMUP
    from ..methods.full import Full
    from ..methods.registry import CacheSpec, parse_caches

    batches = number_list("--batch", batch)
    with errors_of("--caches"):
        specs = parse_caches(caches)
    attention = {} if full_attention is None else {f"full, {full_attention}": full_attention}
    specs += [CacheSpec(name, Full()) for name in attention]
    if attention and peaks:
        raise typer.BadParameter("not given with --peaks", param_hint="--full-attention")
    if memory_budget is not None and context <= steps + WARMUP:
        raise typer.BadParameter(f"needed: more tokens than are decoded, {steps + WARMUP}", param_hint="--context")
    loaded, _ = load_model(model, dtype)
    with errors_of("--full-attention"):
        for name in attention.values():
            loaded.set_attn_implementation(name)
    results = []
    runs = len(batches) if memory_budget is None else 1
    with progress() as bar:
        task = bar.add_task("prefills and steps", total=runs * (len(specs) + steps + WARMUP))

        def advance() -> None:
            bar.advance(task)

        if memory_budget is None:
            for size in batches:
                results += bench_generate(
                    loaded,
                    specs,
                    context=context,
                    batch=size,
                    steps=steps,
                    baseline_steps=baseline_steps,
                    attention=attention,
                    on_progress=advance,
                )
        else:
            with errors_of("--memory-budget"):
                results = bench_budget(
                    loaded,
                    specs,
                    context=context,
                    budget=int(memory_budget * GIB),
                    steps=steps,
                    attention=attention,
                    on_progress=advance,
                )
    title = f"{'after' if memory_budget is None else 'up to'} {context:,} tokens"
    rows = [result.as_dict() for result in results]
    if peaks:
        del loaded
        with progress() as bar:
            for row, result in bar.track(list(zip(rows, results, strict=True)), description="peak memory"):
                spec = next(spec for spec in specs if spec.name == result.cache)
                tokens = result.context if memory_budget is None else context - steps - WARMUP
                peak = bench_memory(spec, model, dtype.torch, tokens, result.batch, steps=3)
                row |= {"peak_rise": peak.peak_rise, "live_peak_rise": peak.live_peak_rise}
    columns = ["cache", "batch", "tokens/s", "step, ms", "of full", "quartiles", "held", *(["peak"] if peaks else [])]
    table = _result_table(*columns, title=title)
    for row, result in zip(rows, results, strict=True):
        timing, speedup = result.timing, result.speedup
        table.add_row(
            result.cache,
            str(result.batch),
            f"{result.tokens_per_second:.1f}",
            f"{1e3 * timing.median:.1f}",
            "-" if speedup is None else f"{speedup.median:.2f}x",
            "-" if speedup is None else f"{speedup.low:.2f}-{speedup.high:.2f}",
            megabytes(result.held),
            *([megabytes(row["peak_rise"])] if peaks else []),
        )
    Console().print(table)
    write_json(json_file, "generate", arguments, results=rows)


@bench.command()
def memory(
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 4000,
    cache: Annotated[str, typer.Option(help=f"Separated by commas: {CACHE_HELP}")] = "full,logquant",
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    json_file: Json = None,
) -> None:
    """Prefill with each cache in processes of its own: peaks, bytes held, and what the formula says they are.

    The peak is that of the process as malloc leaves it, then without what malloc keeps of freed memory.
    """
    arguments = dict(locals())
    from ..bench.memory import bench_memory
    from ..methods.registry import parse_caches

    with errors_of("--cache"):
        specs: list[CacheSpec] = parse_caches(cache)
    results = []
    with progress() as bar:
        for spec in bar.track(specs, description="prefill"):
            results.append(bench_memory(spec, model, dtype.torch, context))
    table = Table("cache", "peak rise", "of live memory", "held", "formula", title=f"prefill of {context:,} tokens")
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        verdict = "-" if result.predicted is None else megabytes(result.predicted)
        verdict = "equal" if result.held == result.predicted else verdict
        peaks = megabytes(result.peak_rise), megabytes(result.live_peak_rise)
        table.add_row(result.cache, *peaks, megabytes(result.held), verdict)
    Console().print(table)
    write_json(json_file, "memory", arguments, results=[result.as_dict() for result in results])


# ----------------------------------------------------------------------------------------------------------- report
@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="What --json of eval, plan or bench has written.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page with the tables and plots of results."""
    try:
        from .report import render
    except ImportError as error:
        raise SystemExit(f"reports need more packages ({error}): pip install 'logquant[report]'") from error

    with errors_of("results"):
        page = render(results)
    with errors_of("--output"):
        output.write_text(page, encoding="utf-8")
    typer.echo(f"{output}: {len(results)} results, {len(page) / 1e3:.0f} kB")
