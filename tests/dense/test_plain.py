"""Linears that are none: what they compute is not what their weight and bias say."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

import sparsecraft as sc
from sparsecraft.dense.linears import NOT_PLAIN
from sparsecraft.dense.plain import is_plain_linear
from sparsecraft.errors import DonorError
from tests import cases, tiny
from tests.cases.members import member_inputs, member_model, member_outputs
from tests.cases.zoo import ZOO


class Scaled(nn.Linear):
    scale = 0.9

    def forward(self, x):
        return super().forward(x) * self.scale


def scaled_by(scale: float) -> nn.Linear:
    module = Scaled(16, 24)
    module.scale = scale
    return module


class Same(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1e4, 1e4)


class Dropping(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Wider(nn.Linear):
    """Idefics': more output features, of a Linear inside."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.more = nn.Linear(self.in_features, 2)

    def forward(self, x):
        return torch.cat([super().forward(x), self.more(x)], -1)


def plain(cls=nn.Linear) -> nn.Linear:
    return cls(16, 24)


def method(self, x):
    return nn.functional.linear(x, self.weight, self.bias) + 1


def with_forward(forward) -> nn.Module:
    module = plain()
    module.forward = forward(module)
    return module


def hooked(hook, before: bool = False) -> nn.Module:
    module = plain()
    (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
    return module


def offloaded() -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(nn.Sequential(plain()), "cpu")[0]


def packed() -> nn.Module:
    return pytest.importorskip("bitsandbytes").nn.Linear8bitLt(16, 24, has_fp16_weights=False)


def rounded() -> nn.Module:
    """A subclass of a packed Linear, whose code no twin runs."""
    module = packed()
    module.__class__ = type("Rounded", (type(module),), {"forward": method})
    return module


PLAIN = {
    "Linear": plain,
    "Conv1D": lambda: Conv1D(24, 16),
    "of the same code": lambda: plain(Same),
    "scaled by one": lambda: scaled_by(1.0),
    "a hook that looks on": lambda: hooked(lambda module, args, y: None),
    "offloaded": offloaded,
    "packed": packed,
    "without memory": lambda: plain(Same).to("meta"),
    "bfloat16": lambda: plain(Same).bfloat16(),
}
OTHERS = {
    "scaled": lambda: plain(Scaled),
    "scaled, without memory": lambda: plain(Scaled).to("meta"),
    "scaled, bfloat16": lambda: plain(Scaled).bfloat16(),
    "clamped": lambda: plain(Clamped),
    "dropout": lambda: plain(Dropping),
    "wider": lambda: plain(Wider),
    "a method of its own": lambda: with_forward(lambda m: types.MethodType(method, m)),
    "a function of its own": lambda: with_forward(lambda m: lambda x: method(m, x)),
    "a hook": lambda: hooked(lambda module, args, y: y * 0.9),
    "a hook before": lambda: hooked(lambda module, args: (args[0] * 0.9,), before=True),
    "a parametrization": lambda: parametrizations.weight_norm(plain()),
    "an old parametrization": lambda: prune.l1_unstructured(plain(), "weight", 0.5),
    "packed, with a method of its own": rounded,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_linears_that_are_ones(kind):
    assert is_plain_linear(PLAIN[kind]())


@pytest.mark.parametrize("kind", OTHERS)
def test_linears_that_are_none(kind):
    module = OTHERS[kind]()
    modes = [part.training for part in module.modules()]
    state = torch.random.get_rng_state()
    assert not is_plain_linear(module)
    assert modes == [part.training for part in module.modules()]
    assert torch.equal(state, torch.random.get_rng_state())


def llama(monkeypatch: pytest.MonkeyPatch, **parts: type[nn.Linear]) -> nn.Module:
    """Whose configuration builds attentions with Linears of other classes."""

    class Attention(modeling_llama.LlamaAttention):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            for name, cls in parts.items():
                getattr(self, name).__class__ = cls

    monkeypatch.setattr(modeling_llama, "LlamaAttention", Attention)
    return tiny.llama()


def test_loras_leave_out_what_is_no_linear_and_say_so(monkeypatch):
    model, ids = llama(monkeypatch, q_proj=Scaled, v_proj=Same), torch.arange(3, 33)[None]
    report = sc.convert(model, sc.recipes.lora(rank=2))
    assert report.left_out == {NOT_PLAIN: ["model.layers.*.self_attn.q_proj (2)"]}
    assert {path.rpartition(".")[2] for path in report.layers} >= {"k_proj", "v_proj"}
    cases.randomize_new(model)
    before = model(ids).logits
    sc.merge(model)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


@pytest.mark.skipif("deepseek_v4" not in ZOO, reason="this transformers has no DeepSeek-V4")
def test_block_diagonal_linears_are_left_out():
    model, inputs = member_model("deepseek_v4"), member_inputs("deepseek_v4")
    before = member_outputs(model, inputs)
    report = sc.convert(model, sc.recipes.molora(num_experts=2, rank=2))
    assert report.left_out[NOT_PLAIN] == ["model.layers.*.self_attn.o_a_proj (2)"]
    assert torch.equal(member_outputs(model, inputs), before)


@pytest.mark.parametrize("recipe", ["upcycling", "camelidae"])
def test_a_network_with_such_a_part_is_refused(recipe):
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, y: y * 0.9)
    with pytest.raises(DonorError, match="'up_proj' is no plain Linear"):
        sc.convert(model, getattr(sc.recipes, recipe)(), certify=False)


def test_a_projection_of_an_attention_is_refused(monkeypatch):
    model = llama(monkeypatch, k_proj=Scaled)
    with pytest.raises(DonorError, match="'k_proj' is no plain Linear"):
        sc.convert(model, sc.recipes.mov(num_experts=2), certify=False)
