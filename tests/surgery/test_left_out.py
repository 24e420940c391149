"""What a conversion does not reach is said, with the reason."""

from __future__ import annotations

import pytest

import sparsecraft as sc
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.cli.main import main
from sparsecraft.dense.linears import BYPASSED, EXPERTS, ROUTER
from sparsecraft.surgery.left_out import OTHER, OUTSIDE
from tests.cases.examine import ZOO_RECIPES
from tests.cases.members import member_model

MAMBA = "model.layers.0.mamba"
OWN = "model.layers.*.mlp.experts (2)"

# (family, recipe) -> what is left out.
LEFT_OUT = {
    ("llama", "camelidae"): {},
    ("bert", "upcycling"): {},
    ("llava", "upcycling"): {},
    ("mixtral", "molora"): {EXPERTS: [OWN]},
    ("mixtral", "camelidae"): {EXPERTS: [OWN]},  # adapters around them, LoRAs not inside
    ("qwen2_moe", "upcycling"): {EXPERTS: [OWN]},
    ("qwen2_moe", "molora"): {
        EXPERTS: [OWN],
        ROUTER: ["model.layers.*.mlp.shared_expert_gate (2)"],
    },
    ("deepseek_v3", "upcycling"): {EXPERTS: ["model.layers.1.mlp.experts"]},
    ("jamba", "upcycling"): {
        EXPERTS: ["model.layers.1.feed_forward.experts"],
        OTHER: [MAMBA],
    },
    ("jamba", "molora"): {
        EXPERTS: ["model.layers.1.feed_forward.experts"],
        BYPASSED: [f"{MAMBA}.dt_proj"],
    },
    ("mamba", "molora"): {
        BYPASSED: [f"backbone.layers.*.mixer.{n} (2)" for n in ("x_proj", "dt_proj", "out_proj")]
    },
    ("llava", "molora"): {
        OUTSIDE: [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)],
    },
    ("siglip_vision", "molora"): {BYPASSED: ["head.attention.out_proj"]},
}


# Not `family` and `recipe`: conftest leaves out pairs that the tables of the suite do not have.
@pytest.mark.parametrize(("member", "method"), LEFT_OUT)
def test_what_is_left_out_is_in_the_report(member, method):
    model = member_model(member)
    report = sc.convert(model, ZOO_RECIPES[method](), certify=False)
    left_out = dict(report.left_out)
    if member == "jamba":
        left_out.pop(ROUTER, None)  # which was a Linear before transformers 5.24
    assert left_out == LEFT_OUT[member, method]
    assert model.sparsecraft.report["conversion"]["left_out"] == report.left_out


def test_what_the_users_paths_exclude_is_not_listed():
    recipe = sc.recipes.molora(2, 2, paths="*.self_attn.*")
    assert sc.convert(member_model("mixtral"), recipe, certify=False).left_out == {}


def test_adapters_stand_around_a_mixture_and_a_shared_expert_is_not_taken_apart():
    for family in ("mixtral", "qwen2_moe", "gpt_oss", "jetmoe"):
        model = member_model(family)
        report = sc.convert(model, ZOO_RECIPES["camelidae"]())
        assert report.certificate.exact
        around = {path for path, kind in report.layers.items() if kind == "adapter"}
        assert around == {f"model.layers.{i}.mlp" for i in range(model.config.num_hidden_layers)}


@pytest.mark.parametrize("method", ["upcycling", "mov", "gmoefication"])
def test_networks_inside_a_mixture_are_refused_by_what_they_are(method):
    with pytest.raises(
        sc.SparsecraftError, match=r"own mixtures.*model\.layers\.0\.mlp.*site='ffn'"
    ):
        sc.convert(member_model("mixtral"), ZOO_RECIPES[method]())


def test_the_command_line_prints_and_keeps_it(tmp_path, capsys):
    member_model("mamba").save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    main(["convert", "molora", "--model", str(tmp_path / "base"), "--out", str(out)])
    (paths,) = LEFT_OUT["mamba", "molora"].values()
    line = f"Left out, {BYPASSED}: {', '.join(paths)}"
    assert line in capsys.readouterr().out
    assert read_json(out / "report.json")["conversion"]["left_out"] == {BYPASSED: paths}
    main(["inspect", str(out)])
    assert line in capsys.readouterr().out
