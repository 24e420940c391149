"""Activations with tensors: every expert has its own, every split network one, the dense model its
own still.

A bank of whole networks stacks them, so that all that banks do with stacked tensors holds for them.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

import sparsecraft as sc
from sparsecraft.checkpoint.jsonfile import json_digest, write_json
from sparsecraft.checkpoint.manifest import read_manifest
from sparsecraft.conversion.stream import convert_files
from sparsecraft.dense.digests import combine, digest
from sparsecraft.errors import DonorError, ExportError
from sparsecraft.moe.cost import count
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.experts.own_activation import OwnActivation
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.training.moved import Before
from tests.cases import layers, randomize_new
from tests.cases.families import BERT_LIKE, LLAMA_LIKE, POSITIONS, VOCAB, D, F
from tests.cases.zoo import GPT, OPT

E = 4


class Swish(nn.Module):
    """x sigmoid(beta x) * scale: a parameter and a buffer."""

    def __init__(self, beta: int = 1):
        super().__init__()
        self.beta = nn.Parameter(torch.linspace(0.5, 1.5, beta))
        self.register_buffer("scale", torch.tensor(1.25))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x) * self.scale


class Buffered(nn.Module):
    """ReLU from a threshold that is state and no parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("threshold", torch.tensor(0.125))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - self.threshold)


ACTIVATIONS = {"swish_1": Swish, "swish_F": functools.partial(Swish, F), "buffered": Buffered}


@pytest.fixture(autouse=True)
def known_to_transformers(monkeypatch):
    for name, make in ACTIVATIONS.items():
        monkeypatch.setitem(ACT2FN, name, make)


def llama(activation: str) -> tuple[str, dict]:
    return "LlamaForCausalLM", LLAMA_LIKE | {"hidden_act": activation}


# Modules and spans, gated and not.
MODELS = {
    "apertus": ("ApertusForCausalLM", LLAMA_LIKE),
    "llama_prelu": llama("prelu"),
    "llama_swish": llama("swish_1"),
    "llama_buffered": llama("buffered"),
    "gpt2_prelu": ("GPT2LMHeadModel", GPT | {"activation_function": "prelu"}),
    "opt_prelu": ("OPTForCausalLM", OPT | {"vocab_size": VOCAB, "activation_function": "prelu"}),
    "bert_prelu": (
        "BertForMaskedLM",
        BERT_LIKE
        | {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "hidden_act": "prelu"},
    ),
}
BANKS = {
    "upcycling": lambda: sc.recipes.upcycling(E, 2),
    "virtual_groups": lambda: sc.recipes.virtual_groups(2, 2, 2),
    "gmoefication": lambda: sc.recipes.gmoefication(E),
}
WHOLE = {"upcycling": BANKS["upcycling"], "btx": lambda: sc.recipes.btx(E)}


def made(name: str, seed: int = 0) -> nn.Module:
    """A model whose activations differ by layer, and by seed."""
    kind, config = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * noise
    generator.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * seed * torch.randn(parameter.shape, generator=generator)
    return model


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def activations(model: nn.Module) -> list[OwnActivation]:
    return [layer.experts.activation for layer in layers(model)]


def converted(name: str, recipe: str) -> nn.Module:
    model = made(name)
    sc.convert(model, (BANKS | WHOLE)[recipe]())
    randomize_new(model, std=0.03)
    return model


each_model = pytest.mark.parametrize("name", MODELS)
each_bank = pytest.mark.parametrize("recipe", BANKS)


@each_bank
@each_model
def test_it_starts_exactly_and_reverts_whatever_became_of_the_experts(name, recipe):
    model, inputs_ = made(name), inputs()
    state, before = copy.deepcopy(model.state_dict()), logits(model)
    assert sc.convert(model, BANKS[recipe]()).certificate.exact
    assert all(isinstance(a, OwnActivation) for a in activations(model))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    for layer in layers(model):
        layer.experts.requires_grad_()
    model.train()(**inputs_).logits.logsumexp(-1).sum().backward()
    if name != "llama_buffered":
        assert all(p.grad.abs().sum() > 0 for a in activations(model) for p in a.parameters())
    randomize_new(model)
    sc.revert(model.eval())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("recipe", ["upcycling", "virtual_groups"])
@each_model
def test_every_path_is_the_loop_forward_and_backward(name, recipe):
    model = converted(name, recipe)
    found = {}
    for path in ("loop", "grouped", "dense", "auto"):
        set_dispatch(model, path)
        model.zero_grad()
        output = model(**inputs()).logits
        output.logsumexp(-1).sum().backward()
        grads = [p.grad.clone() for a in activations(model) for p in a.parameters()]
        found[path] = [output.detach(), *grads]
    for path in ("grouped", "dense", "auto"):
        for one, other in zip(found["loop"], found[path], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@each_model
def test_each_paths_of_a_split_network_gives_the_same(name):
    model = converted(name, "gmoefication")
    bank: SplitExperts = layers(model)[0].experts
    x_TD = torch.randn(3, D, generator=torch.Generator().manual_seed(4))
    weights_TE = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]])
    found = {}
    with torch.no_grad():
        for path in ("loop", "dense", "gather", "grouped"):
            bank.dispatch = path
            found[path] = bank.weighed(x_TD, weights_TE)
    for path, y_TD in found.items():
        torch.testing.assert_close(y_TD, found["loop"], rtol=1e-5, atol=1e-5, msg=path)


@each_model
def test_its_numbers_are_counted_once_for_each_expert(name):
    model = made(name)
    dense, layers_ = count(model), 2
    sc.convert(model, WHOLE["upcycling"]())
    cost = count(model)
    donors = [item.donor for item in model.sparsecraft.plan]
    held = sum(p.numel() for donor in donors for p in donor.activation.parameters())
    own = sum(p.numel() for a in activations(model) for p in a.parameters())
    assert own == E * held
    networks = sum(p.numel() for la in layers(model) for p in la.experts.parameters())
    assert cost.new == networks + layers_ * E * D
    assert cost.total == dense.total + networks * (E - 1) // E + layers_ * E * D
    sc.revert(model)
    sc.convert(model, BANKS["gmoefication"]())
    assert count(model).total == dense.total + sum(
        p.numel() for layer in layers(model) for p in layer.router.parameters()
    )


@each_bank
@each_model
def test_saved_and_loaded_it_is_the_same_in_every_bit(name, recipe, tmp_path):
    made(name).save_pretrained(tmp_path / "base")
    model = type(made(name)).from_pretrained(tmp_path / "base").eval()
    dense = logits(model)
    sc.convert(model, BANKS[recipe]())
    randomize_new(model, std=0.03)
    sc.save(model, tmp_path / "out")
    again = sc.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    sc.revert(again)
    assert torch.equal(logits(again), dense)


@pytest.mark.parametrize("name", ["apertus", "llama_buffered"])
def test_a_file_of_one_activation_for_all_experts_is_read(name, tmp_path):
    """As versions wrote it whose bank shared the dense model's."""
    model = made(name)
    sc.convert(model, WHOLE["upcycling"]())
    wanted = logits(model)
    sc.save(model, tmp_path / "out")
    path = tmp_path / "out" / "moe.safetensors"
    tensors = load_file(path)
    one = {n: t[0].clone() if ".experts.activation." in n else t for n, t in tensors.items()}
    assert one.keys() == tensors.keys() and any(one[n].shape != tensors[n].shape for n in one)
    save_file(one, path)
    manifest = read_manifest(tmp_path / "out")
    manifest["tensors"] = combine({n: digest(t) for n, t in one.items()})
    write_json(tmp_path / "out" / "recipe.json", manifest | {"digest": json_digest(manifest)})
    assert torch.equal(logits(sc.load(tmp_path / "out")), wanted)


@each_model
def test_experts_of_sources_have_their_activations(name):
    model, sources = made(name), [made(name, 1), made(name, 2)]
    sc.convert(model, sc.recipes.btx(2), sources=sources)
    for item, bank in zip(model.sparsecraft.plan, activations(model), strict=True):
        for e, source in enumerate(sources):
            theirs = source.get_submodule(item.donor.activation_path).state_dict()
            assert theirs and all(torch.equal(bank.of(e)[key], theirs[key]) for key in theirs)


@each_model
def test_an_expert_comes_and_goes_with_its_activation(name):
    model, expert = converted(name, "btx"), made(name, 3)
    before = [a.of(0) for a in activations(model)]
    wanted = logits(model)
    sc.extend(model, expert, rows="reset", mix=0.0)
    for item, bank, old in zip(model.sparsecraft.plan, activations(model), before, strict=True):
        theirs = expert.get_submodule(item.donor.activation_path).state_dict()
        assert bank.count == E + 1
        assert all(torch.equal(bank.of(E)[key], theirs[key]) for key in theirs)
        assert all(torch.equal(bank.of(0)[key], old[key]) for key in old)
    assert logits(model).isfinite().all()
    sc.remove(model, E)
    assert all(a.count == E for a in activations(model))
    assert logits(model).shape == wanted.shape


@pytest.mark.parametrize("how", ["fixed", "average"])
@each_model
def test_merged_the_dense_activation_is_the_experts(name, how):
    model = converted(name, "upcycling")
    experts = [[a.of(e) for e in range(E)] for a in activations(model)]
    paths = [item.donor.activation_path for item in model.sparsecraft.plan]
    weights = {"weights": [0.0, 0.0, 1.0, 0.0]} if how == "fixed" else {}
    sc.merge(model, how, **weights)
    for path, each in zip(paths, experts, strict=True):
        for key, tensor in model.get_submodule(path).state_dict().items():
            of_all = torch.stack([own[key] for own in each])
            wanted = of_all[2] if how == "fixed" else of_all.double().mean(0).to(tensor)
            torch.testing.assert_close(tensor, wanted)


@each_model
def test_a_split_network_with_all_parts_is_merged_with_its_activation(name):
    model = converted(name, "gmoefication")
    before = logits(model)
    sc.merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", WHOLE)
@pytest.mark.parametrize("name", ["apertus", "gpt2_prelu", "llama_buffered"])
def test_streamed_it_is_what_convert_makes(name, recipe, tmp_path):
    for seed in range(3):
        made(name, seed).save_pretrained(tmp_path / str(seed))
    sources = [str(tmp_path / "1"), str(tmp_path / "2")] if recipe == "btx" else []
    report = convert_files(tmp_path / "0", WHOLE[recipe](), tmp_path / "streamed", sources=sources)
    assert recipe == "btx" or report.certificate.exact
    model = type(made(name)).from_pretrained(tmp_path / "0").eval()
    sc.convert(model, WHOLE[recipe](), sources=sources)
    assert torch.equal(logits(sc.load(tmp_path / "streamed")), logits(model))


@pytest.mark.parametrize("name", ["apertus", "llama_swish", "opt_prelu"])
def test_offloaded_it_computes_the_same(name):
    model = converted(name, "upcycling")
    want = logits(model)
    held = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cpu_offload(model, execution_device="cpu", state_dict=held)
    assert any(tensor.is_meta for tensor in model.parameters())
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-6)


def test_in_bfloat16_weights_of_float32_are_used_in_the_tokens_type():
    model = converted("llama_prelu", "upcycling")
    bank = layers(model)[0].experts
    y = bank.activation(torch.randn(3, F, dtype=torch.bfloat16), 1)
    assert y.dtype == torch.bfloat16


def test_no_standard_architecture_has_it(tmp_path):
    model = converted("llama_prelu", "upcycling")
    with pytest.raises(ExportError, match="tensors in its activation"):
        sc.export(model, "mixtral", tmp_path / "out")


def test_numbers_of_single_neurons_are_refused(monkeypatch):
    """They are no function of one number, so that no network is found by them."""
    monkeypatch.setitem(MODELS, "by neuron", llama("swish_F"))
    with pytest.raises(DonorError, match="LlamaForCausalLM has no feed-forward network"):
        sc.convert(made("by neuron"), WHOLE["upcycling"]())


def test_what_moves_of_it_is_told_expert_by_expert():
    model = converted("apertus", "upcycling")
    names = [n for n, _ in model.named_parameters() if ".experts.activation.alpha" in n]
    before = Before(model, names)
    with torch.no_grad():
        model.get_parameter(names[0])[1] += 1
    changed = before.changed(model)
    assert len(names) == 4 and changed.keys() == {(n, e) for n in names for e in range(E)}
    assert [unit for unit, moved in changed.items() if moved] == [(names[0], 1)]
