"""Weights of keys and feedback of values: against plain statements of what they are, and what they are for."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logquant.format import PageFormat
from logquant.ops import reference
from logquant.quantizer import feedback
from logquant.quantizer.queries import RecentQueries
from tests.helpers.strategies import seeds

SEARCHED = PageFormat(64, key_param_bits=8, value_param_bits=8)


def attention_of(queries: Tensor, keys: Tensor, leaving: Tensor) -> feedback.Attention:
    return feedback.Attention(RecentQueries.of(queries, None, 0.25, 0.0), keys, leaving[None])


def test_attention_is_that_of_a_softmax_over_all_keys():
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 5000, 16)
    leaving = torch.arange(1, 4097, 2, dtype=torch.int32)
    got = attention_of(q, k, leaving)
    want = (0.25 * q.unflatten(1, (2, 2)) @ k.mT.unsqueeze(2)).softmax(-1).flatten(2, 3)[..., leaving.long()]
    assert torch.allclose(got[:], want, rtol=1e-4)
    assert torch.allclose(got[64:128], want[..., 64:128], rtol=1e-4)


def test_key_scores_are_what_errors_of_keys_change():
    """Of weighted sums of values: to first order, errors of ``var(k_c)`` times 1 in each channel by itself."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 4500, 16)
    leaving = torch.arange(0, 4352, 1, dtype=torch.int32)
    attention = attention_of(q, k, leaving)
    weights = attention[:].square().unflatten(-1, (-1, 64)).sum(-1)
    variance = k[:, :, :4352].unflatten(2, (-1, 64)).var(3, correction=0)
    squares = q.unflatten(1, (2, 2)).flatten(2, 3).square()
    want = torch.einsum("bhqp,bhqd,bhpd->bhd", weights, squares, variance)
    torch.testing.assert_close(attention.key_scores(64), want)
    hidden = RecentQueries.of(q, torch.tensor([[False, True, True]]), 0.25, 0.0)
    some = feedback.Attention(hidden, k, leaving[None]).key_scores(64)
    torch.testing.assert_close(some, attention_of(q[:, :, 1:], k, leaving).key_scores(64))


def test_key_scores_where_nothing_attends_to_the_tokens_that_leave():
    """Beside a sink that takes all, their weights squared would be 0: then every channel would score the same."""
    torch.manual_seed(0)
    q, k = torch.rand(1, 1, 3, 16) + 0.5, torch.randn(1, 1, 129, 16)
    k[:, :, 128] = 200.0
    scores = attention_of(q, k, torch.arange(128, dtype=torch.int32)).key_scores(64)
    variance = k[:, :, :128].unflatten(2, (2, 64)).var(3, correction=0).sum(2)
    want = q.square().sum(2) * variance
    torch.testing.assert_close(scores / scores.sum(), want / want.sum())


def test_weights_are_one_plus_attention_with_mean_one():
    attention = torch.rand(1, 2, 6, 128) ** 4
    mean = attention.mean(2).unflatten(-1, (-1, 32))
    want = (1 + mean / mean.mean(-1, keepdim=True)).flatten(-2)
    assert torch.allclose(feedback.key_weights(attention.mean(2), 32), want, rtol=1 / 15)
    assert torch.equal(feedback.key_weights(attention.mean(2) * torch.nan, 32), torch.ones(1, 2, 128))


def test_feedback_makes_the_error_small_that_attention_sees():
    """Rounding to whole numbers, each token after those before it: the sum of squares is that of M^T E."""
    torch.manual_seed(0)
    attention = torch.rand(1, 1, 16, 64) ** 8
    factors = feedback.value_feedback(attention, 64)[0, 0]
    metric = attention[0, 0].T @ attention[0, 0]
    metric = metric / metric.diagonal().mean() + 0.3 * torch.eye(64)
    x = 3 * torch.randn(64, 500)
    corrected, error = x.clone(), torch.empty_like(x)
    for t in range(64):
        error[t] = corrected[t].round() - x[t]
        corrected[t + 1 :] -= factors[t, t + 1 :, None] * (corrected[t] - corrected[t].round())
    plain = x.round() - x
    seen, seen_plain = (torch.einsum("tc,ts,sc->", e, metric, e) for e in (error, plain))
    assert seen < 0.6 * seen_plain
    # The last word: given all errors before it, a token's own takes the value that makes the form smallest, rounded.
    best = x[63] - (metric[63, :63] @ error[:63]) / metric[63, 63]
    assert (corrected[63] - best).abs().max() < 0.2


def test_feedback_of_nothing_is_nothing():
    for attention in (torch.zeros(1, 1, 2, 64), torch.full((1, 1, 2, 64), torch.nan)):
        factors = feedback.value_feedback(attention, 64)[0, 0]
        assert torch.equal(factors.triu(1), torch.zeros(64, 64))


def test_attention_over_quantised_values_is_closer_with_feedback():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 32, 64), torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64)
    known, later = q[:, :, :16], q[:, :, 16:] * 0.1 + q[:, :, :16]
    attention = feedback.Attention(RecentQueries.of(known, None, 0.25, 0.0), k, torch.arange(512).int()[None])
    weights = (0.25 * later.unflatten(1, (2, 2)) @ k.mT.unsqueeze(2)).softmax(-1)
    errors = []
    for options in ({}, {"value_feedback": feedback.value_feedback(attention[:], 64)}):
        _, values = reference.dequantize(reference.quantize(k, v, SEARCHED, **options), SEARCHED)
        errors.append((weights @ (values - v).unsqueeze(2)).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


def rows_of(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Queries ``[B, 2, 40, 8]`` and which are real: of each row ``lengths`` of them, at random places."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(len(lengths), 2, 40, 8, generator=random)
    real = torch.zeros(len(lengths), 40, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row, torch.randperm(40, generator=random)[:length]] = True
    return query, real


@given(seed=seeds, lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3), portions=st.lists(st.integers(1, 9)))
def test_the_newest_queries_of_each_row_are_kept(seed, lengths, portions):
    """In one portion or several, with padding anywhere."""
    query, real = rows_of(lengths, seed)
    newest = None
    for first, last in zip([0, *portions], [*portions, 40], strict=True):
        first, last = min(first, last), max(first, last)
        if first == last:
            continue
        mask = real[:, first:last]
        part = RecentQueries.of(query[:, :, first:last], None if mask.all() else mask, 1.0, 0.0)
        newest = part.keep(16) if newest is None else newest.then(part, 16)
    shown: list[int] = []
    for first, last in zip([0, *portions], [*portions, 40], strict=True):
        shown += range(min(first, last), max(first, last))
    for row in range(len(lengths)):
        want = [c for c in shown if real[row, c]][-16:]
        own = torch.ones(newest.query.shape[2], dtype=torch.bool) if newest.real is None else newest.real[row]
        assert torch.equal(newest.query[row][:, own], query[row][:, want])


def test_cropped_queries_are_those_before():
    query, _ = rows_of([40], 0)
    newest = RecentQueries.of(query, None, 1.0, 0.0).keep(20)
    assert torch.equal(newest.crop(5).query, query[:, :, 20:35])
    assert newest.crop(0) is newest and newest.crop(20) is None
    padded = RecentQueries.of(query, rows_of([30], 1)[1], 1.0, 0.0).keep(20)
    assert padded.crop(1) is None, "which columns are left is not known"
    after = padded.then(RecentQueries.of(query[:, :, :3], None, 1.0, 0.0), 23)
    assert torch.equal(after.crop(2).query[:, :, -1], query[:, :, 0]) and after.crop(3) is None


def test_kept_queries_keep_no_other_memory():
    """One by one, in memory of their own: of a prompt, of decoded tokens, of parts of something larger."""
    prompt, fused = torch.randn(2, 4, 50, 8), torch.randn(2, 12, 1, 8)
    own = torch.randn(2, 4, 1, 8)
    newest = RecentQueries.of(prompt, None, 1.0, 0.0).keep(16).apart()
    kept = own.clone()
    for query in (fused[:, :4], own):
        newest = newest.then(RecentQueries.of(query, None, 1.0, 0.0), 16)
    own.zero_()  # its maker may use its memory for the next one
    assert torch.equal(newest.query, torch.cat([prompt[:, :, -14:], fused[:, :4], kept], 2))
    assert newest.nbytes == sum(part.untyped_storage().nbytes() for part in newest.parts) == 2 * 4 * 16 * 8 * 4
    assert torch.equal(newest.crop(3).keep(5).query, newest.query[:, :, 8:13])
    assert torch.equal(newest.together().map(lambda t: t[:1]).query, newest.query[:1])
