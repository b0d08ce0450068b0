"""``logquant generate``: a model's answer, as it is written, and what it cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .interrupt import Interrupt, interruptible
from .shared import (
    CACHE_HELP,
    Dtype,
    Json,
    Model,
    bad,
    check_fits,
    check_model,
    finite,
    load_model,
    megabytes,
    not_among,
    one_cache,
    texts,
    with_settings,
    write_json,
)

if TYPE_CHECKING:
    import torch

    from ..methods.registry import CacheSpec

LONG = 32_768
"""Tokens of the longer text that a short one is compared with."""


def command(
    prompt: Annotated[str | None, typer.Option(help="What to continue, or to answer.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file that holds it; comes before --prompt.")] = None,
    model: Model = None,
    cache: Annotated[str, typer.Option(help=CACHE_HELP)] = "logquant",
    bits: Annotated[int | None, typer.Option(help="Bits of a quantised element: 2, 4 or 8.")] = None,
    key_bits: Annotated[int | None, typer.Option(help="The same for keys alone.")] = None,
    value_bits: Annotated[int | None, typer.Option(help="The same for values alone.")] = None,
    window: Annotated[int | None, typer.Option(help="W: between 2W and 3W tokens stay exact.")] = None,
    page_tokens: Annotated[int | None, typer.Option(help="Tokens of a page: 32, 64 or 128.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token, always.", callback=finite)
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample from this much probability; all by default.", callback=finite),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    chat: Annotated[bool | None, typer.Option(help="Use the chat template; by default if there is one.")] = None,
    json_file: Json = None,
) -> None:
    """Stream the model's answer to a prompt, then say what it cost."""
    arguments = dict(locals())
    settings = {name: arguments[name] for name in ("bits", "key_bits", "value_bits", "window", "page_tokens")}
    if top_p is not None and temperature == 0:
        raise bad("--top-p", "needs sampling, which --temperature above 0 asks for")
    text = _prompt_text(prompt, prompt_file)
    if prompt_file is not None:
        not_among("--json", json_file, [prompt_file])
    check_model(model)
    spec = with_settings("--cache", one_cache("--cache", cache), **settings)
    import torch

    from ..compat import as_argument
    from ..methods.accounting import cache_nbytes, commit

    loaded, tokenizer = load_model(model, dtype)
    check_fits("--cache", [spec], loaded.config)
    ids = _prompt_ids(tokenizer, text, chat)

    kv_cache = spec.make(loaded.config)
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": 1.0 if top_p is None else top_p, "top_k": 0} if temperature else {}
    streamer = _timed_streamer(tokenizer)
    with interruptible() as interrupted:
        loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **as_argument(kv_cache),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            streamer=streamer,
            stopping_criteria=[_stopping(interrupted)],
            **sampling,
        )
    new = streamer.tokens
    if new:
        streamer.end()  # what a second Ctrl-C has left unwritten
        if not interrupted():
            commit(kv_cache)
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
        if result["bytes"] >= result["full_precision_bytes"]:
            _say_what_longer_texts_take(spec, loaded.config, dtype.torch.itemsize)
        write_json(json_file, "text", arguments, **result)
    interrupted.leave()


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    parts = [] if prompt_file is None else texts("--prompt-file", [prompt_file])
    if prompt is not None:
        parts.append(prompt)
    if not any(part.strip() for part in parts):
        raise bad("--prompt", "needed: --prompt TEXT, --prompt-file FILE, or both")
    return "\n\n".join(parts)


def _prompt_ids(tokenizer: Any, text: str, chat: bool | None) -> torch.Tensor:
    """Token ids ``[1, T]``."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise bad("--chat", "this model's tokenizer has no chat template; use --no-chat")
    if not has_template or chat is False:
        ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
        return ids
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
    return ids


def _timed_streamer(tokenizer: Any) -> Any:
    """transformers' streamer of text, which also notes the tokens and when they come."""
    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            if self.times:  # the first time it is the prompt, before the prefill
                self.tokens += value.flatten().tolist()
            self.times.append(time.perf_counter())
            super().put(value)

        def end(self) -> None:
            if not self.ended:  # transformers calls it, too, unless it was interrupted
                self.ended = True
                super().end()

        def seconds(self) -> tuple[float, float]:
            """Of the prefill and of all tokens after the first."""
            return self.times[1] - self.times[0], self.times[-1] - self.times[1]

    return TimedStreamer()


def _stopping(interrupted: Interrupt) -> Any:
    """What has ``generate`` stop after a token."""
    import torch
    from transformers import StoppingCriteria

    class Interrupted(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), interrupted(), device=input_ids.device)

    return Interrupted()


def _say_what_longer_texts_take(spec: CacheSpec, config: Any, itemsize: int) -> None:
    """On stderr; nothing of caches whose bytes the configuration does not tell."""
    from ..methods.registry import parse_cache
    from ..plan import pays_from, sequence_nbytes

    full = parse_cache("full")
    try:
        least = pays_from(spec, config, itemsize)
        held, plain = (sequence_nbytes(each, config, LONG, itemsize, decoding=True) for each in (spec, full))
    except ValueError:
        return
    typer.echo(
        f"[{spec.name}] the text is short: this cache pays from {least:,} tokens on; {LONG:,} tokens would take "
        f"{megabytes(held)}, in full precision {megabytes(plain)}: {plain / held:.2f}x",
        err=True,
    )


def _summary(result: dict[str, Any]) -> str:
    """One line."""
    speed = "" if result["tokens_per_second"] is None else f", {result['tokens_per_second']:.1f} tokens/s"
    held, full = result["bytes"], result["full_precision_bytes"]
    return (
        f"[{result['cache']}] {result['prompt_tokens']} + {result['new_tokens']} tokens{speed}; "
        f"cache {megabytes(held)}, in full precision {megabytes(full)}: {full / held:.2f}x"
    )
