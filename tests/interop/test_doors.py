"""A converted model goes by its own folder, and every class of transformers reads that folder."""

from __future__ import annotations

import copy
import pickle
import shutil
from contextlib import suppress

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.surgery.identity import UNSAVED
from sparsecraft.surgery.record import tokenizer_of
from tests import tiny
from tests.cases import randomize_new

IDS = torch.arange(5, 25).reshape(2, 10)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny.save_dense(tmp_path_factory.mktemp("doors") / "base")


def converted(base: str, recipe: sc.Recipe | None = None) -> torch.nn.Module:
    model = sc.hub.load_dense(base)
    sc.convert(model, recipe or sc.recipes.molora(num_experts=4, rank=2))
    randomize_new(model)
    return model


def names(model: torch.nn.Module) -> set[str]:
    parts = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    return {m.name_or_path for m in parts} | {m.config._name_or_path for m in parts}


def test_a_model_goes_by_the_folder_that_holds_it(base, tmp_path):
    model = converted(base)
    assert names(model) == {UNSAVED + base}
    first = sc.save(model, tmp_path / "first")
    assert names(model) == {str(first)}
    model.save_pretrained(tmp_path / "second")
    assert names(model) == {str(tmp_path / "second")}
    assert names(copy.deepcopy(model)) == names(model)
    assert names(sc.load(first)) == {str(first)}
    assert names(sc.load(first, override={"edits.0.experts.alpha": 3.0})) == {UNSAVED + base}
    sc.revert(model)
    assert names(model) == {base}


def test_a_model_that_was_changed_goes_by_none(base, tmp_path):
    ffn = sc.load(sc.save(converted(base, sc.recipes.upcycling(4, 2)), tmp_path / "ffn"))
    sc.remove(ffn, 3)
    assert names(ffn) == {UNSAVED + base}
    split = sc.load(sc.save(converted(base, sc.recipes.moefication(4, 2)), tmp_path / "split"))
    sc.set_budget(split, 0.5)
    assert names(split) == {UNSAVED + base}


def test_a_name_that_says_to_save_loads_nothing_but_the_bases_tokenizer(base):
    name = converted(base).config._name_or_path
    for cls in (
        transformers.AutoConfig,
        transformers.AutoModelForCausalLM,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
    ):
        with pytest.raises(OSError, match=r"not saved yet: call sc\.save"):
            cls.from_pretrained(name)
    for cls in (transformers.AutoTokenizer, transformers.AutoProcessor):
        assert cls.from_pretrained(name).get_vocab() == tiny.tokenizer().get_vocab()


def test_our_own_look_up_of_the_base_goes_on(base, tmp_path):
    model = converted(base)
    vocabulary = tiny.tokenizer().get_vocab()
    assert tokenizer_of(model).get_vocab() == vocabulary
    folder = sc.save(model, tmp_path / "moe")
    loaded = sc.load(folder)
    assert tokenizer_of(loaded).get_vocab() == vocabulary
    assert loaded.sparsecraft.origin == base
    with torch.no_grad():
        loaded.get_input_embeddings().weight.add_(1)
    sc.revert(loaded)  # reads the base's folder again
    assert torch.equal(logits(loaded), logits(sc.hub.load_dense(base)))


# What lm-eval, TRL, PEFT and pipelines pass, and what asks for nothing.
ARGUMENTS = {
    "gguf_file": None,
    "quantization_config": None,
    "revision": "main",
    "trust_remote_code": False,
    "token": None,
    "cache_dir": None,
    "local_files_only": True,
    "use_safetensors": True,
    "low_cpu_mem_usage": True,
    "weights_only": True,
    "subfolder": "",
    "variant": None,
    "device_map": {"": "cpu"},
    "attn_implementation": "eager",
    "tp_plan": None,
}
CLASSES = ("AutoModelForCausalLM", "LlamaForCausalLM")


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_takes_from_pretraineds_arguments(base, name, standalone, tmp_path):
    model, cls = converted(base), getattr(transformers, name)
    folder = sc.save(model, tmp_path / "moe", standalone=standalone)
    wanted = logits(model)
    assert torch.equal(logits(cls.from_pretrained(folder)), wanted)
    loaded, info = cls.from_pretrained(folder, output_loading_info=True, **ARGUMENTS)
    assert loaded.config._attn_implementation == "eager"
    assert not any(info.values())
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5)
    for asked in ({"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        assert cls.from_pretrained(folder, **asked).dtype == torch.bfloat16
    assert cls.from_pretrained(folder, dtype="auto").dtype == torch.float32
    assert cls.from_pretrained(folder, rms_norm_eps=0.5).config.rms_norm_eps == 0.5
    for asked in (
        {"gguf_file": "some.gguf"},  # AutoConfig looks for it first
        {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)},
        {"tp_plan": "auto"},
        {"no_such_argument": 1},
    ):
        word = "gguf" if "gguf_file" in asked else next(iter(asked))
        with pytest.raises((sc.SparsecraftError, OSError), match=word):
            cls.from_pretrained(folder, **asked)


def test_a_class_of_another_model_is_refused(base, tmp_path):
    folder = sc.save(converted(base), tmp_path / "moe")
    others = (
        "LlamaModel",
        "AutoModel",  # whose first output would be logits, to whoever wants features
        "MistralForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForImageTextToText",
        "LlamaForSequenceClassification",
    )
    for name in others:
        with pytest.raises(sc.SparsecraftError, match=f"LlamaForCausalLM, which {name}"):
            getattr(transformers, name).from_pretrained(folder)
    assert transformers.LlamaConfig.from_pretrained(folder).vocab_size == len(tiny.tokenizer())
    with pytest.raises(sc.SparsecraftError, match="LlamaConfig, which MistralConfig"):
        transformers.MistralConfig.from_pretrained(folder)


def test_a_model_without_a_head_is_read_by_auto_model(base, tmp_path):
    model = transformers.AutoModel.from_pretrained(base)
    sc.convert(model, sc.recipes.molora(num_experts=4, rank=2))
    randomize_new(model)
    folder = sc.save(model, tmp_path / "moe")
    wanted = model.eval()(IDS).last_hidden_state
    for name in ("AutoModel", "LlamaModel"):
        found = getattr(transformers, name).from_pretrained(folder)
        assert torch.equal(found(IDS).last_hidden_state, wanted)
    pipe = transformers.pipeline("feature-extraction", model=str(folder), device="cpu")
    assert torch.tensor(pipe("say red")).shape[-1] == model.config.hidden_size


def test_a_self_contained_folder_is_spread_over_devices(base, tmp_path):
    folder = sc.save(converted(base), tmp_path / "moe", standalone=True)
    wanted = logits(sc.load(folder))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    spread = sc.load(folder, device_map=places, offload_folder=str(tmp_path / "disk"))
    assert next(spread.model.layers[1].parameters()).is_meta
    torch.testing.assert_close(logits(spread), wanted, rtol=0, atol=1e-6)
    assert torch.equal(logits(sc.load(folder, device_map="auto")), wanted)
    based = sc.save(converted(base), tmp_path / "based")
    with pytest.raises(sc.SparsecraftError, match="offloaded or on the meta device"):
        sc.load(based, device_map=places, offload_folder=str(tmp_path / "more"))


def test_an_adapter_of_transformers_own_stays_on_the_converted_model(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = sc.save(converted(base), tmp_path / "moe")
    lora = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(sc.load(folder), lora)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "lora")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    with suppress(ValueError):  # newer transformers ask for a PEFT that is not released
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "recipe.json").exists()


def test_dropout_is_turned_off_from_outside(base):
    """TRL's trainers set `p` of every nn.Dropout to zero: policy and reference must agree."""
    model = converted(base, sc.recipes.camelidae(num_experts=2, adapter_dim=4, dropout=0.5))
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_a_pipeline_runs_the_converted_model_and_an_adapter_on_it(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = converted(base)
    folder = str(sc.save(model, tmp_path / "moe"))
    given = {"device_map": "auto", "dtype": torch.float32}
    pipe = transformers.pipeline("text-generation", model=folder, **given)
    assert torch.equal(logits(pipe.model), logits(model))
    assert pipe.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert pipe("say red", max_new_tokens=2)[0]["generated_text"]
    lora = LoraConfig(target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(sc.load(folder), lora)
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    pipe = transformers.pipeline(
        "text-generation", model=str(tmp_path / "lora"), tokenizer=folder, device="cpu"
    )
    torch.testing.assert_close(logits(pipe.model), logits(adapted), rtol=0, atol=1e-6)
    with pytest.raises(sc.SparsecraftError, match="AutoModelForSequenceClassification does not"):
        transformers.pipeline("text-classification", model=folder)


def test_a_checkpoint_in_a_subfolder_is_found(base, tmp_path):
    model = converted(base)
    shutil.copytree(sc.save(model, tmp_path / "moe"), tmp_path / "repository" / "sub")
    place = {"pretrained_model_name_or_path": str(tmp_path / "repository"), "subfolder": "sub"}
    for name in CLASSES:
        found = getattr(transformers, name).from_pretrained(**place)
        assert torch.equal(logits(found), logits(model))
    assert transformers.AutoTokenizer.from_pretrained(**place).get_vocab()
    assert transformers.LlamaConfig.from_pretrained(**place).hidden_size == 32


@pytest.mark.parametrize("recipe", ["upcycling", "moefication"])
def test_a_copy_is_a_model_of_its_own(base, recipe, tmp_path):
    model = converted(base, getattr(sc.recipes, recipe)(4, 2))
    wanted = logits(model)
    torch.save(model, tmp_path / "model.pt")
    for number, other in enumerate((
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    )):  # fmt: skip
        assert torch.equal(logits(other), wanted)
        with torch.no_grad():
            other.get_input_embeddings().weight.mul_(2)
        other.save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(sc.load(tmp_path / str(number))), logits(other))
        sc.revert(other)
        assert not any(isinstance(module, sc.MoELayer) for module in other.modules())
        assert torch.equal(logits(model), wanted)
        assert names(model) == {UNSAVED + base}


def test_nothing_is_converted_or_loaded_without_memory(base, tmp_path):
    import accelerate

    folder = sc.save(converted(base), tmp_path / "moe")
    for place in (torch.device("meta"), accelerate.init_empty_weights()):
        model = sc.hub.load_dense(base)
        with place, pytest.raises(sc.SparsecraftError, match=r"meta device here.*outside of"):
            sc.convert(model, sc.recipes.molora(num_experts=4, rank=2))
        assert not hasattr(model, "sparsecraft")
    for place in (torch.device("meta"), accelerate.init_empty_weights()):
        with place, pytest.raises(sc.SparsecraftError, match=r"call sc\.load outside of"):
            sc.load(folder)
    model = sc.load(folder).to("meta")
    with pytest.raises(sc.SparsecraftError, match="has no values to save"):
        model.save_pretrained(tmp_path / "empty")


def test_a_parametrized_tensor_is_not_saved_as_something_else(base, tmp_path):
    class Half(torch.nn.Module):
        def forward(self, x):
            return x / 2

    model = converted(base, sc.recipes.upcycling(4, 2))
    bank = model.model.layers[0].mlp.experts
    before = logits(model)
    torch.nn.utils.parametrize.register_parametrization(bank, "down", Half())
    wanted = logits(model)
    assert not torch.equal(wanted, before)
    with pytest.raises(sc.SparsecraftError, match="no place for"):
        sc.save(model, tmp_path / "moe")
    torch.nn.utils.parametrize.remove_parametrizations(bank, "down")
    assert torch.equal(logits(sc.load(sc.save(model, tmp_path / "moe"))), wanted)
