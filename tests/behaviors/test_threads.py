"""One model, many threads: each gets what it gets alone, bit for bit."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sparsecraft as sc
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.outputs import evaluation_mode
from sparsecraft.serving.generation import answer
from tests import cases, tiny

LENGTH, WIDTH = 9, 384
SENTENCE = {"num_experts": 3, "variant": "tuned", "router": "sentence"}

# What reads the batch: family, recipe, and what thread k tells it.
Reader = tuple[str, Callable[[], sc.Recipe] | None, str | None]
READERS: dict[str, Reader] = {
    "sentences": ("llama", lambda: sc.recipes.mov(**SENTENCE), "sentence_embeddings"),
    "sentences_t5": ("t5", lambda: sc.recipes.mov(**SENTENCE), "sentence_embeddings"),
    "slots": ("llama", lambda: sc.recipes.smola(3, 2, mixing="slots"), "prefix_mask"),
    "slots_opt": ("opt", lambda: sc.recipes.smola(3, 2, mixing="slots"), "prefix_mask"),
    "modalities": ("llama", lambda: sc.recipes.smola(3, 2, modalities=True), "mm_token_type_ids"),
    "modalities_t5": ("t5", lambda: sc.recipes.smola(3, 2, modalities=True), "mm_token_type_ids"),
    "sequences": ("bert", lambda: sc.recipes.mov(3, router="sequence"), None),
    "slots_bert": ("bert", lambda: sc.recipes.smola(3, 2, mixing="slots"), None),
}
NO_READER: Reader = ("llama", None, None)
FEW = (
    "sentences",
    "sentences_t5",
    "slots",
    "sequences",
    "camelidae",
    "attentive",
    "moepp",
    "mpoe",
    "bam",
    "d2dmoe_sparse",
)


def converted(name: str) -> nn.Module:
    family, make, _ = READERS.get(name, NO_READER)
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
    family, _, field = READERS.get(name, NO_READER)
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
    return [traced] if READERS.get(name, NO_READER)[0] == "bert" else list(JOBS)


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


def assert_alone(model: nn.Module, jobs: list[Callable], asked: list, rounds: int = 1) -> None:
    """Every thread does every job, each in another order, and gets what the job gives alone."""
    alone = [{job: job(model, *each) for job in jobs} for each in asked]

    def work(k: int) -> list[str]:
        wrong = []
        for turn in range(rounds * len(jobs)):
            job = jobs[(k + turn) % len(jobs)]
            found, wanted = job(model, *asked[k]), alone[k][job]
            same = len(found) == len(wanted) and all(map(torch.equal, found, wanted))
            wrong += [] if same else [f"{job.__name__} of thread {k}"]
        return wrong

    wrong = together([functools.partial(work, k) for k in range(len(asked))])
    assert not [*itertools.chain(*wrong)]


@pytest.mark.parametrize("name", FEW)
def test_each_thread_gets_what_it_gets_alone(name):
    assert_alone(converted(name), jobs_of(name), [told(name, k) for k in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READERS, *cases.RECIPES, *cases.RUNNING])
def test_each_of_32_threads_gets_what_it_gets_alone(name):
    assert_alone(converted(name), jobs_of(name), [told(name, k) for k in range(32)], rounds=2)


@pytest.mark.parametrize("name", ["btx", "d2dmoe_sparse"])
def test_activations_with_parameters_run_in_many_threads(name):
    """One module is lent each expert's own tensors."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**cases.LLAMA_LIKE, hidden_act="xielu")
    model, case = (
        transformers.LlamaForCausalLM(config).eval(),
        (cases.RECIPES | cases.RUNNING)[name],
    )
    sc.convert(model, case.make(), certify=False)
    cases.randomize_new(model, 0.3)
    case.ready(model)
    assert_alone(model, [traced], [told(name, k) for k in range(6)], rounds=4)


# ------------------------------------------------------------------------------ whose blocks are
def test_blocks_are_of_the_thread_that_opens_them():
    model = converted("slots")
    (inputs, held), (_, other) = told("slots", 3), told("slots", 6)

    def logits(**more) -> Tensor:
        with torch.no_grad():
            return model(**inputs, **more).logits

    plain, mixed, others = logits(), logits(**held), logits(**other)
    assert not torch.equal(plain, mixed) and not torch.equal(mixed, others)
    with sc.context(model, **held), sc.trace(model) as seen:
        (elsewhere,) = together([logits])
        assert torch.equal(elsewhere, plain) and not seen
        (taken_along,) = together([functools.partial(contextvars.copy_context().run, logits)])
        assert torch.equal(taken_along, mixed) and len(seen) == 14
    assert torch.equal(logits(), plain)


def test_blocks_of_asyncio_tasks_do_not_mix():
    model = converted("slots")
    asked = [told("slots", k) for k in range(4)]
    ids = asked[0][0]["input_ids"]

    def logits(**more) -> Tensor:
        with torch.no_grad():
            return model(ids, **more).logits

    wanted = [logits(**held) for _, held in asked]

    async def task(k: int) -> list[bool]:
        found = []
        with sc.context(model, **asked[k][1]), sc.trace(model) as seen:
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(torch.equal(logits(), wanted[k]))
                found.append(torch.equal(await asyncio.to_thread(logits), wanted[k]))
                found.append(len(seen) == 14)
        return found

    async def tasks() -> list[list[bool]]:
        return await asyncio.gather(*map(task, range(4)))

    with hurried():
        assert all(itertools.chain(*asyncio.run(tasks())))


def test_a_task_that_outlives_a_trace_is_not_seen():
    model, started = converted("camelidae"), []
    inputs, _ = told("camelidae", 0)

    async def late() -> None:
        await asyncio.sleep(0.01)
        with torch.no_grad():
            model(**inputs)

    async def opened() -> None:
        with sc.trace(model) as seen:
            started.append(asyncio.create_task(late()))
        await started[0]
        assert not seen

    asyncio.run(opened())


@pytest.mark.parametrize("part", ["layer", pytest.param("model", marks=pytest.mark.slow)])
def test_what_is_compiled_sees_its_own_thread(part):
    """Of a layer by itself what is held is all that it is told."""
    model = converted("slots")
    module = model if part == "model" else model.sparsecraft.layers[0]
    asked = [told("slots", k)[1] for k in range(4)]
    ids, x = told("slots", 0)[0]["input_ids"], torch.randn(2, LENGTH, cases.D)

    def run(called: Callable, held: dict) -> list[Tensor]:
        with torch.no_grad(), sc.context(model, **held), sc.trace(module) as seen:
            found = called(x) if part == "layer" else called(ids, use_cache=False).logits
            return [found, *(routing.logits_TE for routing in seen.values())]

    wanted = [run(module, held) for held in asked]
    assert not torch.equal(wanted[0][0], wanted[1][0])
    try:
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        run(compiled, asked[0])
        works = [functools.partial(run, compiled, held) for held in asked] * 2
        for found, theirs in zip(together(works), wanted * 2, strict=True):
            assert len(found) == len(theirs) and all(map(torch.equal, found, theirs))
    finally:
        torch.compiler.reset()


# ------------------------------------------------------------------------------------- training
def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, [*trained(model)], allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


def loss_of(model: nn.Module, inputs: dict, more: dict) -> Tensor:
    return model(**inputs, **more, labels=inputs["input_ids"], use_cache=False).loss


@pytest.mark.parametrize("name", ["slots", "camelidae"])
def test_layers_are_computed_again_for_the_pass_of_any_thread(name):
    """As on a GPU, where torch's own threads go back through the model."""
    model = converted(name).train()
    without_dropout(model)
    asked = [told(name, k) for k in range(3)]

    def losses() -> list[list[Tensor]]:
        own = sc.losses.latest if name == "camelidae" else lambda model: torch.zeros(())
        return [[loss_of(model, *each), own(model)] for each in asked]

    wanted = [[*loss, *gradients(model, loss[0])] for loss in losses()]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    passes = together([losses])[0]
    works = [functools.partial(gradients, model, loss[0]) for loss in passes]
    for loss, found, all_wanted in zip(passes, together(works), wanted, strict=True):
        for ours, theirs in zip([*loss, *found], all_wanted, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def test_own_losses_are_of_the_pass_of_their_thread():
    model = converted("camelidae").train()
    without_dropout(model)
    inputs, _ = told("camelidae", 0)
    with model.sparsecraft.own_loss.off():
        task = loss_of(model, inputs, {})
        (whole,) = together([lambda: loss_of(model, inputs, {})])
    assert whole > task
    with pytest.raises(SparsecraftError, match="in this thread"):
        sc.losses.latest(model)
    asked = [told("camelidae", k)[0] for k in range(4)]

    def both(inputs: dict) -> list[Tensor]:
        return [loss_of(model, inputs, {}).detach(), sc.losses.latest(model).detach()]

    alone = [both(inputs) for inputs in asked]
    works = [functools.partial(both, inputs) for inputs in asked]
    for found, wanted in zip(together(works), alone, strict=True):
        assert all(map(torch.equal, found, wanted))


# ------------------------------------------------------------------------------ modes and answers
def test_modes_come_back_when_the_last_thread_has_measured():
    model = converted("camelidae").train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    opened = [evaluation_mode(model), evaluation_mode(model)]
    for block in opened:
        block.__enter__()
    opened[0].__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    opened[1].__exit__(None, None, None)
    assert [module.training for module in model.modules()] == modes
    rows = [{"input_ids": told("camelidae", 0)[0]["input_ids"]}]
    found = together([lambda: sc.evaluate(model, rows)["loss"]] * 4)
    assert all(each == found[0] for each in found)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("mode", [True, False])
def test_answers_draw_from_a_generator_of_their_own(mode):
    model, tokenizer = tiny.llama().train(mode), tiny.tokenizer()
    sc.convert(model, sc.recipes.camelidae(4, adapter_dim=8), certify=False)
    model.generation_config.eos_token_id = None

    def said(seed: int) -> str:
        asks = [{"role": "user", "content": f"say {'red blue green sky'.split()[seed % 4]}"}]
        return answer(model, tokenizer, asks, max_new_tokens=6, temperature=1.5, seed=seed)

    state = torch.random.get_rng_state()
    alone = [*map(said, range(6))]
    assert len({*alone}) == 6
    assert together([functools.partial(said, seed) for seed in range(6)]) == alone
    assert torch.equal(torch.random.get_rng_state(), state) and model.training == mode
