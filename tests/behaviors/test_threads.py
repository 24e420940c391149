"""One model, many threads: each gets what it gets alone, bit for bit."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecraft as sc
from tests import cases

LENGTH, WIDTH = 9, 384
SENTENCE = {"num_experts": 3, "variant": "tuned", "router": "sentence"}

# What reads the batch: family, recipe, and what thread k tells it.
READERS: dict[str, tuple[str, Callable[[], sc.Recipe], str | None]] = {
    "sentences": ("llama", lambda: sc.recipes.mov(**SENTENCE), "sentence_embeddings"),
    "sentences_t5": ("t5", lambda: sc.recipes.mov(**SENTENCE), "sentence_embeddings"),
    "slots": ("llama", lambda: sc.recipes.smola(3, 2, mixing="slots"), "prefix_mask"),
    "slots_opt": ("opt", lambda: sc.recipes.smola(3, 2, mixing="slots"), "prefix_mask"),
    "modalities": ("llama", lambda: sc.recipes.smola(3, 2, modalities=True), "mm_token_type_ids"),
    "modalities_t5": ("t5", lambda: sc.recipes.smola(3, 2, modalities=True), "mm_token_type_ids"),
    "sequences": ("bert", lambda: sc.recipes.mov(3, router="sequence"), None),
    "slots_bert": ("bert", lambda: sc.recipes.smola(3, 2, mixing="slots"), None),
}
FEW = ("camelidae", "bam", "nexus", "btx_soft", "d2dmoe_sparse", "gmoefication_sparse")


def converted(name: str) -> nn.Module:
    family, make, _ = READERS.get(name, ("llama", None, None))
    case = None if make else (cases.RECIPES | cases.RUNNING)[name]
    model = cases.dense(family)
    sc.convert(model, make() if make else case.make(), certify=False)
    cases.randomize_new(model, 0.3)
    if case:
        case.ready(model)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model.eval()


def told(name: str, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of thread k, and what it tells the layers beside them."""
    family, _, field = READERS.get(name, ("llama", None, None))
    generator = torch.Generator().manual_seed(k)
    ids = torch.randint(3, cases.VOCAB, (2, LENGTH), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "bert":
        inputs["attention_mask"] = (torch.arange(LENGTH) <= 2 + k % 6).long().repeat(2, 1)
    if field is None:
        return inputs, {}
    if field == "sentence_embeddings":
        return inputs, {field: 3 * torch.randn(2, WIDTH, generator=generator)}
    return inputs, {field: (torch.arange(LENGTH) < 1 + k % (LENGTH - 1)).long().repeat(2, 1)}


def generated(model: nn.Module, inputs: dict, more: dict) -> list[Tensor]:
    with sc.context(model, **more) if more else nullcontext():
        return list(
            model.generate(
                **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
                output_logits=True,
            ).logits
        )  # fmt: skip


def evaluated(model: nn.Module, inputs: dict, more: dict) -> list[Tensor]:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = sc.evaluate(model, [inputs | more | {"labels": labels}])
    numbers = [found["loss"]["data"]["loss"], *found["routing"].values()]
    return [torch.tensor(numbers, dtype=torch.float64)]


def traced(model: nn.Module, inputs: dict, more: dict) -> list[Tensor]:
    if model.config.is_encoder_decoder:
        inputs = inputs | {"decoder_input_ids": inputs["input_ids"][:, :5]}
    with torch.no_grad(), sc.trace(model) as outer:
        logits = model(**inputs, **more).logits
        with sc.trace(model) as empty:
            assert not empty
    return [logits, *(r.logits_TE for r in outer.values()), *(r.weights_TK for r in outer.values())]


JOBS = (generated, evaluated, traced)


def jobs_of(name: str) -> list[Callable]:
    """`bert` neither generates nor, as a masked language model, has a loss to evaluate."""
    family = READERS[name][0] if name in READERS else "llama"
    return [traced] if family == "bert" else list(JOBS)


@contextmanager
def hurried() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """What each gives, all at once; the first of their errors is raised."""
    found, start = [None] * len(works), threading.Barrier(len(works))

    def run(k: int) -> None:
        start.wait()
        try:
            found[k] = works[k]()
        except BaseException as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(works))]
    with hurried():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def assert_alone(name: str, threads: int, rounds: int = 1) -> None:
    """Every thread does every job, each in another order, and gets what the job gives alone."""
    model, jobs = converted(name), jobs_of(name)
    asked = [told(name, k) for k in range(threads)]
    alone = [{job: job(model, *each) for job in jobs} for each in asked]

    def work(k: int) -> list[str]:
        wrong = []
        for turn in range(rounds * len(jobs)):
            job = jobs[(k + turn) % len(jobs)]
            found, wanted = job(model, *asked[k]), alone[k][job]
            same = len(found) == len(wanted) and all(map(torch.equal, found, wanted))
            wrong += [] if same else [f"{job.__name__} of thread {k}"]
        return wrong

    wrong = together([lambda k=k: work(k) for k in range(threads)])
    assert not [fault for found in wrong for fault in found]


@pytest.mark.parametrize("name", [*READERS, *FEW])
def test_each_thread_gets_what_it_gets_alone(name):
    assert_alone(name, threads=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READERS, *cases.RECIPES, *cases.RUNNING])
def test_each_of_32_threads_gets_what_it_gets_alone(name):
    assert_alone(name, threads=32, rounds=2)
