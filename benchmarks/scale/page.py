"""The page of the study, from its results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS_SHOWN = ("adapter", "lora", "vector", "ffn", "ffn_lora", "attention", "split")


def write(folder: Path) -> None:
    """README.md beside results.json."""
    found = json.loads((folder / "results.json").read_text())
    (folder / "README.md").write_text("\n".join(_page(found)) + "\n")


def _page(found: dict[str, Any]) -> Iterator[str]:
    machine, versions = found["machine"], found["machine"]["versions"]
    yield "# One GPU against several\n"
    yield (
        f"`python -m benchmarks.scale all` on {machine['gpus']} x {machine['gpu']}, commit "
        f"{machine['commit']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"accelerate {versions['accelerate']}. A Llama of about 1B parameters with random weights, "
        "bf16 autocast, a global batch of 16 rows of 2,048 tokens a step, at most 8 in a "
        "micro-batch; 23 steps, of which the last 20 count.\n"
    )
    yield "| recipe | engine | tokens/s | against one | GiB a GPU | loss at step 1, 10, 23 |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, run in found["measure"].items():
        recipe, engine = name.rsplit(" ", 1)
        ratio = run["tokens_per_second"] / found["measure"][f"{recipe} one"]["tokens_per_second"]
        losses = dict(run["losses"])
        shown = ", ".join(f"{losses[step]:.4f}" for step in (1, 10, 23))
        yield (
            f"| {recipe} | {engine} | {run['tokens_per_second']:,.0f} | {ratio:.2f} | "
            f"{max(run['peak_gib']):.1f} | {shown} |"
        )
    yield "\n## Checkpoints of every engine and launcher\n"
    yield (
        "A small model, 8 steps; `then`: the second engine goes on from step 4. "
        "Away: largest difference of the logits of one process that loads the checkpoint, on the "
        "GPU and on the CPU (whose sums in bf16 are others).\n"
    )
    yield "| run | loss at step 1, 4, 8 | away, GPU | away, CPU |\n| --- | --- | --- | --- |"
    away = found["checkpoints"]["away"]
    for name, log in found["checkpoints"]["losses"].items():
        shown = ", ".join(f"{loss:.5f}" for _, loss in log)
        label = name.replace("_", " ")
        yield f"| {label} | {shown} | {away[f'{name} cuda']:.0e} | {away[f'{name} cpu']:.0e} |"
    yield from _experts(found["experts"])
    yield "\n## 500 steps of one recipe of each kind of experts\n"
    yield (
        "Finite: every logged loss. Same bits: two shorter runs by one seed end in the same "
        "tensors, without and with `torch.use_deterministic_algorithms`.\n"
    )
    yield "| experts | type | loss, first to last | finite | same bits | deterministic |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for kind in KINDS_SHOWN:
        for dtype in ("bfloat16", "float16"):
            yield _soak(found["soak"], kind, dtype)


def _experts(found: dict[str, Any]) -> Iterator[str]:
    version = found["experts bfloat16 ddp"]["versions"]["transformers"]
    yield "\n## Experts shared among GPUs\n"
    yield (
        f"`python -m benchmarks.scale experts`, commit {found['commit']}, transformers {version}: "
        "the same Llama upcycled to 4 experts and exported as mixtral, loaded by transformers "
        f"alone, on one GPU and with its experts shared among {found['gpus']} (`ep_size`); forward "
        "passes of 8 rows of 2,048 tokens in each process. Away: of the logits, relative to the "
        "largest.\n"
    )
    yield "| type | GPUs | experts a GPU | tokens/s | GiB a GPU | away |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for dtype in ("float32", "bfloat16"):
        for engine in ("one", "ddp"):
            run = found[f"experts {dtype} {engine}"]
            away = f"{found[f'experts {dtype} away']:.0e}" if engine == "ddp" else ""
            yield (
                f"| {dtype} | {run['processes']} | {run['experts_held']} | "
                f"{run['tokens_per_second']:,.0f} | {run['peak_gib']:.1f} | {away} |"
            )


def _soak(runs: dict[str, Any], kind: str, dtype: str) -> str:
    def prints(run: str) -> dict[str, str] | None:
        return runs.get(f"soak_{kind}_{dtype}_{run}", {}).get("prints") or None

    def same(one: str, other: str) -> str:
        if not (prints(one) and prints(other)):
            return "not run"
        shared = prints(one).keys() & prints(other).keys()
        return "yes" if all(prints(one)[k] == prints(other)[k] for k in shared) else "no"

    first = runs.get(f"soak_{kind}_{dtype}_first")
    if first is None:
        return f"| {kind} | {dtype} | not run | | | |"
    losses = [loss for _, loss in first["losses"]]
    finite = all(abs(loss) < float("inf") for loss in losses)
    return (
        f"| {kind} | {dtype} | {losses[0]:.3f} to {losses[-1]:.3f} | {'yes' if finite else 'NO'} | "
        f"{same('again', 'deterministic_first')} | "
        f"{same('deterministic_first', 'deterministic_again')} |"
    )
