"""Did it train? Each tensor that should move is counted, and what did not move has a reason."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

import sparsecraft as sc
from sparsecraft.checkpoint import save
from sparsecraft.errors import TrainingError
from sparsecraft.evaluation.report import describe
from sparsecraft.training import descend
from sparsecraft.training.moved import Before, Evidence, found
from tests import tiny
from tests.training.test_train import FAST, converted
from tests.training.test_watch import train


@pytest.fixture
def rows(tmp_path) -> str:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())


def told(out) -> dict:
    return json.loads((out / "report.json").read_text())["training"][-1]["moved"]


def test_all_that_should_move_has_moved_and_everyone_is_told(tmp_path, rows, caplog):
    caplog.set_level("INFO", "sparsecraft")
    model, out = converted(), tmp_path / "out"
    report = train(model, rows, out)
    new = [(n, p) for n, p in model.named_parameters() if ".experts." in n or ".router." in n]
    banks = sum(p.shape[0] for n, p in new if ".mlp.experts." in n)
    banks += sum(".mlp.experts." not in name for name, _ in new)
    assert told(out) == {"should": banks, "moved": banks, "unmoved": {}}
    assert report.moved == {"train": told(out)}
    line = f"{banks} of {banks} tensors that should train have moved."
    assert line in caplog.text and line in str(report)
    assert any(line in text for text in describe(out))


def freeze(model) -> None:
    model.model.layers[0].mlp.router.scorer.weight.requires_grad_(False)


def starve(model) -> None:
    """No token goes to expert 2 of the first layer."""
    router = model.model.layers[0].mlp.router
    forward = router.forward

    def without_2(x, *args, **kwargs):
        routing = forward(x, *args, **kwargs)
        indices = routing.indices_TK
        return type(routing)(routing.weights_TK, indices.where(indices != 2, 1), routing.logits_TE)

    router.forward = without_2


def no_effect(model) -> None:
    """What expert 1 gives does not count."""
    up = model.model.layers[1].mlp.experts.up
    up.register_hook(lambda gradient: gradient * (torch.arange(4) != 1).view(4, 1, 1))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("spoil", "reasons"),
    [
        (freeze, {"model.layers.0.mlp.router.scorer.weight": "requires_grad=False"}),
        (
            starve,
            {
                "model.layers.0.mlp.experts.up[2]": "no token reached it",
                "model.layers.0.mlp.experts.down[2]": "no token reached it",
            },
        ),
        (
            no_effect,
            {
                "model.layers.1.mlp.experts.up[1]": "its gradient is zero",
                "model.layers.1.mlp.experts.down[1]": "its gradient is zero",
            },
        ),
    ],
)
def test_what_did_not_train_is_named_with_the_reason(
    spoil, reasons, decay, tmp_path, rows, monkeypatch, caplog
):
    """Weight decay alone is no training."""
    model = converted()
    original = descend.make_trainer

    def make_trainer(run, stage, settings, dataset, folder):
        trainer = original(run, stage, settings, dataset, folder)
        trainer.args.weight_decay = decay
        spoil(model)
        return trainer

    monkeypatch.setattr(descend, "make_trainer", make_trainer)
    # A model of which one gate was exchanged is another than its folder gives.
    monkeypatch.setattr(save, "check_rebuilt", lambda *args: None)
    report = train(model, rows, tmp_path / "out")
    moved = told(tmp_path / "out")
    assert moved["unmoved"].keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in moved["unmoved"][name]
        assert name in str(report)
    shrunk = any("weight decay alone" in reason for reason in moved["unmoved"].values())
    assert shrunk == (decay > 0 and spoil is not freeze)
    assert moved["moved"] == moved["should"] - len(reasons)
    assert "have moved. The report says why." in caplog.text


def test_many_are_counted_by_pattern(tmp_path, rows, monkeypatch):
    original = descend.make_trainer

    def make_trainer(run, *args):
        trainer = original(run, *args)
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_("router" in name)
        return trainer

    monkeypatch.setattr(descend, "make_trainer", make_trainer)
    train(converted(), rows, tmp_path / "out")
    moved = told(tmp_path / "out")
    assert moved["moved"] == 2 and list(moved["unmoved"]) == ["*"]
    assert f"({moved['should'] - 2} of them)" in moved["unmoved"]["*"]


def test_what_must_not_move_is_an_error(tmp_path, rows, monkeypatch):
    class Meddles(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.model.norm.weight.data += 1

    original = descend.make_trainer

    def make_trainer(*args):
        trainer = original(*args)
        trainer.add_callback(Meddles())
        return trainer

    monkeypatch.setattr(descend, "make_trainer", make_trainer)
    with pytest.raises(TrainingError, match=r"1 tensors changed .*'model\.norm\.weight'"):
        train(converted(), rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_step_trains(tmp_path, rows):
    """It is no warm-up from zero."""
    model = converted()
    train(model, rows, tmp_path / "out", steps=1)
    moved = told(tmp_path / "out")
    # Of each pair of matrices the first has no gradient while the second is zero.
    assert moved["unmoved"] == {"*": "its gradient is zero (22 of them)"}
    assert moved["moved"] == moved["should"] - 22 == 24


def test_a_rate_of_zero_is_the_reason():
    model = converted()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    before = Before(model, names)
    group = {"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0}
    optimizer = torch.optim.AdamW([group], weight_decay=0.0)
    evidence = Evidence()
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    evidence.note_rates(optimizer)
    optimizer.step()
    evidence.note_optimizer(model, optimizer)
    moved = found(before, model, evidence)
    assert moved["moved"] == 0
    assert moved["unmoved"]["*"].startswith("its learning rate is zero in every step")


def test_a_resumed_run_counts_from_its_beginning(tmp_path, rows):
    options = {"save_every": 2}

    class Killed(BaseException):
        pass

    class Stops(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise Killed

    original = descend.make_trainer

    def make_trainer(*args):
        trainer = original(*args)
        trainer.add_callback(Stops())
        return trainer

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(descend, "make_trainer", make_trainer)
        train(converted(), rows, tmp_path / "out", **options)
    train(converted(), rows, tmp_path / "out", resume=True, **options)
    moved = told(tmp_path / "out")
    assert moved["moved"] == moved["should"] > 0


def test_a_fit_tells_which_routers_it_has_fitted(tmp_path, rows):
    model = tiny.llama()
    sc.convert(model, sc.recipes.moefication(num_experts=4, variant="released"))
    options = FAST | {"steps": 2, "fit_tokens": 200}
    sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **options)
    runs = json.loads((tmp_path / "out" / "report.json").read_text())["training"]
    assert all(run["moved"]["should"] for run in runs)
    fits = [run for run in runs if "fit" in run]
    assert fits and all(run["moved"]["moved"] == run["moved"]["should"] for run in fits)
