"""Chats with vLLM's OpenAI server over LogQuant's cache: ``python -m benchmarks.vllm_server --calibration FILE``.

Clients chat at once over loopback, for some minutes: each asks, in the same words at first, until its chat is long, and
starts another. Every now and then one hangs up in the middle of an answer. What is printed: the server's own counters,
its memory over time, and what blocks it holds when all have gone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.vllm_engine import MIB
from logquant.models import default_model

SYSTEM = (Path(__file__).parents[1] / "LICENSE").read_text()
QUESTIONS = (
    "What may I do with it?",
    "Tell me more about the conditions, in as many words as you like.",
    "And what about patents?",
    "Which of these is the most important, and why?",
    "Say all of that again, for a child.",
)
HANG_UP_EVERY = 5
"""Answers after which a client closes its connection in the middle of one."""
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""The engine in a process of its own, as a server has it."""


@dataclass
class Found:
    """What a run found out. Memory is of the server's processes, in bytes, ten times during the run."""

    answers: int = 0
    hung_up: int = 0
    errors: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    blocks_in_use: float = 1.0


@contextlib.contextmanager
def server(arguments: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a server that answers, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"logquant": {"calibration": str(Path(arguments.calibration).resolve())}}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", arguments.model, "--served-model-name", "model", "--dtype", arguments.dtype]
    command += ["--attention-backend", "CUSTOM", "--additional-config", json.dumps(settings), "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(int(arguments.mib * MIB)), "--max-model-len", str(arguments.longest)]
    command += ["--max-num-seqs", str(arguments.clients), "--max-num-batched-tokens", str(arguments.chunk)]
    with open(arguments.log or os.devnull, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + arguments.start_seconds
        while not healthy(address):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the server did not start; --log FILE keeps what it says")
            time.sleep(1)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def counters(address: str) -> dict[str, float]:
    """The sums of vLLM's counters and gauges, by name."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{address}/metrics", timeout=30).text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def memory(process: psutil.Process) -> int:
    """Bytes that a process and those it has started hold for themselves."""
    found = 0
    for own in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += own.memory_full_info().uss
    return found


def chat(number: int, address: str, arguments: argparse.Namespace, until: float, found: Found) -> None:
    """One client: chats one after another, and hangs up now and then."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)
    asked = number
    while time.monotonic() < until:
        messages = [{"role": "system", "content": SYSTEM[: arguments.system]}]
        while time.monotonic() < until:
            asked += 1
            messages.append({"role": "user", "content": QUESTIONS[asked % len(QUESTIONS)]})
            hang_up = asked % HANG_UP_EVERY == 0
            try:
                text, tokens = answer(client, messages, arguments.new, 5 if hang_up else None)
            except openai.BadRequestError as error:
                if "maximum" in str(error):
                    break  # the chat has become as long as it may: the next one
                found.errors.append(repr(error))
                return
            except Exception as error:  # whatever it is, it is a finding
                found.errors.append(repr(error))
                return
            if hang_up:
                found.hung_up += 1
                break
            if not tokens:
                found.errors.append("an empty answer")
            found.answers += 1
            messages.append({"role": "assistant", "content": text})


def answer(client: openai.OpenAI, messages: list, new: int, stop_after: int | None) -> tuple[str, int]:
    """The text of an answer and its parts; after ``stop_after`` parts the connection is closed."""
    parts: list[str] = []
    extra = {"ignore_eos": True}
    with client.chat.completions.create(
        model="model", messages=messages, max_tokens=new, temperature=0.7, stream=True, extra_body=extra
    ) as stream:
        for event in stream:
            if event.choices and event.choices[0].delta.content:
                parts.append(event.choices[0].delta.content)
            if stop_after is not None and len(parts) >= stop_after:
                break
    return "".join(parts), len(parts)


def run(arguments: argparse.Namespace) -> Found:
    found = Found()
    with server(arguments) as (address, process):
        before = counters(address)
        until = time.monotonic() + 60 * arguments.minutes
        clients = [
            threading.Thread(target=chat, args=(number, address, arguments, until, found))
            for number in range(arguments.clients)
        ]
        for client in clients:
            client.start()
        while time.monotonic() < until:
            time.sleep(6 * arguments.minutes)
            found.memory.append(memory(process))
        for client in clients:
            client.join()
        found.blocks_in_use = blocks_in_use(address)
        after = counters(address)
    names = ("prefix_cache_hits", "prefix_cache_queries", "num_preemptions", "prompt_tokens", "generation_tokens")
    found.counters = {name: after[f"vllm:{name}_total"] - before[f"vllm:{name}_total"] for name in names}
    return found


def blocks_in_use(address: str, seconds: float = 30) -> float:
    """The share of blocks that requests hold, once the server has noticed that all clients have gone."""
    until = time.monotonic() + seconds
    while True:
        now = counters(address)
        if now["vllm:kv_cache_usage_perc"] == 0 or time.monotonic() > until:
            return now["vllm:kv_cache_usage_perc"]
        time.sleep(0.5)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--mib", type=float, default=40)
    parser.add_argument("--longest", type=int, default=4096, help="tokens of a chat at most")
    parser.add_argument("--system", type=int, default=4000, help="characters that all chats begin with")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--chunk", type=int, default=256, help="max_num_batched_tokens")
    parser.add_argument("--start-seconds", type=float, default=300)
    parser.add_argument("--log", type=Path, help="where what the server says goes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    found = run(arguments)
    text = json.dumps(asdict(found), indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    if found.errors or found.blocks_in_use:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
