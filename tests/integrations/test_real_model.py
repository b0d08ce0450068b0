"""LogQuantCache with SmolLM2-135M-Instruct, a real model small enough for every test run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

from logquant import LogQuantCache
from logquant.cache.layer import LogQuantLayer
from logquant.cache.sizes import choice_nbytes, head_nbytes
from logquant.compat import as_argument
from tests.helpers.layers import PLAIN
from tests.helpers.layers import contents as layer_contents


@pytest.fixture(scope="module")
def prompt(smollm2_tokenizer, data_dir) -> Tensor:
    """1,000 tokens of a book."""
    text = (data_dir / "dev/books/frankenstein_84.txt").read_text()
    return smollm2_tokenizer(text, return_tensors="pt").input_ids[:, :1000]


def greedy(model, ids: Tensor, cache, count: int) -> Tensor:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **as_argument(cache),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("implementation", ["logquant", "sdpa"])
def test_until_the_window_overflows_tokens_are_those_of_a_full_cache(smollm2, prompt, implementation):
    smollm2.set_attn_implementation(implementation)
    cache = LogQuantCache(smollm2.config)
    got = greedy(smollm2, prompt[:, :161], cache, 30)
    assert cache.layers[0].rows.packed == 0 and cache.get_seq_length() == 190
    assert torch.equal(got, greedy(smollm2, prompt[:, :161], DynamicCache(config=smollm2.config), 30))


def test_100_tokens_at_8_bits_are_those_of_a_full_cache(smollm2, prompt):
    smollm2.set_attn_implementation("logquant")
    cache = LogQuantCache(smollm2.config, bits=8)
    got = greedy(smollm2, prompt, cache, 100)
    assert cache.layers[0].rows.packed == 960
    assert torch.equal(got, greedy(smollm2, prompt, DynamicCache(config=smollm2.config), 100))


@pytest.mark.parametrize("recall", [None, "both(pages=0.25)"])
def test_two_bits_answer_from_the_packed_part_of_the_prompt(smollm2, smollm2_tokenizer, data_dir, recall):
    book = (data_dir / "dev/books/time_machine_35.txt").read_text()
    question = f"{book[:1800]}\n\nMy cat is called Whiskers.\n\n{book[1800:3500]}\n\nWhat is my cat called?"
    chat = [{"role": "user", "content": question}]
    text = smollm2_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = smollm2_tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    cache = LogQuantCache(smollm2.config, recall=recall)
    answer = smollm2_tokenizer.decode(greedy(smollm2, ids, cache, 8)[0])
    where = smollm2_tokenizer(text[: text.index("Whiskers")], return_tensors="pt", add_special_tokens=False)
    assert (
        where.input_ids.shape[1]
        not in cache.layers[0].held.layout.positions(ids.device)[0][cache.layers[0].rows.packed :]
    )
    assert "Whiskers" in answer


@pytest.mark.slow
def test_bytes_held_at_4000_tokens(smollm2, prompt):
    """Pages, column maps, a window of 4 + 3W tokens, the newest 4 queries, positions and sums, to the byte."""
    smollm2.set_attn_implementation("logquant")
    cache = LogQuantCache(smollm2.config)
    with torch.no_grad():
        smollm2(prompt.repeat(1, 4), **as_argument(cache), logits_to_keep=1)
    config = smollm2.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    pages = (4000 - 4 - 2 * 64) // 64
    head_dim, columns = 64, 80
    keys, values = 64 * columns * 2 // 32 + 2 * head_dim // 4, 64 * 2 // 32 * head_dim + 64 // 4
    window, queries = 2 * (4 + 3 * 64) * head_dim * 4, 4 * 3 * head_dim * 4
    packed, exact = 64 * pages, 4000 - 64 * pages
    choice = 2 * packed + 4 * (exact + config.num_key_value_heads * exact)
    head = pages * 4 * (keys + values) + window + queries + 2 * columns
    assert cache.nbytes == heads * head + config.num_hidden_layers * choice
    assert head == head_nbytes(cache.quantization, 4000, head_dim, itemsize=4, query_heads=3)
    assert choice == choice_nbytes(cache.quantization, 4000, config.num_key_value_heads)
    assert cache.full_precision_nbytes == heads * 4000 * 2 * head_dim * 4
    assert all(isinstance(layer, LogQuantLayer) for layer in cache.layers)


@pytest.mark.parametrize("options", [{"bits": 8}, pytest.param({}, marks=pytest.mark.slow)])
def test_a_cache_of_fixed_size_gives_the_tokens_of_one_that_grows(smollm2, prompt, options):
    fixed, grows = (LogQuantCache(smollm2.config, **options, max_length=n) for n in (512, None))
    assert torch.equal(greedy(smollm2, prompt[:, :300], fixed, 40), greedy(smollm2, prompt[:, :300], grows, 40))
    assert fixed.layers[0].rows.packed == 192


@pytest.mark.slow
def test_one_compiled_step_serves_from_300_to_4000_tokens(smollm2, smollm2_tokenizer, data_dir):
    """No graph break, and nothing is compiled anew, whatever becomes of the tokens in between."""
    (ids,) = texts_of(smollm2_tokenizer, data_dir, [4020])
    torch._dynamo.reset()
    counters.clear()
    cache, grows = (LogQuantCache(smollm2.config, max_length=n) for n in (4096, None))
    compiled = torch.compile(smollm2, backend="aot_eager", fullgraph=True)
    begin = 0
    # Chunks are not compiled; single tokens are.
    for end in [300, *range(301, 316), 1000, *range(1001, 1005), 4000, *range(4001, 4011)]:
        part = ids[None, begin:end]
        forward = compiled if end == begin + 1 else smollm2
        cache.make_room()
        with torch.no_grad():
            got = forward(part, logits_to_keep=1, **as_argument(cache)).logits
            want = smollm2(part, logits_to_keep=1, **as_argument(grows)).logits
        assert got.argmax() == want.argmax() and (got - want).abs().max() < 0.02 * want.abs().max(), end
        begin = end
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert cache.layers[0].rows.packed > 3700
    torch._dynamo.reset()


def texts_of(tokenizer, data_dir, lengths: list[int]) -> list[Tensor]:
    """The beginnings of books, in tokens."""
    books = sorted((data_dir / "dev/books").glob("*.txt"))
    return [
        tokenizer(books[i % len(books)].read_text()[500 * i :][: 8 * n], return_tensors="pt").input_ids[0, :n]
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("implementation", "bits", "count"),
    [
        ("logquant", 2, 2),
        pytest.param("logquant", 2, 30, marks=pytest.mark.slow),
        pytest.param("sdpa", 8, 30, marks=pytest.mark.slow),
    ],
)
def test_a_row_of_a_padded_batch_gives_the_tokens_it_gives_alone(
    smollm2, smollm2_tokenizer, data_dir, implementation, bits, count
):
    smollm2.set_attn_implementation(implementation)
    rows = texts_of(smollm2_tokenizer, data_dir, [400, 37, 250, 192, 5])
    padded = torch.stack([torch.cat([torch.zeros(400 - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(400) >= 400 - len(row) for row in rows]).long()
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    together = smollm2.generate(
        padded, attention_mask=mask, **as_argument(LogQuantCache(smollm2.config, bits=bits)), **options
    )[:, 400:]
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(greedy(smollm2, row[None], LogQuantCache(smollm2.config, bits=bits), count)[0], got)


@pytest.mark.slow
def test_beam_search_of_two_prompts_gives_what_each_gives_alone(smollm2, prompt):
    options = {"num_beams": 3, "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    rows = torch.cat([prompt[:, :300], prompt[:, 500:800]])
    together = smollm2.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        **as_argument(LogQuantCache(smollm2.config)),
        **options,
    )
    for row, got in zip(rows, together, strict=True):
        alone = smollm2.generate(
            row[None],
            attention_mask=torch.ones(1, 300, dtype=torch.long),
            **as_argument(LogQuantCache(smollm2.config)),
            **options,
        )
        assert torch.equal(alone[0], got)


@pytest.mark.parametrize("bits", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_crop_and_continue_equals_a_fresh_run(smollm2, prompt, bits):
    """To a point that many evictions have passed: packed tokens bit for bit, and at 8 bits the tokens."""
    cache, fresh = (LogQuantCache(smollm2.config, bits=bits, **PLAIN) for _ in range(2))
    with torch.no_grad():
        smollm2(prompt[:, :600], **as_argument(cache), logits_to_keep=1)
        cache.crop(-290)
        smollm2(prompt[:, :310], **as_argument(fresh), logits_to_keep=1)
    for layer, want in zip(cache.layers, fresh.layers, strict=True):
        rows = layer.rows
        assert (
            torch.equal(rows.positions(prompt.device), want.held.layout.positions(prompt.device)) and rows.packed == 128
        )
        pages, want_pages = (layer_contents(x)[0] for x in (layer, want))
        # The prompts' lengths differ, and so may the last bit of what the model computes.
        assert (pages == want_pages).float().mean() > 0.97
    if bits == 8:
        assert torch.equal(*(greedy(smollm2, prompt[:, :311], c, 70) for c in (cache, fresh)))


@pytest.mark.parametrize(
    ("settings", "bits", "count"),
    [
        ({}, 2, 8),
        (PLAIN, 2, 8),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [({}, 2, 70), (PLAIN, 8, 70)]),
    ],
)
def test_crop_of_exact_tokens_and_continue_equals_a_fresh_run(smollm2, prompt, settings, bits, count):
    """All that the cache holds, bit for bit, then and after more evictions; and the tokens."""
    cache, fresh = (LogQuantCache(smollm2.config, bits=bits, **settings) for _ in range(2))
    with torch.no_grad():
        for each in (cache, fresh):
            smollm2(prompt[:, :300], **as_argument(each), logits_to_keep=1)
        cache.activate_past_recording()
        smollm2(prompt[:, 400:440], **as_argument(cache), logits_to_keep=1)
        cache.crop(-40)
    for layer in cache.layers:
        layer.record_past = False
    assert fresh.layers[0].rows.packed > 0 and same_contents(cache, fresh)
    assert torch.equal(*(greedy(smollm2, prompt[:, :301], c, count) for c in (cache, fresh)))
    assert same_contents(cache, fresh)


def same_contents(cache: LogQuantCache, other: LogQuantCache) -> bool:
    """Whether all layers hold the same pages, windows and column maps, bit for bit."""

    def contents(layer):
        return *layer_contents(layer), layer.held.advice.key_map

    return all(
        (a is None and b is None) or torch.equal(a, b)
        for one, two in zip(cache.layers, other.layers, strict=True)
        for a, b in zip(contents(one), contents(two), strict=True)
    )
