"""Import: mixtures made elsewhere are models of ours, and go back to the same bits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.errors import CertificateError, CheckpointError, RecipeError, SurgeryError
from sparsecraft.evaluation.whole import certify
from sparsecraft.interop import importing
from sparsecraft.interop.exporting import STANDARD, plan
from sparsecraft.interop.twins import random_model, small
from tests import cases, tiny
from tests.evaluation.test_certificate import FAULTS

LIKE = {k: v for k, v in cases.LLAMA_LIKE.items() if k != "intermediate_size"}
SHARED = {"shared_expert_intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4}
SCALES = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}

# Name -> configuration, the target it goes back to, place, neurons of an expert of other width.
MADE = {
    "mixtral": (
        lambda: transformers.MixtralConfig(
            **LIKE, intermediate_size=48, num_local_experts=4, sliding_window=8, head_dim=16
        ),
        "mixtral",
        ("replace", None),
    ),
    "qwen2_moe": (
        lambda: transformers.Qwen2MoeConfig(**LIKE, **SHARED, num_experts_per_tok=2),
        "qwen2_moe",
        ("beside", 24),
    ),
    "qwen2_moe_window": (
        lambda: transformers.Qwen2MoeConfig(
            **LIKE,
            **(SHARED | {"moe_intermediate_size": 48}),
            num_experts_per_tok=2,
            norm_topk_prob=True,
            use_sliding_window=True,
            sliding_window=8,
            tie_word_embeddings=True,
        ),
        "qwen2_moe",
        ("beside", None),
    ),
    "qwen3_moe": (
        lambda: transformers.Qwen3MoeConfig(
            **LIKE, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=3, head_dim=16
        ),
        "qwen3_moe",
        ("replace", None),
    ),
    "granite": (
        lambda: transformers.GraniteMoeSharedConfig(
            **LIKE,
            **SCALES,
            intermediate_size=24,
            shared_intermediate_size=40,
            num_local_experts=4,
            attention_bias=True,
        ),
        "granite",
        ("beside", 24),
    ),
    "granitemoe": (
        lambda: transformers.GraniteMoeConfig(
            **LIKE, **SCALES, intermediate_size=24, num_local_experts=4, tie_word_embeddings=True
        ),
        "granite",
        ("replace", None),
    ),
}


def made(name: str, folder) -> torch.nn.Module:
    """A tiny random mixture, saved by transformers with a tokenizer beside it."""
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(MADE[name][0]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 43).view(2, 20)).logits


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", MADE)
def test_a_mixture_comes_in_and_goes_back_to_the_same_bits(name, tmp_path):
    _, target, (place, width) = MADE[name]
    theirs = logits(made(name, tmp_path / "in"))
    model = sc.import_moe(tmp_path / "in")
    edit = model.sparsecraft.recipe.edits[0]
    assert (edit.place, edit.experts.width) == (place, width)
    torch.testing.assert_close(logits(model), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max())
    sc.save(model, tmp_path / "ours")
    model = sc.load(tmp_path / "ours")
    torch.testing.assert_close(logits(model), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max())
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    assert target in {p.target for p in plan(model) if p.reason is None}
    sc.export(model, target, tmp_path / "back")
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    old, new = (
        transformers.AutoConfig.from_pretrained(tmp_path / p).to_dict() for p in ("in", "back")
    )
    free = {"_name_or_path", "transformers_version", "architectures", "model_type"}
    changed = {k for k in new.keys() - free if k in old and old[k] != new[k]}
    # Qwen's width of dense layers, of which there are none.
    assert changed <= {"intermediate_size"} | ({"max_window_layers"} if "qwen" in name else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", ["none", *sorted(FAULTS.keys() - {"bias"})])
def test_a_wrong_layer_is_seen_in_any_type(fault, dtype, tmp_path, monkeypatch):
    made("mixtral", tmp_path / "float32").to(dtype).save_pretrained(tmp_path / "in")
    build = importing._build

    def wrong(*args):
        model = build(*args)
        layer = model.model.layers[1].mlp
        layer.experts = copy.deepcopy(layer.experts)  # it has its memory from the mixture
        FAULTS.get(fault, lambda bank: None)(layer.experts)
        return model

    monkeypatch.setattr(importing, "_build", wrong)
    if fault == "none":
        report = sc.import_moe(tmp_path / "in").sparsecraft.report["import"]
        found = report["certificate"]
        assert found["dtype"] == "float32"
        assert found["max_difference"] < 1e-5 < found["power"] < 1e-3
        assert "would be seen" in report["measured"]
    else:
        with pytest.raises(CertificateError, match="in float32: different"):
            sc.import_moe(tmp_path / "in")


# Operations on a CPU -> what is said of a window of 1024: of the model, of its twin, of none.
PROBED = {
    1e10: "in 1152 tokens would be seen",
    1e8: "a small twin with the same windows was compared in 1152 tokens",
    1e4: "NOT compared beyond windows of 1024",
}


@pytest.mark.parametrize("work", PROBED)
def test_a_window_that_is_lost_is_seen_beyond_it(work, tmp_path, monkeypatch, capsys):
    config = MADE["mixtral"][0]()
    config.sliding_window, config.max_position_embeddings = 1024, 4096
    torch.manual_seed(4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    monkeypatch.setattr("sparsecraft.dense.windows.MOST_WORK", work)
    assert main(["import", str(tmp_path / "in"), "--out", str(tmp_path / "ours")]) == 0
    assert PROBED[work] in capsys.readouterr().out
    mixtral = type(STANDARD["mixtral"])
    dense_config = mixtral.dense_config

    def without(self, config, form):
        found = dense_config(self, config, form)
        found.sliding_window = None
        return found

    monkeypatch.setattr(mixtral, "dense_config", without)
    if work > 1e5:
        with pytest.raises(CertificateError, match="differs"):
            sc.import_moe(tmp_path / "in")


@pytest.mark.parametrize("name", MADE)
def test_every_mixture_has_a_twin(name):
    twin = random_model(small(MADE[name][0]()))
    kind = importing.KINDS[twin.config.model_type]
    assert certify(twin, importing._as_ours(twin, kind)).exact


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granite"])
def test_an_imported_mixture_trains_and_has_no_dense_model(name, tmp_path):
    made(name, tmp_path / "in")
    model = sc.import_moe(tmp_path / "in")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(3, 83).view(4, 20)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    still = [key for key, p in model.named_parameters() if torch.equal(p, before[key])]
    assert not still, still
    with pytest.raises(SurgeryError, match="no base folder"):
        sc.revert(model)
    sc.save(model.eval(), tmp_path / "ours")
    assert torch.equal(logits(sc.load(tmp_path / "ours")), logits(model))


@pytest.mark.parametrize("target", STANDARD)
def test_what_we_export_comes_back_as_it_was(target, tmp_path):
    from tests.interop.targets.test_standard import mixture

    name = {"qwen3_moe": "qwen3", "qwen2_moe": "qwen2", "granite": "granite"}.get(target, "mistral")
    for recipe in ("replace", "beside") if target in ("qwen2_moe", "granite") else ("replace",):
        model = mixture(name, recipe)
        sc.export(model, target, tmp_path / recipe)
        again = sc.import_moe(tmp_path / recipe)
        ours, found = model.state_dict(), again.state_dict()
        assert ours.keys() == found.keys() and type(again) is type(model)
        assert all(torch.equal(ours[key], found[key]) for key in ours)
        place = again.sparsecraft.recipe.edits[0].place
        assert place == recipe and not again.sparsecraft.recipe.edits[0].router.gates_base


@pytest.mark.parametrize("recipe", ["replace", "beside"])
def test_gates_of_zeros_as_older_exports_have_them_are_read_too(recipe, tmp_path):
    from tests.interop.targets.test_standard import mixture

    model = mixture("qwen2", recipe)
    sc.export(model, "qwen2_moe", tmp_path / "out")
    held = tensors(tmp_path / "out")
    for name, tensor in held.items():
        if name.endswith("shared_expert_gate.weight"):
            assert tensor.any()
            tensor.zero_()
    save_file(held, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    ours, found = model.state_dict(), sc.import_moe(tmp_path / "out").state_dict()
    assert ours.keys() == found.keys() and all(torch.equal(ours[key], found[key]) for key in ours)


def test_names_of_older_and_newer_writers_are_read(tmp_path):
    """mergekit-moe writes the fused names of transformers v5, others one matrix for each expert."""
    model = made("mixtral", tmp_path / "in")
    fused = tmp_path / "fused"
    model.save_pretrained(fused, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors(fused)
    assert torch.equal(logits(sc.import_moe(fused)), logits(sc.import_moe(tmp_path / "in")))


def test_a_gate_and_another_width_are_for_what_has_them():
    with pytest.raises(RecipeError, match="gates_base is True with place='replace'"):
        sc.override(sc.recipes.upcycling(4), {"router.gates_base": True})
    wide = sc.override(sc.recipes.upcycling(4), {"experts.width": 24})
    model = cases.dense("llama")
    with pytest.raises(RecipeError, match=r"width is 24.*48 neurons.*come with a checkpoint"):
        sc.convert(model, wide)
    assert not hasattr(model, "sparsecraft")


def test_the_gate_multiplies_the_dense_network_by_a_sigmoid():
    model = cases.dense("mistral")
    changes = {"place": "beside", "router.gates_base": True}
    sc.convert(model, sc.override(sc.recipes.upcycling(4), changes), certify=False)
    cases.randomize_new(model, std=0.1)
    layer = model.sparsecraft.layers[0]
    x = torch.randn(2, 5, 32)
    gate = torch.sigmoid(x @ layer.router.base_gate.weight.T)
    added = layer(x) - gate * layer.base(x)
    layer.router.base_gate.weight.data.zero_()
    torch.testing.assert_close(layer(x), layer.base(x) / 2 + added)


def test_what_ours_cannot_have_is_refused(tmp_path):
    cases.dense("mistral").save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="model_type 'mistral'; mixtures of mixtral, "):
        sc.import_moe(tmp_path / "dense")
    for change, match in (
        ({"mlp_only_layers": [0], "intermediate_size": 64}, "Not every layer"),
        ({"qkv_bias": False}, "every dense Qwen2 has biases"),
    ):
        config = transformers.Qwen2MoeConfig(**LIKE, **SHARED, num_experts_per_tok=2, **change)
        transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / match)
        with pytest.raises(CheckpointError, match=match):
            sc.import_moe(tmp_path / match)


def mixturekit(folder, base: str, *, routers: bool = True, **changes) -> torch.nn.Module:
    """A folder in the layout of MixtureKit's `traditional`, and the model that it means."""
    dense = cases.dense(base)
    sc.convert(dense, sc.recipes.btx(num_experts=3), certify=False)
    dense.train().eval()
    cases.randomize_new(dense, std=0.1)
    state = {}
    for name, tensor in dense.state_dict().items():
        path, _, leaf = name.partition(".mlp.")
        if leaf == "experts.gate_up":
            for e, both in enumerate(tensor):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    state[f"{path}.mlp.experts.{e}.{part}_proj.weight"] = half.contiguous()
        elif leaf == "experts.down":
            for e, down in enumerate(tensor):
                state[f"{path}.mlp.experts.{e}.down_proj.weight"] = down.contiguous()
        elif leaf == "router.scorer.weight":
            state |= {f"{path}.mlp.gate.weight": tensor} if routers else {}
        elif name != "lm_head.weight" or not dense.config.tie_word_embeddings:
            state[name] = tensor
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = dense.config.to_dict() | {
        "model_type": "mymix",
        "architectures": ["MixtureKitForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_mymix.MixtureKitConfig"},
        "base_model_class": type(dense).__name__,
        "moe_method": "traditional",
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "expert_names": ["a", "b", "c"],
        "alpha": 0.01,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return dense


@pytest.mark.parametrize("base", ["mistral", "qwen2", "qwen3", "gemma"])
def test_mixturekits_mixtures_are_read(base, tmp_path):
    wanted = mixturekit(tmp_path / "in", base)
    model = sc.import_moe(tmp_path / "in")
    assert torch.equal(logits(model), logits(wanted)) and type(model) is type(wanted)
    sc.save(model, tmp_path / "ours")
    assert torch.equal(logits(sc.load(tmp_path / "ours")), logits(wanted))


def test_mixturekits_other_layouts_are_refused(tmp_path):
    mixturekit(tmp_path / "untrained", "mistral", routers=False)
    with pytest.raises(CheckpointError, match=r"no router at model\.layers\.0.*recipe `btx`"):
        sc.import_moe(tmp_path / "untrained")
    mixturekit(tmp_path / "bts", "mistral", moe_method="bts")
    with pytest.raises(CheckpointError, match="'bts' mixture of 'MistralForCausalLM'"):
        sc.import_moe(tmp_path / "bts")


@pytest.mark.parametrize(("base", "key"), [("mistral", "{}"), ("llama", "expert_{}")])
def test_the_published_layouts_of_pesc_are_read(base, key, tmp_path):
    """sparsetral numbers its experts, Camelidae names them; the configuration's width is wrong."""
    config = dict(cases.LLAMA_LIKE) | ({"sliding_window": 8} if base == "mistral" else {})
    torch.manual_seed(4)
    wanted = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(base, **config)
    ).eval()
    recipe = sc.recipes.camelidae(3, 2, 8, adapter_scale=0.25, lora_rank=0)
    sc.convert(wanted, recipe, certify=False)
    cases.randomize_new(wanted, std=0.1)
    state = {}
    for name, tensor in wanted.state_dict().items():
        path, _, leaf = name.partition(".mlp.")
        if leaf in ("experts.down", "experts.up"):
            part = leaf.removeprefix("experts.")
            for e, matrix in enumerate(tensor):
                at = f"{path}.mlp.moe_adapter.experts.{key.format(e)}.adapter_{part}.weight"
                state[at] = matrix.contiguous()
        else:
            leaf = {"router.scorer.weight": "moe_adapter.router.weight"}.get(leaf, leaf)
            state[f"{path}.mlp.{leaf.removeprefix('base.')}" if leaf else name] = tensor
    save_file(state, tmp_path / "model.safetensors")
    own = {"moe_scaling": 0.25, "num_experts": 3, "topk": 2, "adapter_dim": 64}
    data = wanted.config.to_dict() | own | {"moe_dtype": "bfloat16", "architectures": ["Custom"]}
    (tmp_path / "config.json").write_text(json.dumps(data))
    model = sc.import_moe(tmp_path)
    assert torch.equal(logits(model), logits(wanted)) and type(model) is type(wanted)
    assert model.sparsecraft.recipe.name == "camelidae"
    sc.save(model, tmp_path / "ours")
    assert torch.equal(logits(sc.load(tmp_path / "ours")), logits(wanted))
