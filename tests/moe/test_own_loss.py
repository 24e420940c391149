"""A converted model's own loss holds the recipe's auxiliary losses, in whatever trains it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.traces import records_of
from tests import tiny
from tests.training import cut
from tests.training.test_cut import gradients, trainer_of

TASKS = ("causal", "seq2seq", "classification")
COEFFICIENT = 0.7


def converted(task: str = "causal"):
    model = cut.converted(task, balance="switch", balance_coef=COEFFICIENT)
    return model.train()


def batch_of(tmp_path, model, task: str, rows: int = 4) -> dict:
    path = tmp_path / "rows.jsonl"
    tiny.write_rows(path, cut.rows(task))
    batch = next(iter(trainer_of(model, path, micro=rows).get_train_dataloader()))
    vars(model).pop("forward", None)  # SFTTrainer's
    del batch["token_mask"]
    return model.train() and batch


def plain(rows: int = 2) -> dict:
    ids = torch.arange(3, 3 + 9 * rows).reshape(rows, 9)
    return {"input_ids": ids, "labels": ids}


def assert_equal(found: dict, wanted: dict, atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=atol), name


@pytest.mark.parametrize("task", TASKS)
def test_a_plain_loop_gets_the_gradients_of_train(tmp_path, task):
    model = converted(task)
    path = tmp_path / "rows.jsonl"
    tiny.write_rows(path, cut.rows(task))
    trainer = trainer_of(model, path, micro=4)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    trainer.compute_loss(model, dict(batch)).backward()
    wanted = gradients(model)
    vars(model).pop("forward", None)
    del batch["token_mask"]
    loss = model(**batch).loss
    loss.backward()
    assert_equal(gradients(model), wanted)
    with model.sparsecraft.own_loss.off():
        task_alone = model(**batch).loss
        assert sc.losses.latest(model) == 0  # nothing is in force
    model(**batch)
    added = sc.losses.latest(model)
    assert 0.9 * COEFFICIENT < added < 2 * COEFFICIENT
    assert loss.item() == pytest.approx(task_alone.item() + added.item(), rel=1e-5)
    model.eval()
    assert model(**batch).loss.item() == pytest.approx(task_alone.item(), rel=1e-5)
    with torch.no_grad():
        assert model.train()(**batch).loss.item() == pytest.approx(task_alone.item(), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_with_a_number_of_items_sum_to_the_whole(tmp_path, task):
    """Also where the model's head ignores `num_items_in_batch`, as T5's and BERT's do."""
    model = converted(task)
    batch = batch_of(tmp_path, model, task)
    model.sparsecraft.own_loss.losses = {}  # the balance of unequal parts is not that of the whole
    model(**batch).loss.backward()
    whole = gradients(model)
    items = int((batch["labels"][:, 1:] if task == "causal" else batch["labels"]).ne(-100).sum())
    for row in range(4):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        model(**part, num_items_in_batch=items).loss.backward()
    assert_equal(gradients(model), whole)
    model.sparsecraft.own_loss.losses = None
    same = {key: value[:1].repeat(4, *[1] * (value.ndim - 1)) for key, value in batch.items()}
    model(**same).loss.backward()
    whole = gradients(model)
    part = {key: value[:1] for key, value in batch.items()}
    labels = part["labels"][:, 1:] if task == "causal" else part["labels"]
    items = 4 * labels.ne(-100).sum()
    for _ in range(4):
        model(**part, num_items_in_batch=items).loss.backward()
        quarter = sc.losses.latest(model, items).item()
        assert quarter == pytest.approx(sc.losses.latest(model).item() / 4)
    assert_equal(gradients(model), whole, atol=2e-6)


def test_transformers_own_trainer_accumulates_a_t5_rightly(tmp_path):
    rows = cut.rows("seq2seq")[:1] * 4
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    logs = []
    for micro in (4, 1):
        model = converted("seq2seq")
        like = trainer_of(model, tmp_path / "rows.jsonl", micro=4)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=micro, max_steps=2,
            gradient_accumulation_steps=4 // micro, logging_steps=1, report_to="none",
            use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=like.train_dataset,
            data_collator=transformers.DataCollatorForSeq2Seq(tiny.tokenizer()),
        )  # fmt: skip
        trainer.train()
        logs.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        logs.append([e["grad_norm"] for e in trainer.state.log_history if "loss" in e])
    assert path and logs[2] == pytest.approx(logs[0], rel=1e-4)
    assert logs[3] == pytest.approx(logs[1], rel=1e-3)


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_token_classifiers_do_not_depend_on_the_cut(family):
    """sc.train has no objective for them, and a trainer of the user's gives the number of items."""
    sizes = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"intermediate_size": 48, "num_attention_heads": 4, "num_labels": 3}
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    config = getattr(transformers, f"{family}Config")(**sizes, **dict.fromkeys(rates, 0.0))
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForTokenClassification")(config).eval()
    sc.convert(model, sc.recipes.camelidae(num_experts=4, adapter_dim=8, dropout=0.0))
    model.train().sparsecraft.own_loss.losses = {}
    ids, labels = torch.arange(3, 27).reshape(4, 6), torch.arange(24).reshape(4, 6) % 3
    labels[0, 1:] = labels[1, 3:] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    whole = gradients(model)
    for size in (2, 1):
        for rows, classes in zip(ids.split(size), labels.split(size), strict=True):
            items = labels.ne(-100).sum()
            model(input_ids=rows, labels=classes, num_items_in_batch=items).loss.backward()
        assert_equal(gradients(model), whole)
    with pytest.raises(SparsecraftError, match=r"train has no objective for .*TokenClassification"):
        sc.train(model, "rows.jsonl", "out", tokenizer=tiny.tokenizer())


SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48}  # fmt: skip
LOSSES = {  # a class, its configuration
    "llama": ("LlamaForCausalLM", SMALL),
    "gpt2, which shifts and does not say so": (
        "GPT2LMHeadModel",
        {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    ),
    "bert, which does not shift": (
        "BertForMaskedLM",
        SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "ctc, which is no mean": (
        "Wav2Vec2ForCTC",
        SMALL | {"conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,)}
        | {"num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4}
        | {"num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
        | dict.fromkeys(
            ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout",
             "final_dropout", "layerdrop"), 0.0,
        ),
    ),
}  # fmt: skip


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    fill = {"input_ids": 0, "labels": -100, "input_values": 0.0}
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad([row[name] for row in rows], True, fill[name]) for name in rows[0]}


@pytest.mark.parametrize("name", LOSSES)
def test_transformers_own_trainer_gets_the_dense_loss_however_it_cuts(tmp_path, name):
    head, sizes = LOSSES[name]
    config = getattr(transformers, head).config_class(**sizes)
    generator, rows = torch.Generator().manual_seed(0), []
    for length in (2, 9, 5, 7):
        ids = torch.randint(3, 30, (length,), generator=generator)
        sound = {"input_values": torch.randn(400, generator=generator)}
        rows.append((sound if "CTC" in head else {"input_ids": ids}) | {"labels": ids})

    def first_step(parts: int, convert: bool = True) -> tuple[float, float]:
        torch.manual_seed(0)
        model = getattr(transformers, head)(config)
        if convert:
            recipe = sc.recipes.molora(num_experts=2, variant="tuned")  # without a loss of its own
            sc.convert(model, recipe, certify=False)
            model.requires_grad_(True)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4 // parts, use_cpu=True,
            gradient_accumulation_steps=parts, max_steps=1, learning_rate=1e-9, optim="sgd",
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, padded, rows)
        trainer.train()
        log = trainer.state.log_history[0]
        return log["loss"], log["grad_norm"]

    loss, norm = first_step(1, convert=False)
    for parts in (1, 2, 4):
        found = first_step(parts)
        assert found[0] == pytest.approx(loss, rel=1e-4)
        assert found[1] == pytest.approx(norm, rel=1e-2)  # the experts' own are few


def warned(caplog) -> int:
    return sum("auxiliary losses" in r.message for r in caplog.records if r.name == "sparsecraft")


@pytest.mark.parametrize("loss_of", ["logits", "trunk", "logits beside labels", "fused head"])
def test_a_loss_that_is_not_the_models_own_is_warned_of_once(caplog, loss_of):
    model, batch = converted(), plain()
    if loss_of == "fused head":  # what TRL's trainers compute their losses from
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
    for _ in range(2):
        if loss_of == "logits":
            model(batch["input_ids"]).logits.square().mean().backward()
        elif loss_of == "trunk":
            model.model(batch["input_ids"]).last_hidden_state.square().mean().backward()
        elif loss_of == "fused head":
            model(**batch, fused_lm_head=True).log_probs.sum().backward()
        else:
            model(**batch).logits.square().mean().backward()
        assert warned(caplog) == 1


def test_nothing_is_said_where_the_loss_holds_them(caplog):
    model, batch = converted(), plain()
    model(**batch).loss.backward()
    (model(batch["input_ids"]).logits.square().mean() + sc.losses.latest(model)).backward()
    with torch.no_grad():
        model(batch["input_ids"])
    model.eval().zero_grad()
    x = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    torch.autograd.grad(model(inputs_embeds=x).logits.mean(), x)  # of a look at the model
    model.train().sparsecraft.own_loss.losses = {}
    model(batch["input_ids"]).logits.mean().backward()
    assert warned(caplog) == 0


@pytest.mark.parametrize("how", ["loaded", "converted", "trunk"])
def test_a_training_in_evaluation_mode_is_warned_of_once(caplog, tmp_path, how):
    """So are models loaded and converted; neither a plain loop nor Lightning changes the mode."""
    model, batch = converted(), plain()
    if how == "loaded":
        sc.save(model, tmp_path / "out")
        model = sc.load(tmp_path / "out")
    model.eval()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        if how == "trunk":
            model.model(batch["input_ids"]).last_hidden_state.square().mean().backward()
        else:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    said = [r.message for r in caplog.records if "Call model.train() first" in r.message]
    assert len(said) == 1


def test_a_training_in_evaluation_mode_without_losses_goes_without_a_word(caplog):
    model, batch = converted(), plain()
    model.eval().sparsecraft.own_loss.losses = {}
    model(**batch).loss.backward()
    assert "model.train()" not in caplog.text


def test_a_loss_of_ones_own_takes_the_latest_pass():
    model, batch = converted(), plain()
    with pytest.raises(SparsecraftError, match=r"Call model.train\(\) and the model first"):
        sc.losses.latest(model)
    with sc.trace(model) as routing:
        model(batch["input_ids"])
    latest = sc.losses.latest(torch.nn.Sequential(model))  # a wrapper, such as DDP
    wanted = COEFFICIENT * torch.stack([sc.losses.switch_balance(r) for r in routing.values()])
    assert latest.item() == pytest.approx(wanted.mean().item())
    with pytest.raises(SparsecraftError, match="had no labels"):
        sc.losses.latest(model, num_items_in_batch=7)
    with pytest.raises(SparsecraftError, match="is dense"):
        sc.losses.latest(tiny.llama())


def test_it_survives_copies_pickles_checkpointing_and_folders(tmp_path):
    model, batch = converted(), plain()
    model(**batch).loss.backward()
    wanted = gradients(model)
    copied = copy.deepcopy(model)
    copied(**batch).loss.backward()
    assert_equal(gradients(copied), wanted)
    assert copied.sparsecraft.own_loss is not model.sparsecraft.own_loss
    torch.save(model, io.BytesIO())
    sc.save(model, tmp_path / "out")
    loaded = sc.load(tmp_path / "out").train()
    loaded(**batch).loss.backward()
    found = {n: p.grad for n, p in loaded.named_parameters() if n in wanted}
    assert_equal(found, wanted)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, use_cache=False).loss.backward()
    assert_equal(gradients(model), wanted)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SparsecraftError, match="use_reentrant=False"):
        model(**batch, use_cache=False)
    model.generate(batch["input_ids"], max_new_tokens=2)
    sc.revert(model)
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.slow
def test_it_survives_compilation():
    model, batch = converted(), plain()
    model(**batch).loss.backward()
    wanted = gradients(model)
    try:
        compiled = torch.compile(model, backend="aot_eager")
        compiled(**batch, use_cache=False).loss.backward()
        assert_equal(gradients(model), wanted)
        with torch.no_grad():  # evaluation stays one graph
            whole = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
            found = whole(batch["input_ids"], use_cache=False).logits
        assert torch.equal(found, model(batch["input_ids"]).logits)
    finally:
        torch.compiler.reset()


def test_it_holds_under_a_lora_of_the_users_and_in_peft_adapters_of_ours():
    import peft

    model, batch = converted(), plain()
    wanted = model(**batch).loss.item()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).train()
    assert wrapped(**batch).loss.item() == pytest.approx(wanted, rel=1e-6)
    ours = peft.get_peft_model(tiny.llama(), sc.PescConfig(num_experts=4, adapter_dim=8)).train()
    loss = ours(**batch).loss
    added = sc.losses.latest(ours)
    ours.base_model.own_loss.losses = {}
    assert 0.009 < added < 0.02 and (loss - ours(**batch).loss).item() == pytest.approx(
        added.item(), rel=1e-4
    )
    assert not ours.unload()._forward_hooks


def test_a_failed_pass_leaves_nothing_behind():
    model, batch = converted(), plain()
    with pytest.raises(ValueError), sc.trace(model):
        model(batch["input_ids"], labels=batch["labels"][:1])
    assert not any(map(records_of, model.sparsecraft.layers))
    assert model(**batch).loss.requires_grad


def test_stages_that_only_train_can_run_are_said_to_be_left_out(caplog):
    model = tiny.llama()
    sc.convert(model, sc.recipes.lte(num_experts=4), certify=False)
    for _ in range(2):
        model.train()(**plain()).loss.backward()
    said = [r.message for r in caplog.records if "which sc.train does" in r.message]
    assert len(said) == 1 and "lte_efficiency" in said[0] and "'soft'" in said[0]


def test_the_next_stage_by_gradient_counts():
    model = tiny.llama()
    sc.convert(model, sc.recipes.upit(4), certify=False)
    record = model.sparsecraft
    first, *_, last = [stage.name for stage in record.recipe.stages]
    assert record.next_stage().name == first
    record.report["training"] = [{"stage": first}]
    assert record.next_stage().name == last
    record.report["training"] += [{"stage": last}]
    assert record.next_stage().name == last


def test_masks_of_padding_count():
    model, batch = converted(), plain()
    mask = torch.ones(2, 9, dtype=torch.long)
    short = model(**batch, attention_mask=mask).loss.item()
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 6)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 6), value=-100),
        "attention_mask": torch.nn.functional.pad(mask, (0, 6)),
    }
    assert model(**padded).loss.item() == pytest.approx(short, rel=1e-5)
