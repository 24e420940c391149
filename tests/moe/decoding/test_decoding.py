"""Steps against a static cache give the tokens of transformers' own loop, whatever a call asks for,
and know when they would not. On a CPU nothing is captured: the same steps run in Python.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import threading
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import sparsecraft as sc
from sparsecraft.kernels import attend, device, projections
from sparsecraft.moe.decoding import graphs as graphs_of_steps
from sparsecraft.moe.decoding import loop, step
from sparsecraft.moe.decoding.graphs import share_keys, share_launches
from sparsecraft.moe.decoding.loop import STEPS, decode
from sparsecraft.surgery.budget import set_budget
from tests import tiny
from tests.cases import FAMILIES, RECIPES, RUNNING, dense, randomize_new

MANY = [*RECIPES, *(n for n in RUNNING if n.endswith("_sparse"))]
CAUSAL = [name for name, f in FAMILIES.items() if f.auto == "AutoModelForCausalLM" and f.decodes]
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(loop, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(loop, "COMPILED", 10**6)
    monkeypatch.setattr(step, "FIRST_LENGTH", 32)


def converted(family: str = "llama", recipe: str = "camelidae") -> torch.nn.Module:
    model = dense(family)
    sc.convert(model, (RECIPES | RUNNING)[recipe].make(), certify=False)
    randomize_new(model)
    if recipe in RUNNING:
        RUNNING[recipe].ready(model)
    return model.eval()


def prompts(batch: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 90, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : length // 2] = 0
        ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask}


def both(model, **call) -> tuple:
    """What transformers' own loop gives, and ours."""
    call = GREEDY | call
    torch.manual_seed(0)
    wanted = type(model).generate(model, **call)
    torch.manual_seed(0)
    return wanted, model.generate(**call)


def alike(model, **call) -> bool:
    return torch.equal(*both(model, **call))


def steps(model) -> list:
    return list(STEPS[model].found.values())


# ------------------------------------------------------------------ tokens
@pytest.mark.parametrize("recipe", MANY)
def test_every_recipe_generates_the_same(recipe):
    model = converted(recipe=recipe)
    for batch, padded in ((1, False), (3, False), (3, True)):
        assert alike(model, **prompts(batch, 7, padded), max_new_tokens=9)
    assert steps(model)


@pytest.mark.parametrize("recipe", ["camelidae", "upcycling", "gmoefication"])
@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_generates_the_same(family, recipe):
    model = converted(family, recipe)
    for batch, padded in ((2, False), (2, True)):
        assert alike(model, **prompts(batch, 6, padded), max_new_tokens=8)


@pytest.mark.parametrize("padded", [False, True])
def test_lengths_beyond_the_first_cache(padded):
    model = converted()
    for length, new in ((5, 4), (20, 20), (5, 50), (40, 20), (3, 3)):
        assert alike(model, **prompts(2, length, padded), max_new_tokens=new)
    sizes = {made.cache.layers[0].max_cache_len for made in steps(model)}
    assert sizes == {32, 128}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["Gemma3TextConfig", "GptOssConfig", "MistralConfig"])
def test_windows_are_kept_beyond_their_width(kind, padded):
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if kind != "MistralConfig":
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    sc.convert(model, sc.recipes.molora(2), certify=False)
    for length in (5, 12):
        assert alike(model.eval(), **prompts(2, length, padded), max_new_tokens=20)
    assert steps(model)


# ------------------------------------------------------------------ what a call may ask for
CALLS = {
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "top p": {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.3},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "least length": {"min_new_tokens": 6, "eos_token_id": [5, 7, 11, 13]},
    "several ends": {"eos_token_id": list(range(3, 40))},
    "answers": {"do_sample": True, "num_return_sequences": 3},
    "words": {"suppress_tokens": [3, 4, 5], "forced_eos_token_id": 2},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "static": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_call_gives_what_transformers_gives(call, batch):
    if call == "lookup" and batch > 1:
        pytest.skip("transformers takes one prompt there")
    wanted, found = both(
        converted(), **prompts(batch, 7, batch > 1), max_new_tokens=12, **CALLS[call]
    )
    if call == "dictionary":
        assert all(torch.equal(a, b) for a, b in zip(wanted.scores, found.scores, strict=True))
        wanted, found = wanted.sequences, found.sequences
    assert torch.equal(wanted, found)


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_strings_that_end_an_answer():
    tokenizer = tiny.tokenizer()
    model = tiny.llama()
    sc.convert(model, RECIPES["camelidae"].make(), certify=False)
    call = {"stop_strings": ["red", "a", "e"], "tokenizer": tokenizer, "max_new_tokens": 20}
    assert alike(model.eval(), **prompts(2, 6, False), **call)


@pytest.mark.parametrize("ends", [[], list(range(3, 40))])
def test_a_streamer_hears_every_token_once(ends):
    model, heard = converted(), (Heard(), Heard())
    call = GREEDY | prompts(1, 6, False) | {"max_new_tokens": 12, "eos_token_id": ends or None}
    wanted = type(model).generate(model, **call, streamer=heard[0])
    found = model.generate(**call, streamer=heard[1])
    assert torch.equal(wanted, found) and steps(model)
    assert heard[0].tokens == heard[1].tokens == found.flatten().tolist()
    assert heard[1].ended == 1


class Counts(LogitsProcessor, StoppingCriteria):
    """A user's processor and criterion, with a state of its own."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        if scores is not None:  # as a processor
            return scores.roll(1, -1)
        return input_ids[:, -1] < 40


def test_code_of_users_sees_no_token_behind_the_end():
    model, seen = converted(), []
    for generate in (lambda **c: type(model).generate(model, **c), model.generate):
        counts = Counts()
        found = generate(
            **GREEDY, **prompts(2, 6, False), max_new_tokens=12, eos_token_id=2,
            logits_processor=[counts], stopping_criteria=[counts],
        )  # fmt: skip
        seen.append((found.tolist(), counts.lengths))
    assert seen[0] == seen[1] and steps(model)


def test_a_generator_draws_the_same_by_both_loops(monkeypatch):
    model, found = converted(), []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(loop, "DEVICES", devices)
        draws = torch.Generator().manual_seed(4)
        found.append(
            model.generate(
                **prompts(2, 6, False), do_sample=True, max_new_tokens=12, pad_token_id=0,
                custom_generate=lambda *a, draws=draws, **k: decode(*a, generator=draws, **k),
            )
        )  # fmt: skip
    assert torch.equal(*found)


# ------------------------------------------------------------------ what changes between calls
def test_steps_are_kept_and_made_anew_where_the_model_changes():
    model, call = converted(), {**prompts(2, 6, False), "max_new_tokens": 8}

    def made():
        assert alike(model, **call)
        return steps(model)[-1]

    first = made()
    assert made() is first
    with torch.no_grad():  # other values in the same memory
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert made() is first
    model.load_state_dict({k: v.clone() * 1.1 for k, v in model.state_dict().items()})
    assert made() is first
    model.lm_head.weight.data = model.lm_head.weight.data.clone().flip(0)  # other memory
    second = made()
    assert second is not first
    model.double()
    third = made()
    assert third is not second
    model.model.layers[0].mlp.forward = model.model.layers[1].mlp.forward
    assert made() is not third


def test_adapters_of_peft_that_change_make_another_step():
    """A captured graph knows no switch of PEFT's (stale LoRAs: peft #2611, forge #795)."""
    peft = pytest.importorskip("peft")
    model, made, texts = converted(recipe="upcycling"), [], []

    def look():
        wanted, found = both(model, **prompts(1, 6, False), max_new_tokens=8)
        assert torch.equal(wanted, found)
        made.append(steps(model)[-1])
        texts.append(found.tolist())

    look()
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    for name in ("one", "two"):
        peft.inject_adapter_in_model(peft.LoraConfig(**options), model, name)
    model.eval()
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for name in ("one", "two", "one"):
        for layer in layers:
            layer.set_adapter(name)
        look()
    for layer in layers:
        layer.scaling["one"] = 30.0
    look()
    for layer in layers:
        layer.enable_adapters(False)
    look()
    assert len({id(step) for step in made}) == len(made)
    assert texts[0] == texts[-1] and texts[1] == texts[3] != texts[2]


@pytest.mark.parametrize("recipe", [n for n in RUNNING if n.endswith("_sparse")])
def test_budgets_change_what_runs(recipe):
    model = converted(recipe=recipe)
    assert alike(model, **prompts(2, 6, False), max_new_tokens=8)
    for share in (1.0, None, 1.0):
        set_budget(model, share)
        assert alike(model, **prompts(2, 6, False), max_new_tokens=8)
    assert steps(model)


def test_another_budget_is_another_step():
    model, made = converted(recipe="gmoefication_sparse"), []
    for share in (0.25, 0.75, 0.75, 1.0):
        set_budget(model, share)
        assert alike(model, **prompts(2, 6, False), max_new_tokens=8)
        made.append(steps(model)[-1])
    assert made[1] is made[2] and len({id(m) for m in made}) == 3


def test_forms_for_inference_generate_the_same():
    for recipe in ("camelidae", "molora", "mov"):
        model = converted(recipe=recipe)
        before = model.generate(**GREEDY, **prompts(2, 6, False), max_new_tokens=8)
        sc.fast(model)
        wanted, found = both(model, **prompts(2, 6, False), max_new_tokens=8)
        assert torch.equal(wanted, found) and torch.equal(before, found)


def test_two_caches_of_a_model_are_kept():
    model = converted()
    for batch in (1, 2, 3, 1):
        model.generate(**GREEDY, **prompts(batch, 6, False), max_new_tokens=4)
    assert len(STEPS[model].found) == loop.KEPT


# ------------------------------------------------------------------ where transformers' loop runs
def test_what_is_left_to_transformers(caplog):
    caplog.set_level(logging.DEBUG, "sparsecraft")

    def reason(model, **call):
        caplog.clear()
        assert alike(model, **(prompts(2, 6, False) | {"max_new_tokens": 6} | call))
        return caplog.text

    model = converted()
    assert "cache is off" in reason(model, use_cache=False)
    assert "is training" in reason(model.train())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in reason(model)
    with sc.trace(model) as traced:
        assert "trace" in reason(model)
        assert traced
    assert "reads more than tokens" in reason(
        model, inputs_embeds=model.get_input_embeddings()(prompts(2, 6, False)["input_ids"])
    )
    assert "reads more than tokens" not in reason(model) and steps(model)
    STEPS[model].lock.acquire()
    assert "in use" in reason(model)


def test_hooks_and_other_codes_are_called():
    model, called = converted(), []
    assert alike(model, **prompts(1, 6, False), max_new_tokens=6)
    handle = model.model.layers[0].register_forward_hook(lambda *_: called.append(1))
    model.generate(**GREEDY, **prompts(1, 6, False), max_new_tokens=6)
    assert len(called) == 6
    handle.remove()
    own = model.prepare_inputs_for_generation

    @functools.wraps(own)
    def prepares(*args, **kwargs):
        called.append(2)
        return own(*args, **kwargs)

    model.prepare_inputs_for_generation = prepares
    model.generate(**GREEDY, **prompts(1, 6, False), max_new_tokens=6)
    assert called.count(2) == 6


def test_settings_by_position_and_those_of_the_model():
    model, ids = converted(), prompts(2, 6, False)["input_ids"]
    model.generation_config.num_beams = 3
    given = transformers.GenerationConfig(max_new_tokens=6, pad_token_id=0, do_sample=False)
    assert torch.equal(type(model).generate(model, ids, given), model.generate(ids, given))
    model.generation_config.num_beams = None
    heard = Heard(), Heard()
    between = (given, None, None, None, None, None)
    wanted = type(model).generate(model, ids[:1], *between, heard[0])
    assert torch.equal(wanted, model.generate(ids[:1], *between, heard[1]))
    assert heard[0].tokens == heard[1].tokens and heard[1].ended == 1


def test_allowed_tokens_are_asked_for_no_step_behind_the_end():
    model, asked = converted(), []

    def allowed(row, ids):
        asked.append(len(ids))
        return [2] if len(ids) == 8 else [5, 6]

    call = prompts(1, 6, False) | {"max_new_tokens": 20, "eos_token_id": 2}
    found = model.generate(**GREEDY, **call, prefix_allowed_tokens_fn=allowed)
    assert found.shape[1] == 9 and asked == [6, 7, 8] and found.is_contiguous()


def test_a_step_that_cannot_be_made_is_not_tried_twice(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "sparsecraft")
    model, tried = converted(), []

    def fails(*args):
        tried.append(args)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(loop, "Step", fails)
    for _ in range(2):
        assert alike(model, **prompts(2, 6, False), max_new_tokens=6)
    assert len(tried) == 1 and "no room" in caplog.text
    model.config.use_cache = not model.config.use_cache  # it may be possible now
    assert alike(model, **prompts(2, 6, False), max_new_tokens=6) and len(tried) == 2


def test_encoders_and_what_is_no_generator_are_as_they_were():
    model = converted("t5", "camelidae")
    assert alike(model, **prompts(2, 6, False), max_new_tokens=6)
    assert "generate" not in vars(converted("bert", "camelidae"))


def test_a_generate_of_the_users_own_stays():
    model = dense("llama")
    model.generate = lambda *args, **kwargs: "mine"
    sc.convert(model, RECIPES["camelidae"].make(), certify=False)
    assert model.generate() == "mine"
    sc.revert(model)
    assert model.generate() == "mine"


def test_revert_and_copies():
    model = converted()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    for each in (model, other):
        assert alike(each, **prompts(2, 6, False), max_new_tokens=6)
    assert STEPS[model] is not STEPS[other]
    assert model.generate.args[0] is model and other.generate.args[0] is other
    sc.revert(model)
    assert "generate" not in vars(model)


def test_threads_share_a_model():
    model, found = converted(), {}
    call = GREEDY | prompts(2, 6, False) | {"max_new_tokens": 8}
    wanted = type(model).generate(model, **call)

    def ask(number):
        found[number] = [model.generate(**call) for _ in range(5)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(wanted, ids) for answers in found.values() for ids in answers)


# ------------------------------------------------------------------ compiled whole
@pytest.fixture
def graphs(monkeypatch) -> list[str]:
    """The code of every whole graph that is compiled; all steps are."""
    found, real = [], torch.compile
    torch._dynamo.reset()  # every step is the same function, compiled for one more model

    def backend(graph, inputs):
        share_keys(graph)
        share_launches(graph)
        found.append(graph.code)
        return graph.forward

    def counted(function, **options):
        assert options.pop("fullgraph") and options.pop("backend")
        return real(function, fullgraph=True, backend=backend, **options)

    monkeypatch.setattr(loop, "COMPILED", 1)
    monkeypatch.setattr(torch, "compile", counted)
    return found


@pytest.mark.parametrize("recipe", ["camelidae", "molora", "mov", "upcycling", "gmoefication"])
def test_one_graph_and_few_compilations(recipe, graphs):
    model = converted(recipe=recipe)
    for length, new in ((5, 4), (9, 20), (3, 10), (20, 30), (11, 40), (5, 4), (7, 7)):
        assert alike(model, **prompts(1, length, False), max_new_tokens=new)
    assert all(made.compiled for made in steps(model))
    assert 1 <= len(graphs) <= 3


@pytest.fixture
def handful(monkeypatch):
    """Operators for a handful of tokens, which are for a GPU, stand in steps for a CPU too."""
    for module in (graphs_of_steps, projections):
        monkeypatch.setattr(module, "is_handful", lambda x, *others: 0 < len(x) <= 16)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("recipe", ["camel", "molora", "mov", "upcycling", "bam"])
def test_with_shared_launches_tokens_are_the_same(family, recipe, graphs, handful):
    if family not in RECIPES[recipe].families:
        pytest.skip(f"{recipe} is not for {family}")
    model = converted(family, recipe)
    for batch in (1, 3):
        assert alike(model, **prompts(batch, 6, False), max_new_tokens=6)
    assert all(made.compiled for made in steps(model))


def test_loras_of_peft_are_compiled_too(graphs, handful):
    model = converted(recipe="mov")
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    inject_adapter_in_model(config, model)
    for batch in (1, 3):
        assert alike(model.eval(), **prompts(batch, 6, False), max_new_tokens=6)
    assert all(made.compiled for made in steps(model)) and "sparsecraft.products" in graphs[0]


@pytest.mark.parametrize(("recipe", "shared"), [("camel", 8), ("molora", 8), ("upcycling", 3)])
def test_products_of_one_input_share_a_launch(recipe, shared, graphs, handful):
    """q, k and v; o; gate and up, or a router; down; and the head. What LoRAs read comes before."""
    model = converted(recipe=recipe)
    layers = model.config.num_hidden_layers
    for batch in (1, 3):
        assert alike(model, **prompts(batch, 6, False), max_new_tokens=6)
    alone, several = graphs
    assert alone.count("sparsecraft.products") == shared * layers + 1
    assert "linear(" not in alone
    assert several.count("sparsecraft.products") == (0 if recipe == "upcycling" else 4) * layers


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("recipe", ["camel", "molora", "mov", "gmoefication"])
def test_half_precision_takes_tiles_and_own_attention(family, recipe, graphs, handful, monkeypatch):
    """Logits of the step are those of the layers, to the rounding of half precision."""
    if family not in RECIPES[recipe].families:
        pytest.skip(f"{recipe} is not for {family}")
    monkeypatch.setattr(attend, "runs", lambda x: True)
    model = converted(family, recipe).to(torch.float16)
    layers = model.config.num_hidden_layers
    for batch, padded in ((1, False), (3, False), (3, True)):
        call = GREEDY | prompts(batch, 6, padded)
        model.generate(**call, max_new_tokens=2)
        (made,) = [step for step in steps(model) if len(step.token_B1) == batch][-1:]
        assert made.compiled
        ids = model.generate(**call, max_new_tokens=1)
        mask = torch.cat([call["attention_mask"], torch.ones_like(ids[:, :1])], 1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        wanted_BV = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1].float()
        worst = (made.logits_BV - wanted_BV).abs().max() / wanted_BV.abs().max().clamp_min(1)
        assert worst < 2e-2
    for code in graphs:
        assert code.count("sparsecraft.attend") == layers and "scaled_dot" not in code
        assert "linear(" not in code or recipe == "gmoefication"


def test_a_model_with_steps_is_freed():
    model = converted()
    model.generate(**GREEDY, **prompts(1, 6, False), max_new_tokens=4)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_split_networks_are_operators_of_their_own_model(graphs):
    model = converted(recipe="gmoefication_sparse")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    for each in (model, other, model, copy.deepcopy(other)):
        assert alike(each, **prompts(1, 6, False), max_new_tokens=8)
        assert all(made.compiled for made in steps(each))
    assert all(code.count("torch.ops.sparsecraft.layer") == 2 for code in graphs)
    assert not device.STEP
