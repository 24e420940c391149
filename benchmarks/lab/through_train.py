"""The same arm by `sc.train` and by the lab's loop: how far do the two agree?

`sc.train` reads, packs and shuffles rows itself. It gets the study's documents with their token ids
as words, so that it trains on the study's own tokens; the batches that reach the model are
recorded, and the lab's loop takes them in the same order, from the same weights, under the same
schedule. Shapes: N packs, B packs of a batch, S tokens of a pack.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import sparsecraft as sc
from benchmarks.lab.clocks import about
from benchmarks.lab.models import dense_model
from benchmarks.lab.packed import WARM_UP, Method, build
from benchmarks.lab.packs import Packs, Recorded, document_mask, training_steps
from benchmarks.lab.queue import Run
from benchmarks.lab.session import Batch, Schedule, Session
from benchmarks.lab.tables import insert
from sparsecraft.data.encoding import IGNORED

TINY_STEPS, TINY_BATCH, TINY_LENGTH, TINY_WORDS = 12, 4, 64, 512
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both loops do.

    Attributes:
        rates: the peak learning rates of all weights and of routers.
        stage: the recipe's stage; `changes` of its fields, beside what the study sets for all.
    """

    arm: str
    steps: int
    batch: int
    length: int
    words: int
    rates: tuple[float, float]
    shape: str
    warm_up: float
    stage: str
    changes: Mapping = dataclasses.field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        """As transformers has it."""
        return Schedule(self.shape, self.warm_up, from_zero=True)


@dataclasses.dataclass(frozen=True)
class TextPlan:
    """What a study on text does in one stage.

    Attributes:
        amount: steps, and packs of a step.
        rates: the peak learning rates of all weights and of routers.
        stage: the recipe's stage, and `changes` of its fields.
    """

    amount: tuple[int, int]
    rates: tuple[float, float]
    schedule: Schedule
    stage: str
    changes: Mapping = dataclasses.field(default_factory=dict)


# ------------------------------------------------------------------ documents
Document = tuple[np.ndarray, np.ndarray]  # ids, and which of them are trained on


def documents_of(
    ids_NS: np.ndarray, positions_NS: np.ndarray, trained_NS=None, real_NS=None
) -> Iterator[Document]:
    """The documents of packs; without masks all tokens are real, and trained on."""
    everything = np.ones_like(ids_NS, dtype=bool)
    trained_NS = everything if trained_NS is None else trained_NS
    real_NS = everything if real_NS is None else real_NS
    for ids, positions, trained, real in zip(
        ids_NS, positions_NS, trained_NS, real_NS, strict=True
    ):
        ends = [*np.flatnonzero(positions == 0)[1:], len(ids)]
        for start, end in itertools.pairwise([0, *ends]):
            if real[start] and trained[start + 1 : end].any():
                yield ids[start:end], trained[start:end]


def random_documents(packs: int, seed: int = 0) -> list[Document]:
    """For a tiny model: half of each document is trained on."""
    generator, found = np.random.default_rng(seed), []
    for size in generator.integers(8, TINY_LENGTH // 2, size=3 * packs):
        ids = generator.integers(3, TINY_WORDS, size=size)
        found.append((ids, np.arange(size) >= size // 2))
    return found


def row_of(document: Document) -> dict:
    """A chat whose turns are runs of tokens, trained on or not; the first token never is."""
    ids, trained = document
    runs = itertools.groupby(zip(ids, [False, *trained[1:]], strict=True), key=lambda pair: pair[1])
    return {
        "messages": [
            {
                "role": "assistant" if own else "user",
                "content": " ".join(f"<{token}>" for token, _ in run),
            }
            for own, run in runs
        ]
    }


def id_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """<17> is token 17."""
    backend = Tokenizer(models.WordLevel({f"<{n}>": n for n in range(words)}, unk_token="<0>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<2>", eos_token="<2>", chat_template=TEMPLATE
    )


# ------------------------------------------------------------------ both loops
@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Batch]]:
    """The batches that reach the model in training, `real` beside them: padding is a document of
    its own behind the others, and has no label."""
    seen: list[Batch] = []

    def note(module, args, inputs) -> None:
        if not module.training:  # looking whether packed documents stay apart
            return
        batch = {key: inputs[key].clone() for key in ("input_ids", "position_ids", "labels")}
        labelled = (batch["labels"] != IGNORED).int().flip(1).cumsum(1).flip(1) > 0
        document = (batch["position_ids"] == 0).cumsum(1)
        last = (document * labelled).amax(1, keepdim=True)
        seen.append(batch | {"real": document <= last})

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def by_train(model: nn.Module, documents: Iterable[Document], setting: Setting):
    """Train a converted model by `sc.train`: its batches, and the loss of every step."""
    record = model.sparsecraft
    fields = {"optimizer": "adamw", "weight_decay": 0.0, "max_grad_norm": 1.0}
    fields |= {"warmup_ratio": setting.warm_up, "warmup_steps": 0} | setting.changes
    stages = tuple(
        dataclasses.replace(stage, **fields) if stage.name == setting.stage else stage
        for stage in record.recipe.stages
    )
    record.recipe = dataclasses.replace(record.recipe, stages=stages)
    with tempfile.TemporaryDirectory() as folder, recorded(model) as batches:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row_of(d)) + "\n" for d in documents))
        sc.train(
            model,
            rows,
            Path(folder) / "out",
            tokenizer=id_tokenizer(setting.words),
            stages=(setting.stage,),
            steps=setting.steps,
            batch_size=setting.batch,
            micro_batch=setting.batch,
            max_length=setting.length,
            learning_rate=setting.rates[0],
            router_learning_rate=setting.rates[1] or None,
            schedule=setting.shape,
            log_every=1,
            progress=False,
        )
    log = record.report["training"][-1]["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return batches[-len(losses) :], losses  # before the first, the memory of a pass is measured


def text_of(batch: Batch) -> Batch:
    """A recorded batch as the lab's text sessions take it."""
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": document_mask(batch["position_ids"]),
        "targets": F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED),
        "real": batch["real"],
    }


def trained_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, in float32."""
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def compare(
    setting: Setting,
    model: nn.Module,
    documents: Iterable[Document],
    descend: Callable[[list[Batch]], tuple[Tensor, nn.Module]],
) -> dict:
    """Both loops from the weights of `model`, and how far they end apart.

    Args:
        descend: trains a model of the same weights by the lab's loop on the recorded batches; the
            loss that it minimized at every step, and the model.
    """
    start = trained_of(model)
    batches, theirs = by_train(model, documents, setting)
    ours, other = descend(batches)
    after, its = trained_of(model), trained_of(other)
    moved = [(after[n] - start[n]).norm() for n in start]
    apart = [(after[n] - its[n].to(after[n].device)).norm() for n in start]
    gaps = [abs(a - b) for a, b in zip(theirs, ours.tolist(), strict=True)]
    return {
        **dataclasses.asdict(setting),
        **about(model.device.type),
        "sc_train": theirs,
        "lab": ours.tolist(),
        "largest_difference": max(gaps),
        "weights_apart": (torch.stack(apart).norm() / torch.stack(moved).norm()).item(),
    }


# ------------------------------------------------------------------ packed chats
def packed(
    args, *, arm: str, method: Method, run: Run, packs: type[Packs], session: Callable, command: str
) -> None:
    """The comparison of a study on packed chats; tiny ones in float32, so that what is compared is
    the loops and not how bf16 rounds.

    Args:
        run: its learning rates and schedule.
        session: makes the study's session, of a `PackedSession`'s arguments.
    """
    device = "cpu" if args.tiny or not torch.cuda.is_available() else "cuda"
    if args.tiny:
        sizes = (TINY_STEPS, TINY_BATCH, TINY_LENGTH, TINY_WORDS)
        dense = dense_model("tiny", device, TINY_WORDS, rounded=True)
        documents = random_documents(2 * TINY_STEPS * TINY_BATCH)
    else:
        dense = dense_model(args.model, device, rounded=True)
        train = packs(args.data, args.rows).parts["train"]
        sizes = (args.steps, args.batch, train["ids"].shape[1], dense.config.vocab_size)
        documents = documents_of(*(train[key] for key in ("ids", "positions", "trained", "real")))
    rates = (run.rates[0], run.rates[-1])
    setting = Setting(arm, *sizes, rates, run.schedule, WARM_UP, "train")
    model, _ = build(dense, method, 0)

    def descend(batches: list[Batch]) -> tuple[Tensor, nn.Module]:
        own = session(arm, dense, Recorded(batches[0]), "eager", setting.steps, setting.batch)
        own.set_peaks(run)
        if args.tiny:
            own.model.float()
        steps = (packed_step(batch, device) for batch in batches)
        return own.descend(steps, setting.schedule, setting.steps, "total"), own.model

    found = compare(setting, model.float() if args.tiny else model, documents, descend)
    write(args, found, f"{command} {'--tiny' if args.tiny else f'--data {args.data.name}'}")


def packed_step(batch: Batch, device: str) -> Batch:
    """A recorded batch as the tensors of one step, with all its real tokens."""
    stacked = training_steps(Recorded(batch), 0, 1, len(batch["input_ids"]), room=0)
    return {key: value[0].to(device) for key, value in stacked.items() if value.ndim}


# ------------------------------------------------------------------ text
def text(
    args,
    *,
    arm: str,
    convert: Callable[[nn.Module], object],
    packs: Callable[[], tuple[Tensor, Tensor]],
    plan: TextPlan,
    session: Callable[[nn.Module, bool], Session],
    command: str,
) -> None:
    """The comparison of a study on text; tiny ones in float32 on both sides.

    Args:
        packs: the ids and positions of the packs to train on, (N, S) each.
        session: makes the study's session of a model, and of whether its products are bf16.
    """
    device = "cpu" if args.tiny or not torch.cuda.is_available() else "cuda"
    if args.tiny:
        dense, length = dense_model("tiny_wide", device, TINY_WORDS), TINY_LENGTH
        amount, documents = (TINY_STEPS, TINY_BATCH), random_documents(2 * TINY_STEPS * TINY_BATCH)
    else:
        ids, positions = (part.cpu().numpy() for part in packs())
        dense, length, amount = dense_model("smollm2", device), ids.shape[1], plan.amount
        documents = documents_of(ids, positions)
    shape, warm_up = plan.schedule.shape, plan.schedule.warm_up
    sizes = (*amount, length, dense.config.vocab_size)
    setting = Setting(arm, *sizes, plan.rates, shape, warm_up, plan.stage, plan.changes)
    convert(dense)
    other = copy.deepcopy(dense)

    def descend(batches: list[Batch]) -> tuple[Tensor, nn.Module]:
        own = session(other, device == "cuda")
        steps = map(text_of, batches)
        return own.descend(steps, setting.schedule, setting.steps, "total"), other

    found = compare(setting, dense, documents, descend)
    write(args, found, f"{command} {'--tiny' if args.tiny else f'--data {args.data.name}'}")


# ------------------------------------------------------------------ the page
def write(args, found: dict, command: str) -> None:
    """Put a comparison beside the page, and its sentence into the page."""
    path = args.page.with_name("through_train.json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept["tiny" if args.tiny else "full"] = found | {"command": command}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    section(args.page)
    print(sentence(kept["tiny" if args.tiny else "full"]))


def section(page: Path) -> None:
    """The comparisons there are, in the page."""
    path = page.with_name("through_train.json")
    if path.exists():
        said = map(sentence, json.loads(path.read_text()).values())
        insert(page, "\n".join(["## Through sc.train", "", *said]), "through")


def sentence(found: dict) -> str:
    tiny = found["words"] == TINY_WORDS
    first, last = ([found[who][at] for who in ("sc_train", "lab")] for at in (0, -1))
    return (
        f"- {found['machine']}, {'tiny model, float32' if tiny else 'the model of this study'}, "
        f"torch {found['torch']}: arm `{found['arm']}`, {found['steps']} steps of {found['batch']} "
        f"packs of {found['length']} tokens, {found['shape']} schedule. By `sc.train` the loss "
        f"goes from {first[0]:.4f} to {last[0]:.4f}, by this study's own loop on the same batches "
        f"from {first[1]:.4f} to {last[1]:.4f}; the largest difference of a step is "
        f"{found['largest_difference']:.1e}, and the trained weights end apart by "
        f"{found['weights_apart']:.1e} of the way that they went. `{found['command']}`"
    )
