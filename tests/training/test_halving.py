"""Where memory runs out: a step is repeated in halves, without another loss, or one sentence says
what to lower."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.dense.memory import is_out_of_memory
from sparsecraft.errors import ResourceError
from sparsecraft.training.trainers import RoutedTrainerMixin
from tests import tiny
from tests.training import cut
from tests.training.test_cut import assert_same_run, trainer_of

ON_GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 40000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@contextmanager
def room_for(monkeypatch, rows: int, backward: bool = False, told: str = ON_CPU):
    """Let a pass of more rows run out of memory, in its forward or its backward part."""
    compute, handles = RoutedTrainerMixin.compute_loss, []

    def refuse(*_):
        for handle in handles:
            handle.remove()
        raise (torch.OutOfMemoryError if "CUDA" in told else RuntimeError)(told)

    def limited(self, model, inputs, *args, **kwargs):
        if len(inputs["labels"]) <= rows or self.optimizer is None:  # it is measured
            return compute(self, model, inputs, *args, **kwargs)
        if not backward:
            refuse()
        loss = compute(self, model, inputs, *args, **kwargs)
        trained = [p for p in model.parameters() if p.requires_grad]
        handles.append(trained[0].register_hook(refuse))
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(RoutedTrainerMixin, "compute_loss", limited)
        yield


@pytest.mark.parametrize("task", cut.TASKS)
def test_half_the_micro_batch_has_the_same_losses_and_weights(tmp_path, monkeypatch, caplog, task):
    runs = {}
    for micro in (4, 2):
        model = cut.converted(task, balance="switch", balance_coef=0.7)
        options = {"model": model, "overwrite": True, "batch_size": 4}
        with room_for(monkeypatch, 2):
            runs[micro] = cut.train(task, tmp_path, cut.rows(task), micro, **options)
    assert caplog.text.count("The step is repeated with micro-batches of 2 rows instead of 4") == 1
    assert_same_run(runs[2], runs[4])
    for name, tensor in runs[2]["tensors"].items():
        assert torch.allclose(runs[4]["tensors"][name], tensor, atol=1e-6), name


def test_a_step_that_runs_out_in_its_last_micro_batch_is_repeated_whole(tmp_path, monkeypatch):
    """Behind others, in the backward pass, with gradients half added."""
    path = Path(tiny.write_rows(tmp_path / "rows.jsonl", cut.rows("causal")))
    found = {}
    for limit in (4, 2):
        model = cut.converted("causal", balance="switch", balance_coef=0.7)
        trainer = trainer_of(model, path, micro=4, accumulation=2)
        batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, "cpu")
        trainer.current_gradient_accumulation_steps = len(batches)
        trainer.accelerator.gradient_state._set_sync_gradients(False)
        model.train()
        losses = [trainer.training_step(model, batches[0], items)]
        with room_for(monkeypatch, limit, backward=True):
            losses.append(trainer.training_step(model, batches[1], items))
        found[limit] = losses, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert trainer.halved == (limit == 2)
        logged = trainer.tally.pop(torch.clone)
        assert logged["switch_loss"] > 0
    # The balance loss, which is no mean over tokens, is that of the halves.
    assert sum(found[2][0]).item() == pytest.approx(sum(found[4][0]).item(), rel=1e-2)
    halves = cut_in_two(path)
    for name, gradient in found[2][1].items():
        assert torch.allclose(halves[name], gradient, atol=1e-6), name


def cut_in_two(path: Path) -> dict[str, torch.Tensor]:
    """The gradients of the same step by micro-batches of half the size."""
    model = cut.converted("causal", balance="switch", balance_coef=0.7)
    trainer = trainer_of(model, path, micro=2, accumulation=4)
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 4, "cpu")
    trainer.current_gradient_accumulation_steps = len(batches)
    model.train()
    for batch in batches:
        trainer.training_step(model, batch, items)
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("micro", "said"), [(4, "4 x .* in halves too"), (1, "1 x ")])
def test_what_does_not_fit_in_halves_is_one_sentence(tmp_path, monkeypatch, micro, said):
    options = {"model": cut.converted("causal"), "batch_size": 4}
    with (
        room_for(monkeypatch, micro // 4, told=ON_GPU if micro == 1 else ON_CPU),
        pytest.raises(ResourceError, match=said) as error,
    ):
        cut.train("causal", tmp_path, cut.rows("causal"), micro, **options)
    text = str(error.value)
    for word in ("--micro-batch (micro_batch=1)", "--max-length", "--activation-checkpointing"):
        assert word in text
    assert "more were asked for" in text and "are free" in text
    assert "2.15 GB" in text if micro == 1 else "40.00 GB" in text
    assert not (tmp_path / "causal-out").exists()


def test_a_run_that_ran_out_goes_on_with_what_was_lowered(tmp_path, monkeypatch):
    options = {"steps": 6, "save_every": 2, "batch_size": 4, "log_every": 1}
    whole = cut.train("causal", tmp_path, cut.rows("causal"), 4, model=converted(), **options)
    shutil.rmtree(tmp_path / "causal-out")
    compute = RoutedTrainerMixin.compute_loss

    def grown(self, model, inputs, *args, **kwargs):
        if self.state.global_step >= 3 and len(inputs["labels"]) > 1:
            raise RuntimeError(ON_CPU)
        return compute(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="resume"):
        patch.setattr(RoutedTrainerMixin, "compute_loss", grown)
        cut.train("causal", tmp_path, cut.rows("causal"), 4, model=converted(), **options)
    options |= {"resume": True, "activation_checkpointing": True}
    rest = cut.train("causal", tmp_path, cut.rows("causal"), 1, model=converted(), **options)
    for name, tensor in whole["tensors"].items():
        assert torch.allclose(rest["tensors"][name], tensor, atol=1e-5), name


def converted():
    return cut.converted("causal", balance="none")


def test_a_repeated_step_counts_buffers_once(tmp_path, monkeypatch):
    seen = {}
    for room in (4, 1):
        model = converted()
        model.register_buffer("seen", torch.zeros(()), persistent=False)
        model.register_forward_pre_hook(
            lambda m, args, kwargs: m.seen.add_(kwargs["input_ids"].numel()) and None,
            with_kwargs=True,
        )
        with room_for(monkeypatch, room, backward=True):
            data = cut.rows("causal")[:1] * 8
            options = {"model": model, "batch_size": 4, "steps": 2, "overwrite": True}
            cut.train("causal", tmp_path, data, 2, **options)
        seen[room] = model.seen.item()
    assert seen[1] == seen[4] > 0


def test_other_errors_are_not_taken_for_it(tmp_path, monkeypatch):
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError(ON_GPU))
    assert is_out_of_memory(RuntimeError(ON_CPU)) and not is_out_of_memory(ValueError(ON_CPU))
    options = {"model": cut.converted("causal"), "batch_size": 4}
    with room_for(monkeypatch, 2, told="other"), pytest.raises(RuntimeError, match="other"):
        cut.train("causal", tmp_path, cut.rows("causal"), 4, **options)


def test_torchs_own_words_are_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


# ------------------------------------------------------------------ other verbs


def fail(*args, **kwargs):
    raise RuntimeError(ON_CPU)


def test_verbs_say_what_to_lower(tmp_path, monkeypatch, capsys):
    folder = tiny.save_dense(tmp_path / "dense")
    monkeypatch.setattr("sparsecraft.conversion.convert.apply", fail)
    words = ["convert", "camelidae", "--model", folder, "--out", str(tmp_path / "out")]
    assert main(words) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: Conversion ran out of memory: 40.00 GB more were asked for")
    assert "--dtype bfloat16" in told and "--stream" in told and "--no-certify" in told
    with pytest.raises(ResourceError, match=r"\(certify=False\)"):
        sc.convert(tiny.llama(), sc.recipes.camelidae(), certify=False)
    monkeypatch.setattr("sparsecraft.evaluation.held_out._losses", fail)
    with pytest.raises(ResourceError, match=r"Evaluation .*max_length"):
        sc.evaluate(tiny.llama(), torch.arange(3, 40)[None])
