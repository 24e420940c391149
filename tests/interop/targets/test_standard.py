"""Export: plain transformers reads it and gives our logits; what has no exact form is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.errors import CheckpointError, ExportError
from sparsecraft.evaluation.certificate import TOLERANCE
from sparsecraft.interop.exporting import STANDARD, TARGETS, plan
from sparsecraft.interop.twins import certify_twin
from sparsecraft.moe.routers.scorer import Scorer
from tests import cases, tiny
from tests.evaluation.test_certificate import FAULTS


def upcycled(dense, **changes):
    sc.convert(dense, sc.recipes.upcycling(**{"num_experts": 4, "top_k": 2, **changes}))
    dense.train().eval()  # copies get memory of their own
    cases.randomize_new(dense, std=0.05)
    return dense


def llama():
    config = transformers.LlamaConfig(**cases.LLAMA_LIKE, tie_word_embeddings=True)
    torch.manual_seed(2)
    return transformers.LlamaForCausalLM(config).eval()


def base(name: str):
    """A tiny dense model whose attention is special in one way; its name says which."""
    kinds = {
        "llama": lambda: transformers.LlamaConfig(**cases.LLAMA_LIKE, tie_word_embeddings=True),
        "llama_rope": lambda: transformers.LlamaConfig(
            **cases.LLAMA_LIKE,
            hidden_act="gelu",
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        "llama_heads": lambda: transformers.LlamaConfig(**cases.LLAMA_LIKE, head_dim=16),
        "llama_bias": lambda: transformers.LlamaConfig(**cases.LLAMA_LIKE, attention_bias=True),
        "mistral": lambda: transformers.MistralConfig(**cases.LLAMA_LIKE, sliding_window=8),
        "qwen2": lambda: transformers.Qwen2Config(**cases.LLAMA_LIKE, tie_word_embeddings=True),
        "qwen2_window": lambda: transformers.Qwen2Config(
            **cases.LLAMA_LIKE, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        "qwen3": lambda: transformers.Qwen3Config(**cases.LLAMA_LIKE, head_dim=16),
        "qwen3_window": lambda: transformers.Qwen3Config(
            **cases.LLAMA_LIKE,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        ),
        "granite": lambda: transformers.GraniteConfig(
            **cases.LLAMA_LIKE,
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.2,
        ),
    }
    config = kinds[name]()
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, too
            parameter.normal_(std=0.1)
    return model


RECIPES = {
    "replace": {},
    "replace_raw": {"router.renormalize": False},
    "soft": {"router.select": "soft"},
    "beside": {"place": "beside"},
    "nexus": {"place": "beside", "router.top_k": 1, "router.renormalize": False},
    "gated": {"place": "beside", "router.gates_base": True},
}


def mixture(name: str, recipe: str):
    model = base(name)
    sc.convert(model, sc.override(sc.recipes.upcycling(4), RECIPES[recipe]), certify=False)
    model.train().eval()  # copies get memory of their own
    cases.randomize_new(model, std=0.1)
    return model


IDS = torch.arange(3, 43).view(2, 20)
M, G, Q2, Q3 = "mixtral", "granite", "qwen2_moe", "qwen3_moe"
# What is exact, by hand: of weights that sum to one instead of the network and beside it.
ATTENTION = {
    "llama": ({M, G, Q2}, {G, Q2}),
    "llama_rope": ({M, G, Q2}, {G, Q2}),
    "llama_heads": ({M, G, Q2}, {G, Q2}),
    "llama_bias": ({G}, {G}),
    "mistral": ({M, Q2}, {Q2}),
    "qwen2": ({G, Q2}, {G, Q2}),
    "qwen2_window": ({Q2}, {Q2}),
    "qwen3": ({Q3}, set()),
    "qwen3_window": (set(), set()),
    "granite": ({G}, {G}),
}
TABLE = {
    "replace": lambda replace, beside: replace,
    "replace_raw": lambda replace, beside: replace & {Q2, Q3},
    "soft": lambda replace, beside: replace,
    "beside": lambda replace, beside: beside,
    "nexus": lambda replace, beside: beside & {Q2},
    "gated": lambda replace, beside: beside & {Q2},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ATTENTION)
def test_what_is_exact_is_exported_and_the_rest_refused(name, recipe, tmp_path):
    model, wanted = mixture(name, recipe), TABLE[recipe](*ATTENTION[name])
    ours = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prospects = {p.target: p for p in plan(model)}
    assert {name for name, p in prospects.items() if p.reason is None} == wanted
    for target in STANDARD.values():
        if target.name not in wanted:
            reason = prospects[target.name].reason
            assert f"Exact: {', '.join(t for t in STANDARD if t in wanted) or 'no'}" in reason
            continue
        record = sc.export(model, target.name, tmp_path / target.name)
        assert record["difference"] <= 2e-5 * max(1, record["scale"]), target.name
        assert record["lint"] == list(prospects[target.name].lint)
        back = target.from_target(target.to_target(model), *target.form(model))
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[key], ours[key]) for key in ours)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Target -> our model, and the logits and file names of its export in a process of plain
    transformers, where sparsecraft cannot be imported."""
    folder = tmp_path_factory.mktemp("exports")
    models = {
        M: mixture("mistral", "replace"),
        G: mixture("qwen2", "beside"),
        Q2: mixture("qwen2", "nexus"),
        Q3: mixture("qwen3", "replace_raw"),
    }
    for target, model in models.items():
        sc.export(model, target, folder / target)
    ids = torch.arange(3, 43).view(2, 20)
    torch.save(ids, folder / "ids.pt")
    script = (
        "import sys; sys.modules['sparsecraft'] = None\n"
        "import torch, transformers, pathlib\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "ids, found = torch.load(folder / 'ids.pt'), {}\n"
        "for path in folder.iterdir():\n"
        "    if path.is_dir():\n"
        "        model = transformers.AutoModelForCausalLM.from_pretrained(path)\n"
        "        found[path.name] = type(model).__name__, model(ids).logits.detach()\n"
        "torch.save(found, folder / 'found.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env=os.environ)
    found = torch.load(folder / "found.pt")
    return {
        target: (model(ids).logits, *found[target], tensor_names(folder / target))
        for target, model in models.items()
    }


@pytest.mark.parametrize(
    ("target", "class_name", "tensor"),
    [
        # The names that vLLM and llama.cpp read.
        (M, "MixtralForCausalLM", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        (G, "GraniteMoeSharedForCausalLM", "model.layers.0.block_sparse_moe.input_linear.weight"),
        (Q2, "Qwen2MoeForCausalLM", "model.layers.0.mlp.experts.3.gate_proj.weight"),
        (Q3, "Qwen3MoeForCausalLM", "model.layers.0.mlp.experts.3.down_proj.weight"),
    ],
)
def test_an_export_loads_without_sparsecraft_and_gives_our_logits(
    loaded, target, class_name, tensor
):
    ours, name, theirs, names = loaded[target]
    assert name == class_name and tensor in names
    assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max()


def tensor_names(folder) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_engines_are_warned_of():
    def warned(name, recipe, target):
        return " ".join(STANDARD[target].lint(mixture(name, recipe)))

    assert warned("llama", "replace", M) == ""
    assert "silu here, and the model has hidden_act='gelu'" in warned("llama_rope", "replace", M)
    assert "head_dim=16" not in warned("llama_heads", "replace", M)
    assert "head_dim=16" in warned("llama_heads", "replace", G)
    assert "head_dim=16" in warned("llama_heads", "nexus", Q2)
    assert "sliding_window=8" in warned("mistral", "replace", M)
    assert "norm_topk_prob=True" in warned("mistral", "replace", Q2)
    assert "norm_topk_prob" not in warned("mistral", "nexus", Q2)
    assert "norm_topk_prob" not in warned("mistral", "soft", Q2)
    assert "norm_topk_prob=False" in warned("qwen3", "replace_raw", Q3)
    assert warned("qwen3", "replace", Q3) == warned("qwen3", "soft", Q3) == ""
    assert "output.weight" in warned("qwen2", "nexus", Q2)
    assert "output.weight" not in warned("qwen2_window", "nexus", Q2)
    assert "biases in its attention" in warned("qwen2", "beside", G)
    model = base("llama")
    sc.convert(model, sc.recipes.upcycling(3))
    assert STANDARD[M].lint(model) == [
        "llama.cpp: 3 experts are no power of two, of which mergekit warns."
    ]


@pytest.mark.parametrize(
    ("name", "target"),
    [("llama", M), ("llama_rope", M), ("llama_rope", G), ("qwen2", Q2), ("qwen3", Q3)],
)
def test_the_rotary_embedding_is_told_to_transformers_4_too(name, target, tmp_path):
    """transformers 4.57.6 read rope_parameters not at all and took its default theta."""
    model = mixture(name, "replace")
    sc.export(model, target, tmp_path / "out")
    rope = dict(model.config.rope_parameters)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_parameters"] == rope
    assert written["rope_theta"] == rope.pop("rope_theta")
    assert written.get("rope_scaling") == (rope if name == "llama_rope" else None)
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert read.rope_parameters == model.config.rope_parameters
    # What reads the old names alone finds the same.
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert type(read)(**old).rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("recipe", ["replace", "beside", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_of_a_network_that_counts_in_full_is_one_half_and_not_zero(
    recipe, dtype, tmp_path
):
    """llama.cpp's sigmoid is silu(x) / x, which is no number at zero."""
    model = mixture("qwen2", recipe).to(dtype)
    for layer in model.sparsecraft.layers if recipe == "gated" else ():
        layer.router.base_gate.weight.data.zero_()  # as it starts
    sc.export(model, Q2, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for layer in range(2):
            gate_1D = file.get_tensor(f"model.layers.{layer}.mlp.shared_expert_gate.weight")
            assert gate_1D.dtype == dtype
            x_TD = torch.randn(500, gate_1D.shape[1], generator=torch.Generator().manual_seed(1))
            logits = x_TD @ gate_1D.float().T
            for half in (logits.sigmoid(), torch.nn.functional.silu(logits) / logits):
                rest = (half - 0.5).abs().max()
                assert rest < 1e-6 if dtype == torch.float16 else rest <= 1e-7


def test_nexus_is_qwen2_moe_with_the_rows_of_its_domains(tmp_path):
    model = base("llama")
    sc.convert(model, sc.recipes.nexus(4, embedding_dim=8))
    model.train().eval()
    cases.randomize_new(model, std=0.1)
    record = sc.export(model, Q2, tmp_path / "out")
    assert record["difference"] <= 1e-5
    assert len(record["lint"]) == 1 and "output.weight" in record["lint"][0]
    assert {p.target for p in plan(model) if p.reason is None} == {Q2}


@pytest.mark.parametrize(
    ("recipe", "exact"),
    [
        (sc.recipes.virtual_groups(8, granularity=8, top_k=8), {M, G, Q2}),  # of six neurons
        (sc.recipes.drop_upcycling(4), {M, G, Q2}),
        (sc.recipes.btx(4, routing="soft"), {M, G, Q2}),
        (sc.recipes.btx(4, routing="switch"), {Q2}),
    ],
)
def test_recipes_of_full_experts_are_exported(recipe, exact, tmp_path):
    model = base("llama")
    sc.convert(model, recipe, certify=False)
    model.train().eval()
    cases.randomize_new(model, std=0.1)
    prospects = {p.target: p for p in plan(model) if p.reason is None}
    assert prospects.keys() == exact
    for target, prospect in prospects.items():
        assert sc.export(model, target, tmp_path / target)["difference"] <= 1e-5
        odd = model.sparsecraft.layers[0].experts.down.shape[-1] % 4 != 0
        assert any("'eager' alone: [6]" in warning for warning in prospect.lint) == odd
        again = sc.import_moe(tmp_path / target)
        assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)


def test_an_untied_model_is_exported_untied(tmp_path):
    model = mixture("qwen2", "nexus")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    assert sc.export(model, Q2, tmp_path / "out")["lint"] == []
    assert "lm_head.weight" in tensor_names(tmp_path / "out")


def test_any_scorer_with_rows_is_exported_as_a_linear_router(tmp_path):
    class Rows(Scorer):
        """Logits by a matrix that is computed."""

        def __init__(self, weight):
            super().__init__()
            self.first, self.second = torch.nn.Parameter(weight / 2), torch.nn.Parameter(weight)

        def weight_rows(self):
            return 3 * self.first - self.second

        def forward(self, x):
            return x.float() @ self.weight_rows().T

    class Opaque(Scorer):
        def forward(self, x):
            return x[:, :4].float()

    model = mixture("qwen2", "nexus")
    for layer in model.sparsecraft.layers:
        layer.router.scorer = Rows(layer.router.scorer.weight.detach())
    assert sc.export(model, Q2, tmp_path / "out")["difference"] <= 1e-5
    for layer in model.sparsecraft.layers:
        layer.router.scorer = Opaque()
    with pytest.raises(ExportError, match="scorer is more than a matrix"):
        sc.export(model, Q2, tmp_path / "no")


def test_temperature_is_folded_into_the_router(tmp_path):
    model = llama()
    recipe = sc.override(sc.recipes.upcycling(num_experts=4), {"router.temperature": 0.5})
    sc.convert(model, recipe)
    model.train().eval()
    cases.randomize_new(model, std=0.1)
    record = sc.export(model, "mixtral", tmp_path / "out")
    assert record["difference"] <= 1e-5


def test_what_has_no_exact_form_is_refused_with_the_reason(tmp_path):
    def refused(model, recipe, reason):
        sc.convert(model, recipe)
        with pytest.raises(ExportError, match=reason):
            sc.export(model, "mixtral", tmp_path / "out")
        sc.revert(model)

    raw = sc.recipes.upcycling(num_experts=4, renormalize=False)
    refused(llama(), sc.recipes.camelidae(num_experts=4, adapter_dim=16), "full feed-forward")
    refused(llama(), raw, "sum to one")
    refused(llama(), sc.recipes.upcycling(num_experts=4, paths="*.0.mlp"), "1 of 2 layers")
    refused(cases.dense("qwen2"), sc.recipes.upcycling(num_experts=4), "qwen2")
    refused(cases.dense("llama"), sc.recipes.upcycling(num_experts=4), "mlp_bias")
    refused(base("llama_bias"), sc.recipes.upcycling(num_experts=4), "attention_bias.*: granite")
    refused(cases.dense("gemma"), sc.recipes.upcycling(num_experts=4), "blocks of 'gemma'")
    refused(cases.dense("gpt2"), sc.recipes.upcycling(num_experts=4), "blocks of 'gpt2'")
    refused(
        base("llama"),
        sc.override(raw, {"router.reads": "output", "place": "beside"}),
        "reads='output'",
    )
    head = transformers.LlamaForSequenceClassification(base("llama").config)
    refused(head, sc.recipes.upcycling(num_experts=4), "another head")
    refused(base("llama"), sc.recipes.btx(4, routing="sample"), "first_soft")
    with pytest.raises(ExportError, match="mean 'mixtral'"):
        sc.export(llama(), "mixtrl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch):
    model = upcycled(llama())
    target = TARGETS["mixtral"]
    right = target.to_target

    def wrong(model):
        tensors = right(model)
        tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"].flip(
            0
        )
        return tensors

    monkeypatch.setattr(type(target), "to_target", lambda self, model: wrong(model))
    with pytest.raises(ExportError, match="differs from ours"):
        sc.export(model, "mixtral", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_are_kept_and_companions_travel(tmp_path):
    base = tiny.save_dense(tmp_path / "dense")
    model = upcycled(transformers.AutoModelForCausalLM.from_pretrained(base))
    sc.export(model, "mixtral", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sparsecraft_export.json").read_text())["target"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny.CHATML
    # transformers 4, by which llama.cpp's converter reads it, has no TokenizersBackend.
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    with pytest.raises(CheckpointError, match="exists already"):
        sc.export(model, "mixtral", tmp_path / "out")
    sc.export(model, "mixtral", tmp_path / "out", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="left alone"):
        sc.export(model, "mixtral", tmp_path / "mine", overwrite=True)


def test_peft_refuses_a_base_that_a_merge_has_changed(tmp_path):
    model = cases.dense("llama")
    sc.convert(model, sc.recipes.camelidae(4, 2, 8, lora_rank=2))
    cases.randomize_new(model)
    sc.merge(model, partial=True)
    with pytest.raises(ExportError, match="a merge changed its dense weights"):
        sc.export(model, "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("target", ["mixtral", "peft"])
def test_split_networks_are_merged_and_not_exported(tmp_path, target):
    for recipe in (
        sc.recipes.moefication(4, partition="random"),
        sc.recipes.d2dmoe(4, attention_experts=2),
        sc.recipes.cmoe(4, 1, shared=1, variant="finetuned"),
    ):
        model = llama()
        sc.convert(model, recipe, certify=False)
        with pytest.raises(ExportError, match=r"sc\.merge\(model\) makes it a dense model again"):
            sc.export(model, target, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------ fields that a family does not read


FOREIGN = {
    "llama": {"sliding_window": 80},
    "llama_types": {
        "sliding_window": 80,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {"sliding_window": 80},
    "mistral": {"attention_bias": True, "sliding_window": None},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_field_of_another_family_is_not_believed(name, tmp_path):
    family = name.split("_")[0].capitalize()
    fields = {**FOREIGN[name], "max_position_embeddings": 256}
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(0, 96, (1, 150))
    with torch.no_grad():
        wanted = model(ids).logits
    sc.convert(model, sc.recipes.upcycling(num_experts=2))
    target = "granite" if family == "Granite" else "mixtral"
    record = sc.export(model, target, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, wanted, atol=1e-5)
    assert record["probed_tokens"] == (96 if fields["sliding_window"] else 64)


def windowed(size: int = 1024):
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=size,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    sc.convert(model, sc.recipes.upcycling(num_experts=2))
    return model


def lose_the_window(monkeypatch, **fields):
    """A target that loses the window agrees on every shorter probe."""
    mixtral = type(STANDARD["mixtral"])
    settings = mixtral.settings

    def without(self, form, attention):
        return settings(self, form, attention) | {"sliding_window": None, **fields}

    monkeypatch.setattr(mixtral, "settings", without)


# Operations that are enough for a window of 1024 on its twin, and not on the model.
TWIN = 1e8


def test_a_difference_beyond_the_window_is_seen(tmp_path, monkeypatch):
    lose_the_window(monkeypatch)
    with pytest.raises(ExportError, match="in 1152 tokens"):
        sc.export(windowed(), "mixtral", tmp_path / "out")


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 1000}])
def test_a_window_too_long_for_a_probe_is_probed_on_a_twin(fields, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsecraft.dense.windows.MOST_WORK", TWIN)
    record = sc.export(windowed(), "mixtral", tmp_path / "good")
    assert (record["probed_tokens"], record["twin_tokens"]) == (64, 1152)
    assert record["windows_not_probed"] == []
    assert "twin with the same windows was compared in 1152 tokens" in record["measured"]
    lose_the_window(monkeypatch, **fields)
    with pytest.raises(ExportError, match="a small twin with the same windows differs"):
        sc.export(windowed(), "mixtral", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_window_that_nothing_probes_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparsecraft.dense.windows.MOST_WORK", 1e5)
    sc.save(windowed(), tmp_path / "ours")
    arguments = ["export", tmp_path / "ours", "--to", "mixtral", "--out", tmp_path / "out"]
    assert main([*map(str, arguments)]) == 0
    record = json.loads((tmp_path / "out" / "sparsecraft_export.json").read_text())
    assert record["windows_not_probed"] == [1024]
    assert "NOT compared beyond windows of 1024" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ATTENTION)
def test_every_standard_form_has_a_twin(name, recipe):
    model = mixture(name, recipe)
    for target in TABLE[recipe](*ATTENTION[name]):
        found = certify_twin(model, STANDARD[target])
        assert found.exact and found.tokens >= 9 and found.scale > 1


# ------------------------------------------------------------------------------- in half precision

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"bias"}))
def test_a_wrong_layer_is_seen_in_any_type(fault, dtype, tmp_path, monkeypatch):
    """Logits in half precision let ten percent of a layer pass."""
    model = upcycled(cases.dense("mistral").to(dtype))
    target = STANDARD["mixtral"]
    to_target = type(target).to_target

    def wrong(self, given):
        given = copy.deepcopy(given)
        FAULTS[fault](given.model.layers[1].mlp.experts)
        return to_target(self, given)

    monkeypatch.setattr(type(target), "to_target", wrong)
    with pytest.raises(ExportError, match="in float32: different"):
        sc.export(model, "mixtral", tmp_path / "out")


@pytest.mark.parametrize("dtype", HALF)
def test_what_was_measured_in_half_precision_is_said(dtype, tmp_path):
    """The cast has rounded the rotary frequencies too, which are in no file."""
    record = sc.export(upcycled(llama().to(dtype)), "mixtral", tmp_path / "out")
    assert record["difference"] < 1e-5 and record["rounding"] is None
    assert record["dtype"] == "float32" and 1e-4 <= record["power"] < 1e-3
    assert "would be seen" in record["measured"]
    assert json.loads((tmp_path / "out" / "sparsecraft_export.json").read_text()) == record


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_rounded_when_it_is_written_is_right_before(dtype, tmp_path, monkeypatch):
    """Experts that training left in float32, and a router's temperature. A token goes to all of
    them: what rounding does to a choice is no matter of the type."""
    dense = cases.dense("qwen2").to(dtype)
    recipe = sc.recipes.upcycling(num_experts=4, top_k=4)
    sc.convert(dense, sc.override(recipe, {"router.temperature": 0.7}))
    for layer in dense.sparsecraft.layers:
        layer.experts.float()
    cases.randomize_new(dense, std=0.05)
    record = sc.export(dense, "qwen2_moe", tmp_path / "out")
    assert record["difference"] < 1e-5 < record["rounding"] < 0.1
    assert f"{record['rounding']:.1e} with rounded weights" in record["measured"]
    monkeypatch.setitem(TOLERANCE, dtype, 0.0)
    monkeypatch.setattr("sparsecraft.evaluation.whole.EQUAL", 1e-5)
    with pytest.raises(ExportError, match="the weights make it another model"):
        sc.export(dense, "qwen2_moe", tmp_path / "other")


def test_without_memory_for_float32_the_command_says_what_it_does_not_see(
    tmp_path, monkeypatch, caplog, capsys
):
    model = llama().to(torch.bfloat16)
    sc.convert(model, sc.recipes.upcycling(num_experts=4))
    sc.save(model, tmp_path / "ours")
    monkeypatch.setattr("sparsecraft.checkpoint.wide.free_memory", lambda device: 1000)
    arguments = ["export", tmp_path / "ours", "--to", "mixtral", "--out", tmp_path / "out"]
    assert main([*map(str, arguments)]) == 0
    record = json.loads((tmp_path / "out" / "sparsecraft_export.json").read_text())
    assert record["dtype"] == "bfloat16" and record["power"] >= 0.05
    said = capsys.readouterr()
    assert record["measured"] in said.out and "in bfloat16: equal; an error of" in said.out
    assert "Compared in bfloat16, because a copy in float32 takes" in caplog.text + said.err
