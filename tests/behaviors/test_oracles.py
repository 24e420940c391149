"""Mixtures of one expert are PEFT's methods; parameter counts are the formulas of the MoV paper."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

import sparsecraft as sc
from sparsecraft.dense.once import looked_at_once
from sparsecraft.moe.names import dense_name
from sparsecraft.surgery.build import build_layer
from sparsecraft.surgery.plan import plan
from tests.cases import D, R, dense
from tests.leaves import ALL, FFN, Leaves, converted, exact, near, objective, small
from tests.reference import installed, mixtures

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5", "t5_gated", "bert"])
ORACLES = pytest.mark.parametrize("family", ["llama", "gpt2", "t5_gated", "bert"])

# --------------------------------------------------------------------------------------------- PEFT


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def agree_with_peft(model: nn.Module, theirs: nn.Module, pairs: list, inputs: dict) -> None:
    """Logits, and the gradients of PEFT's parameters and of the whole dense model.

    pairs: (our parameter, PEFT's, the rows of PEFT's that ours is).
    """
    theirs = theirs.double().eval()
    model.requires_grad_(True), theirs.requires_grad_(True)

    def part(tensor, rows):
        start, length = rows or (0, tensor.numel())
        return tensor.view(-1)[start : start + length]

    with torch.no_grad():
        for ours, name, rows in pairs:
            part(theirs.get_parameter(name), rows).copy_(model.get_parameter(ours).flatten())
    found, wanted = model(**inputs).logits, theirs(**inputs).logits
    assert near(found, wanted)
    objective(found).backward()
    objective(wanted).backward()
    shared = {dense_name(model, name): p for name, p in model.named_parameters()}
    new = {name for name, _ in model.named_parameters() if dense_name(model, name) is None}
    routers = {name for name in new if name.endswith("scorer.weight")}
    assert new - routers == {ours for ours, _, _ in pairs}
    assert all(near(model.get_parameter(n).grad, torch.zeros(())) for n in routers), "weight one"
    for ours, name, rows in pairs:
        gradient = part(theirs.get_parameter(name).grad, rows)
        assert gradient.any() and near(model.get_parameter(ours).grad.flatten(), gradient), name
    adapters = {name for _, name, _ in pairs}
    for name, parameter in theirs.named_parameters():
        if name not in adapters:
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            assert near(shared[name].grad, parameter.grad), name


@ORACLES
@pytest.mark.parametrize("name", ["ia3", "mov", "released"])
def test_one_vector_is_pefts_ia3(peft, name, family):
    recipe = sc.recipes.ia3() if name == "ia3" else sc.recipes.mov(1, name.replace("mov", "paper"))
    model, reference = converted(family, recipe), exact(family)
    inner = [network["down"][0] for network in installed.networks(reference, family)]
    scaled = installed.places(reference, family, "key", "value")
    config = peft.IA3Config(
        target_modules=[path for path, _ in installed.whole(scaled)] + inner,
        feedforward_modules=inner,
        fan_in_fan_out=family == "gpt2",
    )
    leaves, pairs = Leaves(model), []
    for path, rows in scaled:
        (ours,) = leaves.layers(path, rows)
        pairs.append((f"{ours}.experts.vectors", f"base_model.model.{path}.ia3_l.default", rows))
    site = "act" if name == "released" else "up"
    for network in installed.networks(reference, family):
        (ours,) = leaves.layers(network[site][0])
        theirs = f"base_model.model.{network['down'][0]}.ia3_l.default"
        pairs.append((f"{ours}.experts.vectors", theirs, None))
    agree_with_peft(model, peft.get_peft_model(reference, config), pairs, small(family))


@ORACLES
@pytest.mark.parametrize(
    ("recipe", "alpha"),
    [
        (sc.recipes.lora(R), 16),
        (sc.recipes.molora(1, R, alpha=12), 12),
        (sc.recipes.hydralora(1, R), 32),
        (sc.recipes.hydralora(1, R, attention=True), 32),
        (sc.recipes.smola(1, R), 4),
    ],
    ids=["lora", "molora", "hydralora", "hydralora_all", "smola"],
)
def test_one_low_rank_expert_is_pefts_lora(peft, recipe, alpha, family):
    model, reference = converted(family, recipe), exact(family)
    ffn_only = recipe.edits[0].site == "ffn_linear"
    found = installed.whole(installed.places(reference, family, *(FFN if ffn_only else ALL)))
    config = peft.LoraConfig(
        r=R,
        lora_alpha=alpha,
        target_modules=[path for path, _ in found],
        fan_in_fan_out=family == "gpt2",
    )
    pairs = []
    for path, rows in found:
        (ours,) = Leaves(model).layers(path, rows)
        for part in ("lora_A", "lora_B"):
            theirs = f"base_model.model.{path}.{part}.default.weight"
            pairs.append((f"{ours}.experts.{part}", theirs, None))
    agree_with_peft(model, peft.get_peft_model(reference, config), pairs, small(family))


# ----------------------------------------------------------------------------------------- formulas

V1_1 = {  # layers on each side, d, heads, width of a head, f
    "large": (24, 1024, 16, 64, 2816),
    "XL": (24, 2048, 32, 64, 5120),
    "XXL": (24, 4096, 64, 64, 10240),
}
COUNTED = {
    "ia3": (sc.recipes.ia3(), mixtures.ia3_t5, ()),
    **{f"MoV-{n}": (sc.recipes.mov(n, "released"), mixtures.mov_t5, (n,)) for n in (10, 30, 60)},
    **{f"LoRA-{r}": (sc.recipes.lora(r, "released"), mixtures.lora_t5, (r,)) for r in (4, 8, 16)},
    **{
        f"MoLORA-{n}": (sc.recipes.molora(n, 4, "released"), mixtures.molora_t5, (n, 4))
        for n in (2, 5, 10, 15)
    },
}
PERCENT = {
    "large": "0.036 0.545 1.64 3.27 0.49 0.98 1.96 1.10 2.75 5.51 8.26",
    "XL": "0.019 0.279 0.838 1.675 0.262 0.524 1.049 0.59 1.47 2.95 4.42",
    "XXL": "0.0097 0.142 0.426 0.852 0.134 0.268 0.537 0.30 0.75 1.51 2.26",
}
MILLIONS = {
    ("large", "MoV-10"): "4.27",
    ("large", "MoV-30"): "12.8",
    ("large", "MoV-60"): "25.6",
    ("XL", "ia3"): "0.54",
    ("XL", "MoV-10"): "7.96",
    ("XL", "MoV-30"): "23.9",
    ("XL", "MoV-60"): "47.7",
    ("XXL", "MoV-10"): "15.8",
    ("XXL", "MoV-30"): "47.5",
    ("XXL", "MoV-60"): "94.9",
}


def on_meta(size: str) -> nn.Module:
    layers, d, heads, head, f = V1_1[size]
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=d,
        d_kv=head,
        d_ff=f,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
        model.lm_head.weight = nn.Parameter(torch.empty(32128, d))  # theirs is their own
    return model


def printed(value: float, as_in: str) -> bool:
    """Whether the value, rounded to the digits of a printed number, is that number."""
    return f"{value:.{len(as_in.partition('.')[2])}f}" == as_in


@pytest.mark.parametrize("size", V1_1)
def test_published_sizes_on_t5(size):
    """Exactly the formulas of the released code, and their percentages to the printed digits."""
    model, (layers, *widths) = on_meta(size), V1_1[size]
    dense = sum(p.numel() for p in model.parameters())
    with looked_at_once():  # a recipe takes half a minute otherwise
        counts = {name: count(model, recipe) for name, (recipe, *_) in COUNTED.items()}
    for (name, (_, formula, arguments)), percent in zip(
        COUNTED.items(), PERCENT[size].split(), strict=True
    ):
        assert counts[name] == formula(layers, layers, *widths, *arguments), name
        assert printed(100 * counts[name] / dense, percent), name
        if millions := MILLIONS.get((size, name)):
            assert printed(counts[name] / 1e6, millions), name


def count(model: nn.Module, recipe: sc.Recipe) -> int:
    """The parameters that a recipe adds; layers that are alike are built once."""
    found, alike = 0, {}
    for item in plan(model, recipe):
        kind = re.sub(r"\d+", "*", item.site.path) + item.edit.site
        if kind not in alike:
            alike[kind] = build_layer(model, item, device="meta")
        found += sum(p.numel() for p in alike[kind].parameters())
    return found


@pytest.mark.parametrize("name", COUNTED)
def test_the_formulas_count_small_t5(name):
    """Heads that do not fill the width, and more decoder layers than encoder layers."""
    recipe, formula, arguments = COUNTED[name]
    sizes = {"d_model": 24, "d_kv": 5, "d_ff": 40, "num_heads": 3}
    config = transformers.T5Config(
        vocab_size=16,
        num_layers=1,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        **sizes,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    before = sum(p.numel() for p in model.parameters())
    sc.convert(model, recipe)
    new = sum(p.numel() for p in model.parameters()) - before
    assert new == formula(1, 2, 24, 3, 5, 40, *arguments)


@FAMILIES
def test_formulas_by_token_count_any_linears(family):
    def new(recipe):
        model = dense(family)
        before = sum(p.numel() for p in model.parameters())
        sc.convert(model, recipe)
        return sum(p.numel() for p in model.parameters()) - before

    def sizes(*roles):
        found = installed.places(model, family, *roles)
        return [tuple(installed.matrix(model, *place)[0].shape)[::-1] for place in found]

    def fused(*roles):
        found = installed.whole(installed.places(model, family, *roles))
        return [tuple(installed.matrix(model, *place)[0].shape)[::-1] for place in found]

    model = dense(family)
    ffns = len(installed.networks(model, family))
    scaled, all_, ffn = sizes("key", "value", "up"), fused(*ALL), fused(*FFN)
    assert new(sc.recipes.ia3()) == mixtures.ia3_count(scaled)
    assert new(sc.recipes.mov(3)) == mixtures.mov_count(scaled, 3)
    assert new(sc.recipes.lora(5)) == mixtures.lora_count(all_, 5)
    assert new(sc.recipes.molora(3, 5)) == mixtures.molora_count(all_, 3, 5)
    assert new(sc.recipes.hydralora(3, 5)) == mixtures.hydralora_count(ffn, 3, 5)
    assert new(sc.recipes.smola(3, 5)) == mixtures.molora_count(all_, 3, 5)
    by_modality = sc.recipes.smola(3, 5, modalities=True)
    assert new(by_modality) == 3 * mixtures.molora_count(all_, 3, 5)
    networks = [ffn[i::ffns] for i in range(ffns)]
    inside = mixtures.mixlora_count(networks, D, 3, 5)
    attention = mixtures.lora_count(fused("query", "key", "value", "output"), 5)
    assert new(sc.recipes.mixlora(3, 2, 5, attention_rank=0)) == inside
    assert new(sc.recipes.mixlora(3, 2, 5)) == inside + attention
