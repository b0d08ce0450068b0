"""Training of residuals: what is learnt from is what a cache does, and it gets better at it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.residual.dropping import Dropping, Pruning, Window
from logquant.residual.examples import Example, examples
from logquant.residual.less import Less
from logquant.residual.train import Training, attend, errors, output_projections, train
from logquant.residual.trained import Trained
from tests.helpers.cli import refused, succeed
from tests.helpers.models import logits_of, save_tiny_model, tiny_config, tiny_model
from tests.helpers.residual import features, phi, psi, write_features

pytestmark = pytest.mark.usefixtures("one_thread")
PRUNING = Pruning(LogQuantConfig(rule="recent", window=32, prune="keydiff(keep=0.4)"))


def states(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, tokens, 32, generator=random) for n in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("dropping", [Window(sinks=4, recent=20), PRUNING])
def test_attention_that_is_learnt_is_that_of_the_paper(dropping: Dropping):
    q, k, v = states(300)
    call, net = AttentionCall(q, None, 0.3, causal=True), features(tiny_config(), 0)
    first, dropped = dropping.of(call, k)
    example = Example.of(dropping, call, k, v)
    causal = torch.ones(300, 300, dtype=torch.bool).tril()[first:]
    assert dropped.any() and not dropped.expand(2, len(causal), -1)[:, :, -1].any()
    for head in range(4):
        query, keys, values = q[0, head, first:].double(), k[0, head // 2].double(), v[0, head // 2].double()
        gone = dropped[head // 2 if len(dropped) > 1 else 0].expand(len(causal), -1)
        scores = (query @ keys.T * 0.3).exp()
        left = phi(net, query, head) @ psi(net, keys, head // 2).T
        weights = torch.where(causal & gone, left, torch.where(causal, scores, 0))
        want = weights @ values / weights.sum(-1, keepdim=True)
        assert torch.allclose(attend(net, example)[head].double(), want, atol=1e-4)
        assert torch.allclose(
            example.want[head].double(), F.normalize(scores * causal, p=1, dim=-1) @ values, atol=1e-4
        )


@pytest.mark.parametrize("rule", ["recent", "log"])
def test_what_is_dropped_is_what_a_cache_drops(tmp_path, rule):
    """The sums that a cache holds after the prompt are those of the tokens that training takes for dropped."""
    model, ids = tiny_model(), torch.randint(3, 255, (1, 400), generator=torch.Generator().manual_seed(0))
    setting = write_features(tmp_path / "less", model.config)
    config = LogQuantConfig(rule=rule, window=32, prune="snapkv(keep=0.4)", residual=setting)
    made, cache = examples(model, [ids[0]], Pruning(config)), LogQuantCache(model.config, config)
    logits_of(model, cache, ids, [300], "logquant")
    for layer, (example,) in made.items():
        net = features(model.config, layer)
        weights = net.of_keys(example.keys[None])[0] * example.dropped.mT
        want = weights.mT @ torch.cat([example.values, torch.ones_like(example.values[..., :1])], -1)
        assert torch.allclose(cache.layers[layer].held.storage.residual.sums[0], want, rtol=1e-3, atol=1e-3)


def test_training_makes_errors_smaller_and_changes_no_model():
    random, (q, k, v) = torch.Generator().manual_seed(1), states(300)
    k[:, :, 1:] += k[:, :, :1] / 2
    example = Example.of(Window(recent=20), AttentionCall(q, None, 0.2, causal=True), k, v + 1)
    project = nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        project.weight.copy_(torch.randn(64, 128, generator=random))
    weight = project.weight.detach().clone()
    training = Training(rank=4, hidden=32, epochs=150, rate=1e-2, dropout=0.1)
    state = torch.random.get_rng_state()
    nets = [train([example], project, training, 5) for _ in range(2)]
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(*nets, strict=True))
    assert torch.equal(weight, project.weight) and project.weight.grad is None
    assert torch.equal(state, torch.random.get_rng_state())
    found = errors(nets[0], [example], project)
    untrained = Less.random(4, 2, 32, hidden=32, rank=4, generator=random)
    assert found.residual < 0.7 * found.dropping
    assert errors(untrained, [example], project).residual == pytest.approx(found.dropping, rel=0.05)


def test_examples_are_of_full_attention_alone():
    model, ids = tiny_model(), torch.arange(300) % 250
    assert sorted(examples(model, [ids], PRUNING, [1])) == [1]
    assert all(isinstance(project, nn.Linear) for project in output_projections(model))
    with pytest.raises(ValueError, match="layers must be some with full attention, of"):
        examples(model, [ids], PRUNING, [2])
    with pytest.raises(ValueError, match="tokens must be so many that keydiff"):
        examples(model, [ids[:90]], PRUNING)
    with pytest.raises(ValueError, match="tokens must be more than 68, got 50"):
        examples(model, [ids[:50]], Window())
    with pytest.raises(ValueError, match="texts must be at least one"):
        examples(model, [], PRUNING)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"hidden": -1}, {"epochs": 0}, {"rate": 0.0}, {"dropout": 1.0}])
def test_bad_training(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be .*, got {bad[name]}"):
        Training(**bad)


# ----------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("train")
    save_tiny_model(made / "model")
    for name in ("a", "b"):
        (made / name).write_text(f"All of {name} is said again and again, with {name} changes. " * 60)
    return made


def test_the_command_writes_what_caches_read(folder):
    cache = "logquant:prune=keydiff(keep=0.4),window=32"
    small = ("--tokens", 400, "--epochs", 1, "--hidden", 8, "--rank", 4, "--model", folder / "model")
    output = succeed(
        "train-residual", folder / "a", "--held-out", folder / "b", "-o", folder / "less", "--cache", cache, *small,
        "--layers", "1", "--json", folder / "json",
    ).output  # fmt: skip
    assert "at least 30 % less in 0 of 1 layers" in output and "MB" in output
    assert json.loads((folder / "json").read_text())["errors"]["1"]["dropping"] > 0
    trained = Trained.load(folder / "less")
    assert trained.layers == [1] and trained.made["texts"] == 4 and "keydiff" in str(trained.made["dropping"])
    succeed("train-residual", folder / "a", folder / "b", "-o", folder / "other", *small)
    spec = f"{cache},residual=less(file={folder / 'less'})"
    chart = succeed(
        "eval", folder / "a", "--caches", spec, "--model", folder / "model", "--prefill", 400, "--tokens", 9
    )
    assert "residual" in chart.output
    wrong = spec.replace("'less'", "x").replace("/less)", "/nowhere)")
    assert "there is no file" in refused("eval", folder / "a", "--caches", wrong, "--model", folder / "model")


def test_what_the_command_refuses(folder):
    text = folder / "a"
    for args, message in (
        (("--cache", "logquant:evict=corm"), "rule must be 'recent'"),
        (("--cache", "logquant"), "a LogQuant cache with prune is needed, got 'logquant'"),
        (("--cache", "logquant:prune=keydiff(keep=0.5)", "--tokens", 64), "tokens must be so many"),
        (("--layers", "1,1"), "different numbers from 0 on are needed"),
        (("--layers", "x"), "whole numbers separated by commas"),
        (("--layers", "7", "--tokens", 400, "--held-out", folder / "b"), "some with full attention"),
        (("--tokens", 400, "--pieces", 1), "a text is needed where there are less than 8 pieces"),
        (("-o", text), "would be written over"),
    ):
        assert message in refused("train-residual", text, "--model", folder / "model", *args)
