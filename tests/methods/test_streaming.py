"""StreamingLLM: its rule, and its predictions against those of a model that sees only what is kept."""

from __future__ import annotations

import pytest
import torch

from logquant.compat import as_argument
from logquant.methods import Streaming
from logquant.methods.layers.rope import rope_frequencies
from logquant.methods.registry import parse_cache
from tests.helpers.methods import ARRIVALS, BATCH, DIM, HEADS, feed
from tests.helpers.models import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_streaming_keeps_sinks_and_the_newest(arrivals):
    layer = Streaming(sinks=3, recent=50).layer(tiny_config())
    _, values, _ = feed(layer, arrivals)
    kept, position = [], 0
    for new in arrivals:
        kept += range(position, position + new)
        position += new
        while len(kept) > 53:
            del kept[3]
    assert torch.equal(layer.values, values[:, :, kept])
    assert layer.get_mask_sizes(5) == (len(kept) + 5, position - len(kept))
    assert layer.get_seq_length() == position
    assert layer.nbytes == BATCH * HEADS * len(kept) * 2 * DIM * 4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ],
)
def test_streaming_predicts_as_if_only_the_kept_tokens_had_come(changes):
    """In a model of one layer keys and values do not depend on the context, so this is what section 3.2 asks for."""
    model = tiny_model(num_hidden_layers=1, **changes)
    model.set_attn_implementation("logquant")
    ids = torch.randint(256, (2, 90), generator=torch.Generator().manual_seed(3))
    cache = Streaming(sinks=4, recent=30).make(model.config)
    with torch.inference_mode():
        model(ids[:, :60], **as_argument(cache))
        for step in range(60, 90):
            logits = model(ids[:, step : step + 1], **as_argument(cache)).logits[:, -1]
            kept = torch.cat([ids[:, :4], ids[:, step - 30 : step + 1]], 1)
            torch.testing.assert_close(logits, model(kept).logits[:, -1], atol=2e-4, rtol=1e-4)
        # Without moving the sinks it would not be so.
        cache.layers[0].frequencies = None
        wrong = model(ids[:, -1:], **as_argument(cache)).logits[:, -1]
        kept = torch.cat([ids[:, :4], ids[:, -30:], ids[:, -1:]], 1)
        assert not torch.allclose(wrong, model(kept).logits[:, -1], atol=1e-2)


def test_streaming_refuses_rope_that_it_does_not_know():
    with pytest.raises(ValueError, match="cannot move keys with the RoPE of 'llama' \\(dynamic\\)"):
        rope_frequencies(tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))


@pytest.mark.parametrize(
    ("name", "message"),
    [("streaming:recent=0", "recent must be a positive whole number, got 0")],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
