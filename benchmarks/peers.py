"""Decoding beside other programs: ``python -m benchmarks.peers --json FILE``.

The same small model in llama.cpp (the package ``xllamacpp``), OpenVINO GenAI (``openvino-genai``), transformers and
LogQuant, each cache after the same prompts, a turn with each in every round. What is not installed is left out, and the
result says so. llama.cpp and OpenVINO decode with the 4-bit weights of the GGUF file, the others with the same weights
in their dtype: so a step of few tokens tells weights apart, and only its growth with the context tells caches apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from logquant import machine, models
from logquant.bench.generate import contenders_after, random_tokens, steps_of
from logquant.bench.timing import Timing, time_interleaved
from logquant.compat import as_argument
from logquant.methods.registry import CacheSpec, parse_caches

DTYPES = (torch.bfloat16, torch.float32)
CACHES = "full,logquant,log"
QUANTISED = {torch.bfloat16: ("quanto", "hqq")}
"""transformers' quantised caches, decoded after short prompts alone (``--longest-slow``)."""

SLOPE_FROM = 2000
"""Tokens from which on a step is linear in the context: LogQuant holds shorter ones exact, in part or as a whole."""

STEPS = 8
"""Steps of another program in a turn: it is asked for a text, not for a token."""


Step = Callable[[], Any]
"""Takes a step; what another program's returns are the seconds that it took."""


class Peer(Protocol):
    """Another program with one kind of KV cache. ``slow``: reading a long prompt takes it many minutes."""

    name: str
    slow: bool

    def after(self, prompt: list[int]) -> Step:
        """Have a prompt in the cache. What is returned tells the seconds of a step after it, of :data:`STEPS`."""


class LlamaCpp:
    """llama.cpp with flash attention.

    Args:
        file: the model, GGUF.
        cache_type: of ggml, for keys and values.
        states: where what it has read is kept from one run to the next; None: nowhere.
    """

    def __init__(self, file: Path, cache_type: str, states: Path | None = None) -> None:
        self.name, self.slow = f"llama.cpp, {cache_type}", cache_type != "f16"
        self._file, self._type, self._states = file, cache_type, states

    def after(self, prompt: list[int]) -> LlamaText:
        return LlamaText(self._file, self._type, prompt, self._states)


class LlamaText:
    """One prompt in llama.cpp's server, called in this process; arguments as for :class:`LlamaCpp`."""

    def __init__(self, file: Path, cache_type: str, prompt: list[int], states: Path | None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.verbosity = len(prompt) + 256, 1, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache_type.upper()}")
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        # No copies of the cache beside it.
        params.cache_ram_mib = params.n_ctx_checkpoints = 0
        if states is not None:
            states.mkdir(parents=True, exist_ok=True)
            params.slot_save_path, params.endpoint_slots = f"{states.resolve()}/", True
        self._server, self._prompt = xllamacpp.Server(params), prompt
        name = f"{file.stem}-{cache_type}-{len(prompt)}.bin"
        if states is not None and (states / name).exists():
            self._slot("restore", name)
            return
        self()
        if states is not None:
            self._slot("save", name)

    def ask(self) -> dict[str, Any]:
        """The server's answer. Its first token comes with the end of the prompt, which is computed again."""
        answer: dict[str, Any] = self._server.handle_completions(
            {"prompt": self._prompt, "max_tokens": STEPS + 1, "ignore_eos": True, "temperature": 0.0}
        )
        return answer

    def __call__(self) -> float:
        timings = self.ask()["timings"]
        if timings["predicted_n"] != STEPS + 1:
            raise RuntimeError(f"llama.cpp must write {STEPS + 1} tokens, wrote {timings['predicted_n']}")
        return float(timings["predicted_per_token_ms"]) / 1e3

    def _slot(self, action: str, name: str) -> None:
        request = urllib.request.Request(
            f"{self._server.listening_address}/slots/0?action={action}",
            data=json.dumps({"filename": name}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).read()


class OpenVino:
    """OpenVINO GenAI with its paged cache, which finds the prompt that it has read.

    Args:
        file: the model, GGUF.
        precision: of keys and values.
        longest: tokens that its cache has room for, at least.
    """

    def __init__(self, file: Path, precision: str, longest: int) -> None:
        import openvino_genai

        self.name, self.slow = f"OpenVINO GenAI, {precision}", False
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = 1 + longest // 16_384  # GB; a token of this model takes 23 KB with f16
        scheduler.max_num_batched_tokens = 4096
        self._pipeline = openvino_genai.LLMPipeline(
            str(file),
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=torch.get_num_threads(),
            KEY_CACHE_PRECISION=precision,
            VALUE_CACHE_PRECISION=precision,
        )
        self._config = openvino_genai.GenerationConfig()
        self._config.max_new_tokens = self._config.min_new_tokens = STEPS + 1
        self._config.ignore_eos, self._config.do_sample = True, False

    def after(self, prompt: list[int]) -> Step:
        import openvino

        tokens = openvino.Tensor(torch.tensor([prompt]).numpy())

        def step() -> float:
            answer = self._pipeline.generate(tokens, self._config)
            durations = list(answer.perf_metrics.raw_metrics.m_durations)
            if len(durations) != STEPS:
                raise RuntimeError(f"OpenVINO GenAI must take {STEPS} steps after one token, took {len(durations)}")
            return Timing.of(durations).median / 1e6

        step()
        return step


def other_programs(file: Path, longest: int, states: Path | None) -> tuple[list[Peer], dict[str, str]]:
    """The programs that are installed, and why others are left out, by name."""
    peers: list[Peer] = []
    skipped = {}
    kinds: list[tuple[str, str, Callable[[str], Peer], tuple[str, ...]]] = [
        ("llama.cpp", "xllamacpp", lambda kind: LlamaCpp(file, kind, states), ("f16", "q8_0", "q4_0")),
        ("OpenVINO GenAI", "openvino_genai", lambda kind: OpenVino(file, kind, longest), ("f16", "u8", "u4")),
    ]
    for name, module, make, caches in kinds:
        if importlib.util.find_spec(module) is None:
            skipped[name] = f"{module.replace('_', '-')} is not installed"
        else:
            peers += [make(kind) for kind in caches]
    return peers, skipped


def installed(names: str) -> tuple[list[CacheSpec], dict[str, str]]:
    """Caches by name, separated by commas, without those whose package is missing, and why."""
    specs, skipped = [], {}
    for name in names.split(","):
        try:
            specs += parse_caches(name)
        except ImportError as error:
            skipped[name] = str(error)
    return specs, skipped


@dataclass(frozen=True)
class Row:
    """A step of one contender after one prompt."""

    name: str
    context: int
    timing: Timing

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "context": self.context,
            "tokens_per_second": 1 / self.timing.median,
            "step": self.timing.as_dict(),
        }


@torch.inference_mode()
def contenders(
    loaded: dict[torch.dtype, Any], peers: list[Peer], context: int, rounds: int, caches: dict[torch.dtype, str]
) -> tuple[dict[str, Step], dict[str, Callable[[], None]], dict[str, str]]:
    """What takes a step after a prompt, by name; what is called after it; and why some are left out.

    Args:
        loaded: models, by dtype.
        peers: other programs.
        context: tokens of the prompt.
        rounds: timed turns of each.
        caches: names, separated by commas, by dtype.
    """
    first = next(iter(loaded.values()))
    prompt = random_tokens(first, context)
    # Read once: what a cache holds changes nothing about its time.
    exact = DynamicCache(config=first.config)
    first(prompt, **as_argument(exact), logits_to_keep=1)
    calls: dict[str, Step] = {peer.name: peer.after(prompt[0].tolist()) for peer in peers}
    after: dict[str, Callable[[], None]] = {}
    skipped = {}
    for dtype, model in loaded.items():
        for layer in exact.layers:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        specs, missing = installed(caches[dtype])
        kind = str(dtype).removeprefix("torch.")
        skipped |= missing
        steps, back = steps_of(model, contenders_after(prompt, model, specs, 1, exact), rounds)
        calls |= {f"{_program(name)}, {kind}": step for name, step in steps.items()}
        after |= {f"{_program(name)}, {kind}": undo for name, undo in back.items()}
    return calls, after, skipped


@torch.inference_mode()
def measure(
    loaded: dict[torch.dtype, Any],
    peers: list[Peer],
    contexts: dict[int, dict[torch.dtype, str]],
    rounds: int,
    longest_slow: int,
) -> tuple[list[Row], dict[str, str]]:
    """A turn with each contender after each prompt, in every round: slopes are small, and machines are not quiet.

    Args:
        loaded, peers, rounds: as for :func:`contenders`.
        contexts: tokens of the prompts, each with its caches (:func:`contenders`).
        longest_slow: tokens that slow peers read at most.

    Returns:
        What each took, and why some are left out.
    """
    calls: dict[Any, Step] = {}
    after: dict[Any, Callable[[], None]] = {}
    skipped = {}
    for context, caches in contexts.items():
        taken = [peer for peer in peers if context <= longest_slow or not peer.slow]
        steps, undo, missing = contenders(loaded, taken, context, rounds, caches)
        calls |= {(name, context): step for name, step in steps.items()}
        after |= {(name, context): back for name, back in undo.items()}
        skipped |= missing
        print(f"{context} tokens are read", file=sys.stderr, flush=True)
    # By contender, then by context.
    names = list(dict.fromkeys(name for name, _ in calls))
    calls = dict(sorted(calls.items(), key=lambda item: (names.index(item[0][0]), item[0][1])))
    timings = time_interleaved(calls, rounds, before_each=_let_threads_sleep, after=after, clock=_seconds)
    return [Row(name, context, timing) for (name, context), timing in timings.items()], skipped


def _program(cache: str) -> str:
    return f"LogQuant, {cache}" if cache in ("logquant", "log") else f"transformers, {cache}"


def _let_threads_sleep() -> None:
    """Threads of the program before wait busily for more work, some milliseconds long."""
    time.sleep(0.02)


def _seconds(call: Callable[[], Any]) -> float:
    """Of a call; of another program those that it tells."""
    start = time.perf_counter()
    answer = call()
    return answer if isinstance(answer, float) else time.perf_counter() - start


def slopes(rows: list[Row]) -> dict[str, float]:
    """Microseconds by which a step grows with a token of context, by contender: a line of least squares through its
    medians from :data:`SLOPE_FROM` tokens on. Those with fewer than two are left out."""
    found = {}
    for name in dict.fromkeys(row.name for row in rows):
        points = [(row.context, row.timing.median) for row in rows if row.name == name and row.context >= SLOPE_FROM]
        if len({context for context, _ in points}) > 1:
            x, y = torch.tensor(points, dtype=torch.float64).T
            found[name] = float(1e6 * ((x - x.mean()) @ y) / (x - x.mean()).square().sum())
    return found


def table(rows: list[Row]) -> Iterator[str]:
    """Lines of Markdown: tokens a second by context, and the slope."""
    contexts, grown = sorted({row.context for row in rows}), slopes(rows)
    speed = {(row.name, row.context): f"{1 / row.timing.median:.1f}" for row in rows}
    yield f"| | {' | '.join(f'{context:,}' for context in contexts)} | us a token |"
    yield "|---" * (len(contexts) + 2) + "|"
    for name in dict.fromkeys(row.name for row in rows):
        cells = [speed.get((name, context), "-") for context in contexts]
        yield f"| {name} | {' | '.join(cells)} | {f'{grown[name]:.2f}' if name in grown else '-'} |"


def gguf_file() -> Path:
    """The default model, as its package carries it.

    Raises:
        ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec(models.PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(f"the package {models.PACKAGE.replace('_', '-')} is needed, which carries the model")
    return Path(spec.origin).parent / models.PACKAGE_GGUF


@contextmanager
def written(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result, which is written whatever happens: a run that is ended leaves what it has measured."""
    names = ("xllamacpp", "openvino-genai", "optimum-quanto", "hqq")
    modules = ("xllamacpp", "openvino_genai", "optimum", "hqq")
    result: dict[str, Any] = {
        "kind": "peers",
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "arguments": vars(arguments),
        "machine": machine.describe(),
        "packages": {n: version(n) for n, m in zip(names, modules, strict=True) if importlib.util.find_spec(m)},
        "skipped": {},
        "results": [],
    }
    try:
        yield result
    finally:
        rows = result["results"]
        result |= {"slopes": slopes(rows), "results": [row.as_dict() for row in rows]}
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
        print("\n".join(table(rows)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="256,2048,6144", help="tokens of the prompts, in rising order")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--longest-slow", type=int, default=6144, help="tokens that slow peers read at most")
    parser.add_argument("--states", type=Path, help="directory that keeps what llama.cpp has read for the next run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    contexts = [int(context) for context in arguments.contexts.split(",")]
    with written(arguments) as result:
        loaded = {dtype: models.load(dtype=dtype)[0] for dtype in DTYPES}
        peers, result["skipped"] = other_programs(gguf_file(), max(contexts) + 256, arguments.states)
        names = {
            context: {
                dtype: ",".join([CACHES, *(QUANTISED.get(dtype, ()) if context <= arguments.longest_slow else ())])
                for dtype in loaded
            }
            for context in contexts
        }
        result["results"], skipped = measure(loaded, peers, names, arguments.rounds, arguments.longest_slow)
        result["skipped"] |= skipped
        if max(contexts) > arguments.longest_slow:
            result["skipped"] |= dict.fromkeys(
                [
                    *(peer.name for peer in peers if peer.slow),
                    *(name for names in QUANTISED.values() for name in names),
                ],
                f"beyond {arguments.longest_slow} tokens, which take it many minutes",
            )


if __name__ == "__main__":
    main()
