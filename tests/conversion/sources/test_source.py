"""Experts from several dense models: what goes where, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import sparsecraft as sc
from sparsecraft.conversion.sources.source import mean
from sparsecraft.errors import RecipeError, SourceError
from sparsecraft.moe.losses import btx_balance
from sparsecraft.moe.names import dense_tensors
from sparsecraft.moe.routing import Routing
from tests import tiny
from tests.cases import FAMILIES, batch, dense, layers, logits, moved

BTX = sc.recipes.btx(num_experts=3)


def saved(model, path) -> str:
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_sources_give_the_dense_model(family):
    model, wanted = dense(family), logits(dense(family), batch(family))
    report = sc.convert(model, BTX, sources=[dense(family)] * 3)
    assert report.certificate.exact and len(report.sources) == 3
    torch.testing.assert_close(logits(model, batch(family)), wanted, rtol=1e-5, atol=1e-5)


def test_the_mean_of_bf16_sources_is_taken_in_float32():
    """256 + 1 is 256 in bf16, so that a sum of these in it would be 258 and not 260."""

    class Fixed:
        def __init__(self, value: float):
            self.value = value

        def tensor(self, name: str) -> torch.Tensor:
            return torch.full((2,), self.value, dtype=torch.bfloat16)

    found = mean([Fixed(256.0), Fixed(1.0), Fixed(1.0), Fixed(2.0)], "any")
    assert found.dtype == torch.float32 and found.tolist() == [65.0, 65.0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("on_disk", [False, True])
def test_experts_are_the_sources_and_the_rest_their_mean(family, on_disk, tmp_path):
    model, before = dense(family), dense(family).state_dict()
    sources = [moved(family, seed) for seed in range(3)]
    given = (
        [saved(source, tmp_path / str(i)) for i, source in enumerate(sources)]
        if on_disk
        else sources
    )
    report = sc.convert(model, BTX, sources=given)
    assert not report.certificate.exact
    states = [source.state_dict() for source in sources]
    for name, tensor in dense_tensors(model).items():
        if tensor.is_floating_point():
            mean = torch.stack([state[name] for state in states]).mean(0)
            torch.testing.assert_close(tensor, mean, msg=name)
    for chosen, source in enumerate(sources):
        single = copy.deepcopy(source)
        sc.convert(single, sc.recipes.upcycling(num_experts=3, top_k=1))
        for ours, theirs in zip(layers(model), layers(single), strict=True):
            for name, tensor in ours.experts.named_parameters():
                assert torch.equal(tensor[chosen], theirs.experts.get_parameter(name)[chosen]), name
    if not on_disk:
        return
    folder = saved(dense(family), tmp_path / "base")
    model = type(model).from_pretrained(folder).eval()
    sc.convert(model, BTX, sources=given)
    sc.save(model, tmp_path / "out")
    loaded = sc.load(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    sc.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_several_experts_of_each_source():
    model, sources = dense("llama"), [moved("llama", seed) for seed in range(2)]
    sc.convert(model, sc.recipes.btx(num_experts=4), sources=sources)
    down = layers(model)[0].experts.down
    for e, source in enumerate((0, 0, 1, 1)):
        assert torch.equal(down[e], sources[source].model.layers[0].mlp.down_proj.weight)


def test_other_tensors_stay_where_the_recipe_says_so():
    model, source = dense("llama"), moved("llama", 1)
    sc.convert(model, sc.override(BTX, {"others": "base"}), sources=[source] * 3)
    for name, tensor in dense_tensors(model).items():
        assert torch.equal(tensor, dense("llama").state_dict()[name])


def test_what_does_not_fit_is_refused_and_named(tmp_path):
    def refused(match, source, error=SourceError, recipe=BTX, **options):
        model = dense("llama")
        with pytest.raises(error, match=match):
            sc.convert(model, recipe, sources=[dense("llama"), source, source], **options)
        assert not hasattr(model, "sparsecraft")

    refused("model_type='mistral'.*'llama'", dense("mistral"))
    other = dense("llama")
    other.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    refused("rope_parameters=.*'linear'", other)
    other = dense("llama")
    other.config.hidden_act = "gelu"
    refused("hidden_act='gelu' and the base 'silu'", other)
    torch.manual_seed(3)
    stranger = type(dense("llama"))(dense("llama").config)
    refused("no common ancestor: the cosine of their .*gate_proj", stranger)
    sc.convert(dense("llama"), BTX, sources=[dense("llama"), stranger, stranger], unrelated=True)
    refused(
        "4 experts cannot come from 3", dense("llama"), RecipeError, sc.recipes.btx(num_experts=4)
    )
    refused("vector experts, which come from one", dense("llama"), RecipeError, sc.recipes.mov(3))


def test_another_tokenizer_is_refused_by_its_first_token(tmp_path):
    base = tiny.save_dense(tmp_path / "base")
    other = tiny.save_dense(tmp_path / "other")
    model = sc.hub.load_dense(str(base))
    sc.convert(model, BTX, sources=[base, other, base])
    path = Path(other) / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(data))
    model = sc.hub.load_dense(str(base))
    with pytest.raises(SourceError, match=r"is number 11 in the tokenizer of .*other.* and 10 in"):
        sc.convert(model, BTX, sources=[base, other, base])


def test_the_btx_loss_is_one_at_balance_and_has_a_gradient_through_the_weights():
    logits_TE = torch.zeros(6, 3, requires_grad=True)
    weights_TK = logits_TE.softmax(-1)
    routing = Routing(weights_TK, torch.arange(3).expand(6, 3), logits_TE, in_order=True)
    assert btx_balance(routing).item() == pytest.approx(1)
    skewed = torch.tensor([[3.0, 0, 0]]).expand(4, 3).clone().requires_grad_()
    top_TK, indices_TK = skewed.topk(2)
    routing = Routing(top_TK.softmax(-1), indices_TK, skewed)
    u = [0.9526, 0.0474, 0.0]  # softmax of (3, 0), ties go to the first
    p = torch.tensor([3.0, 0, 0]).softmax(0)
    assert btx_balance(routing).item() == pytest.approx(3 * (torch.tensor(u) @ p).item(), abs=1e-3)
    btx_balance(routing).backward()
    assert skewed.grad.abs().sum() > 0
