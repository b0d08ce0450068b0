"""``logquant bench generate``: tokens per second of whole decoding, cache by cache, and the bytes each cache holds.

At one batch size for all caches, or at the largest that fits into a number of bytes, for each cache its own.

A full cache is decoded in two forms. Without a mask transformers hands query heads to torch with ``enable_gqa``, which
is slow on CPUs; with one, as padded batches have it, it hands those of a KV head over as its query tokens. Which is
faster depends on machine, torch and transformers, and a comparison with the slower one alone would be worth little.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ..attention.call import AttentionCall
from ..cache.layer import LogQuantLayer
from ..compat import as_argument
from ..methods.accounting import cache_nbytes, commit
from ..methods.quanto import Quanto
from ..methods.registry import CacheSpec
from ..plan import Plan, head_shape, plan
from .timing import WARMUP, Timing, clock_of, time_interleaved


@dataclass(frozen=True)
class GenerateResult:
    """Decoding of one batch size with one cache.

    Args:
        cache: its name.
        batch: sequences decoded at once.
        context: tokens of the prompt; within a budget those at the end.
        timing: of one step, that is of one token of each sequence.
        held: bytes of the cache's tensors after the last step.
        speedups: tokens a second in parts of the full cache's, round by round, by the name of its form, the faster one
            first; empty without a full cache.
        predicted: bytes that they were to be at most (:func:`logquant.plan.plan`); None if not asked for.
    """

    cache: str
    batch: int
    context: int
    timing: Timing
    held: int
    speedups: dict[str, Timing] = field(default_factory=dict)
    predicted: int | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.timing.median

    @property
    def speedup(self) -> Timing | None:
        """Over the faster form of the full cache."""
        return next(iter(self.speedups.values()), None)

    def as_dict(self) -> dict[str, Any]:
        speedups = {name: speedup.as_dict() for name, speedup in self.speedups.items()}
        return {
            **vars(self),
            "tokens_per_second": self.tokens_per_second,
            "timing": self.timing.as_dict(),
            "speedup": next(iter(speedups.values()), None),
            "speedups": speedups,
        }


@dataclass
class Contender:
    """What decodes one token of each sequence at a time.

    Args:
        cache: what it decodes into.
        tokens: ``[B, 1]``, what it is given at every step.
        attention: the implementation.
        masked: whether there is a mask, which hides one token.
        passing: whether its tokens are taken back after each step, for another contender has the same cache.
    """

    cache: Cache
    tokens: Tensor
    attention: str = "logquant"
    masked: bool = False
    passing: bool = False


def forms_of(spec: CacheSpec, attention: Mapping[str, str] | None = None) -> dict[str, bool]:
    """The names under which a cache is decoded, and whether there is a mask."""
    if not spec.is_full or spec.name in (attention or {}):
        return {spec.name: False}
    return {f"{spec.name}, no mask": False, f"{spec.name}, masked": True}


def prefilled(spec: CacheSpec, model: PreTrainedModel, prompt: Tensor, batch: int, exact: Cache | None = None) -> Cache:
    """A cache in which each of ``batch`` sequences holds the same prompt, which is run once where that is possible.

    Args:
        spec: the cache.
        model: what runs the prompt.
        prompt: ``[1, T]``.
        batch: sequences.
        exact: a ``DynamicCache`` that holds the prompt. Other caches take keys and values from it then, as a prompt
            attends to itself exactly whatever cache there is.
    """
    cache = spec.make(model.config)
    if isinstance(spec.settings, Quanto) and exact is not None:  # it cannot repeat what it has quantised
        return _take(cache, model, exact, batch)
    if spec.is_baseline:
        return _run(model, prompt.expand(batch, -1), cache)
    if exact is None or any(type(layer) is not DynamicLayer for layer in exact.layers):
        cache = _run(model, prompt, cache)
    else:
        cache = copy.deepcopy(exact) if spec.is_full else _take(cache, model, exact, 1)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    return cache


def _run(model: PreTrainedModel, prompt: Tensor, cache: Cache) -> Cache:
    model(prompt, **as_argument(cache), logits_to_keep=1)
    return cache


def _take(cache: Cache, model: PreTrainedModel, exact: Cache, batch: int) -> Cache:
    """Give a cache the keys and values of a prompt, for each of ``batch`` sequences."""
    group = head_shape(model.config).group
    layer: Any
    full: Any
    for layer, full in zip(cache.layers, exact.layers, strict=True):
        keys, values = (x.repeat_interleave(batch, 0) for x in (full.keys, full.values))
        handle, _ = layer.update(keys, values)
        if isinstance(layer, LogQuantLayer):
            # Queries are not at hand. Others in their place change neither bytes nor time of what follows.
            queries = keys.repeat_interleave(group, 1)
            handle.kv_view.observe(AttentionCall(queries, None, keys.shape[-1] ** -0.5))
    return cache


def contenders_after(
    prompt: Tensor,
    model: PreTrainedModel,
    specs: list[CacheSpec],
    batch: int,
    exact: Cache | None = None,
    attention: Mapping[str, str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Contender]:
    """By name, what decodes after a prompt; arguments as for :func:`prefilled` and :func:`bench_generate`."""
    caches = {}
    for spec in specs:
        caches[spec.name] = prefilled(spec, model, prompt, batch, exact)
        on_progress()
    tokens = prompt[:, -1:].expand(batch, -1)
    contenders: dict[str, Contender] = {}
    for spec in specs:
        contenders |= _contenders(spec, caches[spec.name], tokens, attention)
    return contenders


@torch.inference_mode()
def bench_generate(
    model: PreTrainedModel,
    specs: list[CacheSpec],
    *,
    context: int,
    batch: int,
    steps: int,
    baseline_steps: int | None = None,
    attention: Mapping[str, str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list[GenerateResult]:
    """Prefill each cache with the same random tokens, then decode, a step with each cache in turn.

    Args:
        model: a causal language model of transformers; its attention implementation becomes ``"logquant"``, which
            serves all caches.
        specs: the caches.
        context: tokens of the prompt, the same for all sequences.
        batch: sequences decoded at once.
        steps: timed steps of each cache, after :data:`WARMUP` that are not.
        baseline_steps: those of caches that are neither LogQuant's nor full, if they are to be fewer.
        attention: implementations that caches are decoded with instead, by name.
        on_progress: called after every prefill and every round of steps.
    """
    model.set_attn_implementation("logquant")
    prompt = random_tokens(model, context)
    exact = _run(model, prompt, DynamicCache(config=model.config)) if len(specs) > 1 else None
    contenders = contenders_after(prompt, model, specs, batch, exact, attention, on_progress)
    del exact
    fewer = {spec.name: baseline_steps for spec in specs if spec.is_baseline} if baseline_steps else {}
    timings = _time_steps(model, contenders, steps, on_progress, fewer)
    fulls = {name: timings[name] for spec in specs for name in forms_of(spec, attention) if name != spec.name}
    fulls = dict(sorted(fulls.items(), key=lambda item: item[1].median))
    return [
        GenerateResult(
            name,
            batch,
            context,
            timing,
            cache_nbytes(contenders[name].cache),
            {other: timing.speedup_over(full) for other, full in fulls.items()},
        )
        for name, timing in timings.items()
    ]


@torch.inference_mode()
def bench_budget(
    model: PreTrainedModel,
    specs: list[CacheSpec],
    *,
    context: int,
    budget: int,
    steps: int,
    attention: Mapping[str, str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list[GenerateResult]:
    """As :func:`bench_generate`, each cache with as many sequences as fit into ``budget`` bytes.

    The sequences of a cache have the same prompt, which is run once; each then holds keys and values of its own.

    Args:
        model, specs, steps, attention, on_progress: as for :func:`bench_generate`.
        context: tokens of a sequence at the end, prompt and decoded.
        budget: bytes for keys and values.

    Raises:
        ValueError: not even one sequence fits, or a cache whose bytes the configuration does not tell.
    """
    model.set_attn_implementation("logquant")
    prompt = random_tokens(model, context - steps - WARMUP)
    contenders: dict[str, Contender] = {}
    plans: dict[str, Plan] = {}
    for spec in specs:
        planned = plan(spec, model.config, budget=budget, tokens=context, itemsize=model.dtype.itemsize)
        if planned.batch < 1:
            raise ValueError(f"budget must be at least {planned.nbytes} bytes for cache {spec.name!r}, got {budget}")
        tokens = prompt[:, -1:].expand(planned.batch, -1)
        contenders |= _contenders(spec, prefilled(spec, model, prompt, planned.batch), tokens, attention)
        plans |= dict.fromkeys(forms_of(spec, attention), planned)
        on_progress()
    timings = _time_steps(model, contenders, steps, on_progress)
    return [
        GenerateResult(
            name,
            p.batch,
            context,
            timings[name],
            cache_nbytes(contenders[name].cache),
            predicted=p.batch * p.nbytes,
        )
        for name, p in plans.items()
    ]


def random_tokens(model: PreTrainedModel, tokens: int) -> Tensor:
    """A prompt, int64 ``[1, tokens]``, always the same one."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(model.device)


def _contenders(
    spec: CacheSpec, cache: Cache, tokens: Tensor, attention: Mapping[str, str] | None
) -> dict[str, Contender]:
    """By name, what decodes into a cache: one, or the two forms of a full one, which share it where they can."""
    implementation = (attention or {}).get(spec.name, "logquant")
    *others, last = forms_of(spec, attention).items()
    # A sliding layer cannot take a token back.
    shared = all(type(layer) is DynamicLayer for layer in cache.layers)
    found = {}
    for name, masked in others:
        own = cache if shared else copy.deepcopy(cache)
        found[name] = Contender(own, tokens, implementation, masked, passing=shared)
    return found | {last[0]: Contender(cache, tokens, implementation, masked=last[1])}


def steps_of(
    model: PreTrainedModel, contenders: Mapping[str, Contender], steps: int
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Callable[[], None]]]:
    """What :func:`~.timing.time_interleaved` calls for each contender, and after it (``after``).

    Args:
        model: what decodes.
        contenders: by name.
        steps: how often each is called, after :data:`WARMUP` times that are not timed.
    """
    in_use = "logquant"

    def step_with(contender: Contender) -> Callable[[], Tensor]:
        cache, tokens = contender.cache, contender.tokens
        mask = None
        if contender.masked:
            last = cache.get_seq_length() + steps + WARMUP
            mask = torch.ones(len(tokens), last, dtype=torch.long, device=tokens.device)
            mask[0, 0] = 0  # or transformers would see that it hides nothing, and drop it

        def step() -> Tensor:
            nonlocal in_use
            if in_use != contender.attention:  # takes less than a millisecond
                in_use = contender.attention
                model.set_attn_implementation(in_use)
            seen = None if mask is None else mask[:, : cache.get_seq_length() + 1]
            logits: Tensor = model(tokens, attention_mask=seen, **as_argument(cache), logits_to_keep=1).logits
            return logits.argmax(-1)

        return step

    after: dict[str, Callable[[], None]] = {
        name: partial(c.cache.crop, -1) for name, c in contenders.items() if c.passing
    }
    return {name: step_with(contender) for name, contender in contenders.items()}, after


def _time_steps(
    model: PreTrainedModel,
    contenders: dict[str, Contender],
    steps: int,
    on_progress: Callable[[], None],
    fewer: dict[str, int] | None = None,
) -> dict[str, Timing]:
    """Decode one token of each sequence with each contender in turn; the tokens are committed afterwards."""
    calls, after = steps_of(model, contenders, steps)
    clock = clock_of(model.device.type)
    try:
        timings = time_interleaved(calls, steps, fewer=fewer, after=after, on_progress=on_progress, clock=clock)
    finally:
        model.set_attn_implementation("logquant")
    for contender in contenders.values():
        commit(contender.cache)
    return timings
