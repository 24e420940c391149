"""What every Linear of a model belongs to, and which ones no experts may stand beside."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from sparsecraft.dense.bypass import bypassed
from sparsecraft.dense.linears import BYPASSED, EXPERTS, ROUTER
from sparsecraft.dense.mixtures import mixtures, routers, tensors
from sparsecraft.dense.sites import find_sites, placed_linears
from sparsecraft.errors import DonorError
from tests.cases.members import member_model
from tests.cases.zoo import ZOO

QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}

# Family -> names of the Linears of attentions, of networks, and of what else is in a block.
NAMES = {
    "llama": (QKVO, GATED, set()),
    "gpt_neox": ({"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}, set()),
    "bloom": ({"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}, set()),
    "bart": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}, set()),
    "albert": ({"query", "key", "value", "dense"}, {"ffn", "ffn_output"}, set()),
    "distilbert": ({"q_lin", "k_lin", "v_lin", "out_lin"}, {"lin1", "lin2"}, set()),
    "deberta": ({"in_proj", "dense"}, {"dense"}, set()),
    "modernbert": ({"Wqkv", "Wo"}, {"Wi", "Wo"}, set()),
    "wav2vec2_conformer": (
        {"linear_q", "linear_k", "linear_v", "linear_out", "linear_pos"},
        {"intermediate_dense", "output_dense"},
        set(),
    ),
    "mixtral": (QKVO, set(), set()),
    "qwen2_moe": (QKVO, GATED, set()),
    "jamba": (QKVO, GATED, {"in_proj", "x_proj", "out_proj"}),
    "mamba": (set(), set(), {"in_proj"}),
    "qwen3_next": (QKVO, GATED, {"in_proj_qkvz", "in_proj_ba", "out_proj"}),
    "recurrent_gemma": (QKVO, GATED, {"linear_x", "linear_y", "linear_out"}),
    "swin": (QKVO, {"fc1", "fc2"}, set()),
}


@pytest.mark.parametrize("family", NAMES)
def test_every_linear_of_the_blocks_is_a_site(family):
    model = member_model(family)
    attention, network, other = NAMES[family]
    wanted = {"attention_linear": attention, "ffn_linear": network}
    for kind, names in wanted.items():
        if names:
            found = [site.path for site in find_sites(model, kind)]
            assert {path.rpartition(".")[2] for path in found} == names
        else:
            with pytest.raises(DonorError, match=kind):
                find_sites(model, kind)
    found = {site.path for site in find_sites(model, "linear")}
    assert {path.rpartition(".")[2] for path in found} == attention | network | other
    heads = ("lm_head", "classifier", "decoder", "predictions", "downsample.reduction")
    assert not [path for path in found if path.endswith(heads)]


def test_a_network_inside_an_attention_is_a_network():
    found = {at.path: at for at in placed_linears(member_model("siglip_vision"))}
    assert found["head.mlp.fc1"].nature == "ffn"
    assert found["head.attention.out_proj"].why_not == BYPASSED


@pytest.mark.parametrize(
    ("family", "why_not", "names"),
    [
        ("mamba", BYPASSED, {"x_proj", "dt_proj", "out_proj"}),
        ("bamba", BYPASSED, {"out_proj"}),
        ("wavlm", BYPASSED, {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("phimoe", ROUTER, {"router"}),
        ("qwen2_moe", ROUTER, {"shared_expert_gate"}),
        ("llama4", ROUTER, {"router"}),
        ("doge_moe", ROUTER, {"router_gate"}),
        ("switch_transformers", ROUTER, {"classifier"}),
        ("switch_transformers", EXPERTS, {"wi", "wo"}),
    ],
)
def test_what_cannot_be_adapted_is_left_out_with_its_reason(family, why_not, names):
    found = [at for at in placed_linears(member_model(family)) if at.why_not == why_not]
    assert {at.path.rpartition(".")[2] for at in found} == names
    assert not any(at.at("linear") for at in found)


class _Reads(nn.Module):
    """Takes its parts' tensors in the ways that count, and in those that do not."""

    def __init__(self):
        super().__init__()
        self.taken, self.asked, self.called = (nn.Linear(4, 4) for _ in range(3))
        self.inner = nn.MultiheadAttention(4, 2)
        nn.init.zeros_(self.called.weight)

    def forward(self, x):
        if isinstance(self.asked.weight, torch.Tensor) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.dtype)
        return self.called(self.asked(x)) + x @ self.taken.weight


def test_a_weight_that_is_read_past_its_module_is_found_in_the_source():
    model = nn.Sequential(_Reads(), nn.TransformerEncoderLayer(4, 2))
    assert bypassed(model) == {
        "0.taken",
        "0.inner.out_proj",
        *(f"1.{name}" for name in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")),
    }


def test_blooms_slices_are_read_where_the_config_asks_for_them():
    model = member_model("bloom")
    assert not bypassed(model)
    for module in model.modules():
        if hasattr(module, "slow_but_exact"):
            module.pretraining_tp, module.slow_but_exact = 2, True
    names = {path.rpartition(".")[2] for path in bypassed(model)}
    assert names == {"dense", "dense_4h_to_h"}


# Family -> experts, how many of them a token meets, and whether they are the whole network.
MIXTURES = {
    "mixtral": (4, 2, True),
    "qwen2_moe": (4, 2, True),
    "gpt_oss": (4, 2, True),
    "deepseek_v3": (4, 2, True),
    "llama4": (2, 1, True),
    "jamba": (2, 1, True),
    "granitemoe": (4, 2, True),
    "ernie4_5_moe": (4, 2, True),
    "switch_transformers": (2, 1, True),
    "jetmoe": (4, 2, True),
    "doge_moe": (16, 2, True),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_models_own_mixtures_are_found(family):
    model = member_model(family)
    found = mixtures(model)
    networks = [m for m in found if "attention" not in m.path]  # JetMoE's has experts, too
    assert {(m.num_experts, m.top_k, m.is_network) for m in networks} == {MIXTURES[family]}
    assert not any(m.is_network for m in found if m not in networks)
    assert routers(model, found)


class _Stacked(nn.Module):
    """A user's own mixture: its tensors stand beside its router and a shared network."""

    def __init__(self, shape: tuple[int, ...] = (4, 8, 8), **parts: nn.Module):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        self.top_k, self.shared = 2, nn.Linear(8, 8)
        for name, part in parts.items():
            setattr(self, name, part)


def test_experts_beside_their_router_are_found():
    model = member_model("llama")
    router = nn.Linear(8, 4)
    blocks = model.model.layers
    blocks[0].mlp = _Stacked(router=router)
    found = mixtures(model)
    assert [m.path for m in found] == ["model.layers.0.mlp.up", "model.layers.0.mlp.down"]
    assert {(m.num_experts, m.top_k, m.is_network) for m in found} == {(4, 2, True)}
    held = [tensor for mixture in found for tensor in tensors(model, mixture)]
    assert held[0] is blocks[0].mlp.up and held[1] is blocks[0].mlp.down
    assert routers(model, found) == {"model.layers.0.mlp.router"}
    others = (
        _Stacked(),  # nothing chooses
        _Stacked((1, 8, 8), router=router),  # such as RWKV's mixing of positions
        _Stacked(router=router, table=nn.Embedding(9, 8)),
    )
    for other in others:
        blocks[0].mlp = other
        assert not mixtures(model)


def test_dense_models_have_no_mixtures():
    own = {"Mixtures of experts", "Hybrids and state spaces", "Encoder-decoders"}
    for family in ("llama", "t5", "vit", "clip", "wav2vec2", "gemma3n", "albert"):
        assert ZOO[family].group not in own or family == "t5"
        assert not mixtures(member_model(family))


def test_like_paths_are_one_line():
    from sparsecraft.surgery.left_out import grouped

    paths = ["a.0.b", "a.1.b", "a.0.c", "x1.y", "a.10.b"]
    assert grouped(paths) == ["a.*.b (3)", "a.0.c", "x1.y"]
    assert re.fullmatch(r"a\.\*\.b \(3\)", grouped(paths)[0])
