"""A module counts as a network only if its code computes the formula; one change, and it does not.

The modules here are made for this file: two blocks, the second of which differs from the formula in
one thing only, so that a proof of the first block alone, or of classes and names, lets it pass.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsecraft.dense.networks import find_networks
from sparsecraft.dense.proof import TOLERANCE

D, H = 16, 24


class Plain(nn.Module):
    """down(act(up(x))), with places where a subclass differs."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)

    def forward(self, x):
        return self.end(self.down(self.middle(self.act(self.up(self.start(x))))))

    def start(self, x):
        return x

    def middle(self, hidden):
        return hidden

    def end(self, y):
        return y


class Gated(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.one, self.two = nn.Linear(D, H, bias), nn.Linear(D, H, bias)
        self.three, self.act = nn.Linear(H, D, bias), nn.SiLU()

    def forward(self, x):
        return self.three(self.act(self.two(x)) * self.one(x))


class Fused(nn.Module):
    first = 0  # which half of the rows the activation reads

    def __init__(self):
        super().__init__()
        self.both, self.act, self.down = nn.Linear(D, 2 * H), nn.SiLU(), nn.Linear(H, D)

    def forward(self, x):
        halves = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(halves[self.first]) * halves[1 - self.first])


class Block(nn.Module):
    """Attention and a network whose parts are siblings, as in BART."""

    rate = 0.0

    def __init__(self):
        super().__init__()
        self.self_attn, self.norm = nn.Linear(D, 3 * D), nn.LayerNorm(D)
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)
        self.activation_dropout = self.rate

    def forward(self, x, mask):
        attended, _ = self.self_attn(x)
        x = self.norm(x + F.dropout(attended, 0.1, self.training))
        hidden = self.between(self.activation_fn(self.fc1(x)))
        hidden = F.dropout(hidden, self.activation_dropout, self.training)
        return (x + F.dropout(self.fc2(hidden), 0.1, self.training),)

    def between(self, hidden):
        return hidden


def of(base=Plain, **parts):
    return type("Changed", (base,), parts)()


def twice(self, x):
    return Plain.forward(self, Plain.forward(self, x))


def dropping(name, rate=0.3, share=1.0):
    """A network with `F.dropout` at one place, by an attribute."""

    def forward(self, y):
        return F.dropout(y, share * self.some_dropout, self.training)

    def init(self):
        Plain.__init__(self)
        self.some_dropout = rate

    return of(**{name: forward, "__init__": init})


class Stretched(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.01


def part(name, module, base=Plain):
    made = base()
    setattr(made, name, module)
    return made


def patched():
    made = Plain()
    forward = made.forward
    made.forward = lambda x: 1.001 * forward(x)
    return made


SAME = {
    "two layers": Plain,
    "gate, whatever the names and their order": Gated,
    "with biases": lambda: Gated(bias=True),
    "one matrix for gate and up": Fused,
    "transposed": lambda: part("up", Conv1D(H, D)),
    "hidden as wide as the model": lambda: wide(D),
    "half as wide": lambda: wide(D // 2),
    "twice as wide": lambda: wide(2 * D),
    "a function for the activation": lambda: of(
        __init__=without_act, forward=lambda self, x: self.down(F.silu(self.up(x)))
    ),
    "a residual of its own": lambda: of(forward=lambda self, x, r: Plain.forward(self, x) + r),
    "a multiplier before and one behind": lambda: of(start=scaled(2.0), end=scaled(0.5)),
    "a norm behind": lambda: part_after(nn.LayerNorm(D)),
    "an activation with parameters": lambda: part("act", nn.PReLU()),
    "siblings": Block,
    "parts that run twice": lambda: of(forward=twice),
}


def wide(width):
    made = Plain()
    made.up, made.down = nn.Linear(D, width), nn.Linear(width, D)
    return made


def without_act(self):
    Plain.__init__(self)
    del self.act


def part_after(norm):
    made = of(end=lambda self, y: self.norm(y))
    made.norm = norm
    return made


def scaled(by):
    return lambda self, y: y * by


def below(limit):
    return lambda self, y: y.clamp(max=limit)


DIFFERENT = {
    "a multiplier between": lambda: of(middle=scaled(0.5)),
    "a clamp of usual numbers": lambda: of(middle=below(1.0)),
    "a clamp of large ones": lambda: of(middle=below(1e4)),
    "small ones to zero": lambda: of(middle=lambda self, y: y * (y.abs() > 1e-3)),
    "only some neurons": lambda: of(
        middle=lambda self, y: F.relu(y - y.mean(-1, keepdim=True) - 1.6 * y.std(-1, keepdim=True))
    ),
    "a norm inside": lambda: of(middle=lambda self, y: F.layer_norm(y, y.shape[-1:])),
    "a Linear of its own": lambda: part("up", Stretched(D, H)),
    "a bias of one half alone": lambda: part("one", nn.Linear(D, H), Gated),
    "the other half first": lambda: of(Fused, first=1),
    "a method put into the module": patched,
    "dropout between, by no name": lambda: of(
        middle=lambda self, y: F.dropout(y, 0.3, self.training)
    ),
    "dropout of half the rate": lambda: dropping("middle", share=0.5),
}


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)


def why(*blocks):
    """What is wrong with each network of a model, and the networks."""
    found, _ = find_networks(Model(*blocks))
    return [network.why for network in found], found


@pytest.mark.parametrize("case", SAME)
def test_a_module_that_computes_the_formula_is_a_network(case):
    reasons, found = why(SAME[case](), SAME[case]())
    assert reasons == [None, None]
    assert all(network.error <= TOLERANCE for network in found)


@pytest.mark.parametrize("case", DIFFERENT)
def test_one_that_computes_something_else_is_refused_with_its_layer(case):
    other = DIFFERENT[case]()
    reasons, found = why(Plain(), other)
    assert reasons[0] is None and reasons[1], case
    assert found[1].owner == "layers.1" and found[1].error > TOLERANCE


@pytest.mark.parametrize("case", ["norm", "multiplier", "dropout of another name", "convolution"])
def test_siblings_with_something_between_are_no_network(case):
    between = {
        "norm": lambda self, y: F.layer_norm(y, y.shape[-1:]),
        "multiplier": scaled(2.0),
        "dropout of another name": lambda self, y: F.dropout(y, 0.2, self.training),
        "convolution": lambda self, y: self.conv(y.mT).mT,
    }[case]
    other = of(Block, between=between)
    other.conv = nn.Conv1d(H, H, 1, groups=H)
    found, doubtful = find_networks(Model(Block(), other))
    assert [network.owner for network in found] == ["layers.0"]
    assert doubtful[0].owner == "layers.1" and doubtful[0].why


def test_two_linears_without_an_activation_are_no_network():
    low_rank = of(__init__=without_act, forward=lambda self, x: self.down(self.up(x)))
    found, doubtful = find_networks(Model(Plain(), low_rank))
    assert [network.owner for network in found] == ["layers.0"]
    assert [network.owner for network in doubtful] == ["layers.1"]


@pytest.mark.parametrize(
    "place, wanted", [("middle", (0.3, 0.0)), ("end", (0.0, 0.3))], ids=["between", "behind"]
)
def test_a_dropout_is_found_where_it_falls(place, wanted):
    reasons, found = why(dropping(place))
    form = found[0].form
    assert reasons == [None] and (form.hidden_dropout, form.output_dropout) == wanted


def test_a_dropout_between_siblings_is_found_with_its_attribute():
    reasons, found = why(of(Block, rate=0.4))
    form = found[0].form
    assert reasons == [None] and not found[0].whole
    assert (form.hidden_dropout, form.silenced) == (0.4, "activation_dropout")


def test_no_attribute_is_silenced_where_nothing_is_dropped():
    _, found = why(Block())
    assert (found[0].form.hidden_dropout, found[0].form.silenced) == (0.0, None)


@pytest.mark.parametrize("base", [Plain, Gated, Block])
def test_weights_without_memory_or_of_another_dtype_are_as_good(base):
    for made in (base().to("meta"), base().half(), base().bfloat16()):
        assert why(made)[0] == [None]
    other = of(middle=scaled(0.5)).to("meta")
    assert why(Plain().to("meta"), other)[0][1]


def test_the_proof_leaves_the_model_and_the_random_state_alone():
    model = Model(of(Block, rate=0.4), Gated()).train()
    model.layers[1].eval()
    seen = []
    model.layers[1].register_forward_hook(lambda *given: seen.append(given))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, state = dict(model.named_modules()), torch.get_rng_state()
    find_networks(model)
    assert torch.equal(torch.get_rng_state(), state) and not seen
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.layers[0].training and not model.layers[1].training
    assert model.layers[0].activation_dropout == 0.4
