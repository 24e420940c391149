"""Training: losses fall, the right things move, resume is exact, bad input writes nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.errors import CheckpointError, DataError, SparsecraftError
from sparsecraft.training.defaults import checked, fill
from sparsecraft.training.progress import ProgressBar
from tests import cases, tiny

FAST = {"steps": 12, "batch_size": 4, "micro_batch": 2, "max_length": 64, "learning_rate": 1e-2,
        "log_every": 3, "progress": False}  # fmt: skip


def recipe(**changes):
    return sc.recipes.camelidae(num_experts=4, adapter_dim=16, lora_rank=4, **changes)


def converted(**changes):
    model = tiny.llama()
    sc.convert(model, recipe(**changes))
    return model


@pytest.fixture
def rows(tmp_path) -> str:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_training_lowers_the_loss_moves_only_new_parameters_and_saves(tmp_path, rows, capsys):
    model = converted()
    before = parameters(model)
    tiny.tokenizer()  # building it writes empty lines
    capsys.readouterr()
    report = sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    log = model.sparsecraft.report["training"][0]["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert report.steps == 12 and report.counts["rows"] == 40
    for name, value in parameters(model).items():
        moved = not torch.equal(value, before[name])
        assert moved == (".experts." in name or ".router." in name), name
    assert not model.training
    assert "forward" not in model.__dict__
    assert capsys.readouterr().out == ""
    loaded = sc.load(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not list(tmp_path.glob("out.training"))
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt", ".pth")]


def test_routing_statistics_stand_beside_the_loss(tmp_path, rows):
    model = converted()
    sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    entry = report["training"][0]["log"][-2]
    for layer in range(2):
        name = f"model.layers.{layer}.mlp"
        assert 1 <= entry[f"max_load/{name}"] <= 4
        assert 0 <= entry[f"load_entropy/{name}"] <= 1
        assert 0 <= entry[f"router_entropy/{name}"] <= 1
    assert entry["switch_loss"] >= 0.9


def test_sampling_routers_are_told_the_trainers_step(rows):
    model = tiny.llama()
    sc.convert(model, sc.recipes.btx(4, routing="sample"))
    trainer = make_trainer(model, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    sampler = model.model.layers[1].mlp.router.select
    for step in (0, 7000):  # as after a resume, which restores the trainer's own count
        trainer.state.global_step = step
        trainer.compute_loss(model, dict(batch)).backward()
        assert sampler.step == step
    assert sampler.temperature == 0.5
    for layer in model.model.layers:
        assert layer.mlp.router.scorer.weight.grad.abs().sum() > 0


def test_the_auxiliary_loss_is_added_in_training_and_only_there(tmp_path, rows):
    gradients = {}
    for coefficient in (0.0, 1.0):
        model = converted(balance_coef=coefficient)
        cases.randomize_new(model)
        trainer = make_trainer(model, rows)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        with_auxiliary = trainer.compute_loss(model, dict(batch))
        with_auxiliary.backward()
        gradients[coefficient] = model.model.layers[0].mlp.router.scorer.weight.grad.clone()
        model.eval()
        evaluated = trainer.compute_loss(model, dict(batch))
        expected = sc.evaluate(model, [{"input_ids": batch["input_ids"], "labels": batch["labels"],
                                        "attention_mask": batch["attention_mask"]}])  # fmt: skip
        assert evaluated.item() == pytest.approx(expected["loss"]["data"]["loss"], abs=1e-5)
        difference = with_auxiliary.item() - evaluated.item()
        if coefficient:  # at least 1 for a perfectly balanced router
            assert 0.9 < difference < 2.5
        else:
            assert difference == pytest.approx(0, abs=1e-6)
    assert (gradients[0.0] - gradients[1.0]).abs().max() > 1e-6


def make_trainer(model, rows, **options):
    from sparsecraft.training import descend
    from sparsecraft.training.train import _dataset

    asked = checked({**FAST, "packing": False, **options})
    stage = model.sparsecraft.recipe.stages[0]
    # Dropout would make the training and the evaluation loss differ by more than the auxiliary.
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    settings = fill(model, stage, asked)
    run = descend.Run(model, tiny.tokenizer(), Path(rows).parent / "out")
    dataset, _ = _dataset(run, rows, settings)
    descend.prepare_parameters(model, stage)
    return descend.make_trainer(run, stage, settings, dataset, Path(rows).parent / "state")


def test_padding_does_not_enter_the_auxiliary_loss(rows):
    model = converted()
    cases.randomize_new(model)
    trainer = make_trainer(model, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    trainer.compute_loss(model, dict(batch))
    short = trainer.tally.pop(torch.clone)
    padded = {
        key: torch.nn.functional.pad(value, (0, 30), value=-100 if key == "labels" else 0)
        for key, value in batch.items()
    }
    trainer.compute_loss(model, padded)
    assert short and trainer.tally.pop(torch.clone) == pytest.approx(short, abs=1e-5)


def test_router_and_experts_have_their_own_learning_rates(rows):
    trainer = make_trainer(converted(), rows, router_learning_rate=5e-4)
    groups = trainer.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        expected = 5e-4 if ".router." in name else 1e-2 if ".experts." in name else None
        assert rates.get(id(parameter)) == expected, name


def test_every_training_has_its_own_entry_in_the_report(tmp_path, rows, monkeypatch):
    """Of several stages, of one training after another, and of one that failed and was resumed."""
    stage = recipe().stages[0]
    two = dataclasses.replace(recipe(), stages=(stage, dataclasses.replace(stage, name="second")))
    model = tiny.llama()
    sc.convert(model, two)
    options = {**FAST, "steps": 4, "tokenizer": tiny.tokenizer()}

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2 and "second" in args.output_dir:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ProgressBar, "on_step_end", interrupt)
        sc.train(model, rows, tmp_path / "one", **options)
    assert model.sparsecraft.report["training"] == []
    sc.train(model, rows, tmp_path / "one", resume=True, **options)
    loaded = sc.load(tmp_path / "one")
    sc.train(loaded, rows, tmp_path / "two", **{**options, "steps": 5, "stages": ("second",)})
    first, both = (
        json.loads((tmp_path / name / "report.json").read_text())["training"]
        for name in ("one", "two")
    )
    assert [entry["stage"] for entry in both] == ["train", "second", "second"]
    assert both[:2] == first and [entry["steps"] for entry in both] == [4, 4, 5]
    for entry in both:
        logged = [line for line in entry["log"] if "loss" in line]
        assert [line["step"] for line in logged][-1] == entry["steps"]
        total, before = 0.0, 0
        for line in logged:
            total += line["loss"] * (line["step"] - before)
            before = line["step"]
        assert entry["loss"] == pytest.approx(total / entry["steps"])
    assert len({entry["loss"] for entry in both}) == 3


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"num_labels": 1}, "num_labels=1"),
        ({"problem_type": "multi_label_classification"}, "multi"),
    ],
)
def test_classifiers_of_other_problems_are_refused(tmp_path, kind, said):
    config = transformers.BertConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, **({"num_labels": 3} | kind),
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    sc.convert(model, recipe(), certify=False)
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "say red", "label": 0}])
    with pytest.raises(SparsecraftError, match=said):
        sc.train(model, path, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)


def test_a_cosine_ends_where_its_stage_says(tmp_path, rows):
    rates = {}
    for share in (0.0, 0.1):
        model = tiny.llama()
        changes = {"stages.0.schedule": "cosine", "stages.0.ends_at": share}
        sc.convert(model, sc.override(recipe(), changes), certify=False)
        options = {**FAST, "steps": 20, "log_every": 1, "router_learning_rate": 1e-3}
        sc.train(model, rows, tmp_path / str(share), tokenizer=tiny.tokenizer(), **options)
        log = model.sparsecraft.report["training"][0]["log"]
        rates[share] = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert rates[0.0][-1] < 1.5e-4 and max(rates[0.1]) == pytest.approx(1e-2)
    assert rates[0.1][-1] == pytest.approx(1e-3, rel=0.15)


class Interrupted(Exception):
    pass


def interrupted(tmp_path, rows, monkeypatch, model=None, **options):
    """A run killed at step 8, with a state every 5 steps; its options."""

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise Interrupted

    options = {**FAST, "save_every": 5, **options}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ProgressBar, "on_step_end", interrupt)
        model = model or converted()
        sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **options)
    return options


@pytest.mark.parametrize("packing", [True, False])
def test_resume_continues_exactly(tmp_path, rows, monkeypatch, packing):
    options = interrupted(tmp_path, rows, monkeypatch, packing=packing)
    whole = converted()
    sc.train(whole, rows, tmp_path / "whole", tokenizer=tiny.tokenizer(), **options)
    assert not (tmp_path / "out").exists()
    states = tmp_path / "out.training" / "0-train" / "checkpoint-5"
    assert (states / "optimizer.pt").exists() and not (states / "training_args.bin").exists()

    with pytest.raises(SparsecraftError, match="interrupted run"):
        sc.train(converted(), rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **options)
    resumed = converted()
    sc.train(resumed, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), resume=True, **options)
    for name, value in parameters(resumed).items():
        assert torch.equal(value, whole.get_parameter(name)), name


def test_the_same_seed_gives_the_same_run(tmp_path, rows):
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        model = converted()
        out = tmp_path / str(number)
        sc.train(model, rows, out, tokenizer=tiny.tokenizer(), seed=seed, **{**FAST, "steps": 4})
        runs.append(parameters(model)["model.layers.0.mlp.experts.up"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_upcycling_trains_everything_and_reverts_to_the_base_folder(tmp_path, rows):
    base = tiny.save_dense(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    original = parameters(model)
    sc.convert(model, sc.recipes.upcycling(num_experts=4))
    sc.train(model, rows, tmp_path / "out", **FAST)
    assert not torch.equal(model.model.embed_tokens.weight, original["model.embed_tokens.weight"])
    bank = model.model.layers[0].mlp.experts.down
    assert not torch.equal(bank[0], bank[1])
    sc.revert(model)
    assert all(torch.equal(p, original[n]) for n, p in model.named_parameters())
    assert sc.load(tmp_path / "out").sparsecraft.recipe.name == "upcycling"


def test_bf16_models_train_float32_masters(tmp_path, rows):
    base = tiny.save_dense(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    sc.convert(model, recipe())
    sc.train(model, rows, tmp_path / "out", **{**FAST, "steps": 3})
    assert model.model.layers[0].mlp.experts.up.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    loaded = sc.load(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_t5_trains_with_decoder_tokens_masked_by_labels(tmp_path):
    model = cases.dense("t5")
    model.resize_token_embeddings(len(tiny.tokenizer()))
    sc.convert(model, recipe())
    path = tiny.write_rows(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"say {w}", "completion": w} for w in tiny.WORDS * 4],
    )
    sc.train(model, path, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    losses = [e["loss"] for e in model.sparsecraft.report["training"][0]["log"] if "loss" in e]
    assert losses[-1] < losses[0] - 0.15
    entry = model.sparsecraft.report["training"][0]["log"][0]
    assert "load_entropy/decoder.block.0.layer.2.DenseReluDense" in entry


@pytest.mark.parametrize("method", ["mov", "molora"])
def test_t5_trains_mixtures_at_every_attention(tmp_path, method):
    """Cross-attention's keys and values are the encoder's tokens; MoV's heads route apart."""
    model = cases.dense("t5_gated")
    model.resize_token_embeddings(len(tiny.tokenizer()))
    spec = getattr(sc.recipes, method)(4, variant="released")
    changes = {"stages.0.losses": {"switch": 0.01}, "stages.0.optimizer": "adamw"}
    sc.convert(model, sc.override(spec, changes))
    rows = [{"prompt": f"say {w}", "completion": w} for w in tiny.WORDS * 4]
    path = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    options = {**FAST, "learning_rate": 0.1 if method == "mov" else 1e-2, "log_every": 1}
    sc.train(model, path, tmp_path / "out", tokenizer=tiny.tokenizer(), **options)
    history = [e for e in model.sparsecraft.report["training"][0]["log"] if "loss" in e]
    assert history[-1]["loss"] < history[0]["loss"] - 0.3
    assert "load_entropy/decoder.block.1.layer.1.EncDecAttention.k" in history[0]
    loaded, ids = sc.load(tmp_path / "out"), torch.arange(3, 20)[None]
    model.eval()
    assert torch.equal(
        loaded(ids, decoder_input_ids=ids).logits, model(ids, decoder_input_ids=ids).logits
    )


def test_adafactor_steps_are_relative_to_the_size_of_a_parameter(tmp_path, rows, caplog):
    """The paper's 3e-4 moves ones by 3e-4 and a router of deviation 0.02 fifty times less."""
    base = tiny.save_dense(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    sc.convert(model, sc.recipes.mov(4, noise=0.01))
    assert model.sparsecraft.recipe.stages[0].optimizer == "adafactor"
    before = parameters(model)
    sc.train(model, rows, tmp_path / "out", **{**FAST, "steps": 1, "learning_rate": None})
    assert "use variant='tuned' of the recipe" in caplog.text
    moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
    vectors = [m for n, m in moved.items() if n.endswith("experts.vectors")]
    routers = [m for n, m in moved.items() if ".router." in n]
    assert 1e-4 < max(vectors) < 1e-3 * 2
    assert 1e-7 < max(routers) < 6e-5
    assert moved["model.embed_tokens.weight"] == 0


def test_a_classifier_trains_on_text_and_label(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    before = parameters(model)
    sc.convert(model, recipe())
    rows = [{"text": f"say {w}", "label": int(i < 5)} for i, w in enumerate(tiny.WORDS)] * 6
    path = tiny.write_rows(tmp_path / "labels.jsonl", rows)
    options = {**FAST, "steps": 160, "learning_rate": 3e-3}
    sc.train(model, path, tmp_path / "out", tokenizer=tiny.tokenizer(), **options)
    found = sc.evaluate(model, path, tokenizer=tiny.tokenizer())["loss"][path]
    assert found["accuracy"] > 0.9 and found["rows"] == 60
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])  # a new head
    assert torch.equal(model.bert.pooler.dense.weight, before["bert.pooler.dense.weight"])
    found = sc.evaluate(tmp_path / "out", path, tokenizer=tiny.tokenizer())["loss"][path]
    assert found["accuracy"] > 0.9


def test_training_leaves_the_configuration_alone(tmp_path, rows):
    model = converted()
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    out = tmp_path / "out"
    sc.train(model, rows, out, tokenizer=tiny.tokenizer(), **{**FAST, "steps": 2})
    assert model.config.to_dict() == config | {"_name_or_path": str(out)}
    assert model.generation_config.to_dict() == generation


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "holds no rows"), ('{"messages": [}\n', "line 1"), ('{"nothing": 1}\n', "line 1")],
)
def test_bad_data_is_one_sentence_and_writes_nothing(tmp_path, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        sc.train(converted(), path, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    assert said in str(caught.value) and "bad.jsonl" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_no_row_left_after_filtering(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a " * 200},
                          {"role": "assistant", "content": "b"}]}]  # fmt: skip
    path = tiny.write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(DataError, match="no training rows remain"):
        sc.train(converted(), path, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)


def test_refusals_come_before_training(tmp_path, rows):
    tokenizer = tiny.tokenizer()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for overwrite in (False, True):  # not ours: never overwritten
        with pytest.raises(CheckpointError):
            sc.train(
                converted(), rows, tmp_path / "taken", tokenizer=tokenizer, overwrite=overwrite
            )
    with pytest.raises(SparsecraftError, match="dense"):
        sc.train(tiny.llama(), rows, tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(SparsecraftError, match="Did you mean 'learning_rate'"):
        sc.train(converted(), rows, tmp_path / "out", tokenizer=tokenizer, learningrate=1)
    with pytest.raises(SparsecraftError, match="steps is 0"):
        sc.train(converted(), rows, tmp_path / "out", tokenizer=tokenizer, steps=0)
    with pytest.raises(SparsecraftError, match="nothing to resume"):
        sc.train(converted(), rows, tmp_path / "out", tokenizer=tokenizer, resume=True)
    with pytest.raises(DataError, match="tokenizer"):
        sc.train(converted(), rows, tmp_path / "out")
    encoder = cases.dense("bert")
    sc.convert(encoder, recipe())
    with pytest.raises(SparsecraftError, match="train has no objective for"):
        sc.train(encoder, rows, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_reentrant_checkpointing_is_refused(rows):
    model = converted()
    trainer = make_trainer(model, rows)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(SparsecraftError, match="use_reentrant=False"):
        trainer.compute_loss(model, dict(batch))


def test_activation_checkpointing_changes_nothing(tmp_path, rows):
    found = []
    for on in (False, True):
        model = converted(dropout=0.0)
        out = tmp_path / f"out{on}"
        options = {**FAST, "steps": 4, "activation_checkpointing": on}
        sc.train(model, rows, out, tokenizer=tiny.tokenizer(), **options)
        found.append(parameters(model)["model.layers.1.mlp.experts.up"])
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_a_run_is_resumed_with_its_own_arguments_only(tmp_path, rows, monkeypatch):
    options = interrupted(tmp_path, rows, monkeypatch)
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.chat_rows(30))
    again = {"tokenizer": tiny.tokenizer(), "resume": True}
    for changes in ({"learning_rate": 0.5}, {"seed": 1}, {"batch_size": 2}, {"steps": 20}):
        name = next(iter(changes))
        with pytest.raises(SparsecraftError, match=f"had {name}="):
            sc.train(converted(), rows, tmp_path / "out", **again, **{**options, **changes})
    with pytest.raises(SparsecraftError, match="another data"):
        sc.train(converted(), other, tmp_path / "out", **again, **options)
    with pytest.raises(SparsecraftError, match="another recipe"):
        sc.train(converted(balance_coef=0.5), rows, tmp_path / "out", **again, **options)
    other_base = tiny.llama()
    with torch.no_grad():
        other_base.model.norm.weight += 1
    sc.convert(other_base, recipe())
    with pytest.raises(SparsecraftError, match="another dense model"):
        sc.train(other_base, rows, tmp_path / "out", **again, **options)


def test_the_interrupted_model_itself_can_go_on(tmp_path, rows, monkeypatch):
    whole, model = converted(), converted()
    options = interrupted(tmp_path, rows, monkeypatch, model)
    sc.train(whole, rows, tmp_path / "whole", tokenizer=tiny.tokenizer(), **options)
    sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), resume=True, **options)
    assert torch.equal(model.model.layers[0].mlp.experts.up, whole.model.layers[0].mlp.experts.up)


def test_a_model_that_cannot_be_saved_is_not_trained(tmp_path, rows):
    model = converted()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    before = parameters(model)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    assert not list(tmp_path.glob("out*"))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_state_cut_short_is_passed_over(tmp_path, rows, monkeypatch):
    whole = converted()
    sc.train(
        whole, rows, tmp_path / "whole", tokenizer=tiny.tokenizer(), **{**FAST, "save_every": 5}
    )
    options = interrupted(tmp_path, rows, monkeypatch)
    states = tmp_path / "out.training" / "0-train"
    for number, missing in ((10, "trainer_state.json"), (11, "optimizer.pt")):
        shutil.copytree(states / "checkpoint-5", states / f"checkpoint-{number}")
        (states / f"checkpoint-{number}" / missing).unlink()
    model = converted()
    sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), resume=True, **options)
    assert torch.equal(model.model.layers[0].mlp.experts.up, whole.model.layers[0].mlp.experts.up)


def test_a_run_whose_save_failed_is_resumed_from_its_end(tmp_path, rows, monkeypatch):
    whole = converted()
    sc.train(whole, rows, tmp_path / "whole", tokenizer=tiny.tokenizer(), **FAST)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr("sparsecraft.checkpoint.save.write_companions", no_space)
        sc.train(converted(), rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **FAST)
    model = converted()
    report = sc.train(
        model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), resume=True, **FAST
    )
    assert report.steps == 12 and report.loss > 1
    for name, value in parameters(model).items():
        assert torch.equal(value, whole.get_parameter(name)), name


def no_space(*args, **kwargs):
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    ("batch", "micro", "expected"), [(6, 4, (3, 2)), (7, 4, (1, 7)), (8, 8, (8, 1))]
)
def test_the_batch_is_the_one_asked_for(rows, batch, micro, expected):
    trainer = make_trainer(converted(), rows, batch_size=batch, micro_batch=micro)
    found = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    assert found == expected


def test_odd_options_are_refused(tmp_path, rows):
    odd = [("learning_rate", -1), ("learning_rate", float("nan")), ("steps", 2.5), ("epochs", 0)]
    for name, value in [*odd, ("seed", -1), ("log_every", 0), ("max_length", 4096)]:
        with pytest.raises(SparsecraftError, match=name):
            sc.train(
                converted(), rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **{name: value}
            )
    assert not list(tmp_path.glob("out*"))


def test_two_processes_train_as_one(tmp_path, rows):
    base = tiny.save_dense(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    sc.convert(model, recipe(dropout=0.0))
    sc.save(model, tmp_path / "camelid")
    options = ["--steps", "3", "--batch-size", "4", "--micro-batch", "2", "--max-length", "64",
               "--learning-rate", "1e-2", "--no-packing", "--no-progress"]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
              "--master-port", "29611", "-m", "sparsecraft"]  # fmt: skip
    command = ["train", str(tmp_path / "camelid"), "--data", rows, *options]
    two = [*launch, *command, "--out", str(tmp_path / "two")]
    done = subprocess.run(two, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Saved and read back") == 1
    from sparsecraft.cli.main import main

    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    one, other = sc.load(tmp_path / "one"), sc.load(tmp_path / "two")
    for name, value in parameters(one).items():
        assert torch.allclose(value, other.get_parameter(name), atol=2e-4), name
    up = "model.layers.0.mlp.experts.up"
    assert (parameters(one)[up] - parameters(model)[up]).abs().max() > 1e-3
