"""Error, I(E;Y), H_s and H_u of every gate of Krishnamurthy et al. on scikit-learn's digits.

    python -m benchmarks.digits            # ten seeds of every arm; a CPU core, minutes
    python -m benchmarks.digits --table    # the tables of the page

Shapes: B samples, E experts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.digits.networks import Digits, Expert, parameters, trunk
from benchmarks.digits.page import write
from sparsecraft.evaluation.specialization import (
    class_information,
    sample_entropy,
    usage_entropy,
)
from sparsecraft.moe.classifiers import ATTENTIVE, ORIGINAL, MixtureOfClassifiers

HERE = Path(__file__).parent
EXPERTS, RATE, BATCH, EPOCHS = 5, 1e-3, 128, 100
IMPORTANCE = {"importance": 0.2}
# beta_s = 1e-6 and beta_d = 1e-2 of the paper's table, the first times its batch of 512 squared,
# by which its code does not divide.
SIMILARITY = {"sample_similarity": 0.26, "sample_dissimilarity": 0.01}
LOSSES = {
    "": {},
    " + importance": IMPORTANCE,
    " + similarity": SIMILARITY,
    " + 10 x similarity": {name: 10 * value for name, value in SIMILARITY.items()},
}
# How an attentive mixture is distilled: whether the gate's trunk trains, and on what.
DISTILLED = {
    "": (False, "labels"),
    ", trunk too": (True, "labels"),
    ", by matching": (True, "gate"),
}
WIDE = {"narrow": 68, "hidden": 128}  # as many parameters as five experts and their gate


def descend(module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], data: Digits) -> None:
    """Adam on what requires gradients, every epoch in another order."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE, fused=True)
    module.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data.y)).split(BATCH):
            optimizer.zero_grad()
            loss(data.x[rows], data.y[rows]).backward()
            optimizer.step()
    module.eval()


def error(scores_BC: Tensor, y_B: Tensor) -> float:
    return (scores_BC.argmax(-1) != y_B).float().mean().item()


@torch.no_grad()
def measured(model: MixtureOfClassifiers, data: Digits) -> dict:
    """What the page shows of a mixture; the last two of the held-out samples' best expert alone."""
    found = model(data.held_x)
    probs_BE = found.routing.logits_TE.softmax(-1)
    best_B = probs_BE.argmax(-1)
    alone_BEC = torch.stack([expert(data.held_x)[1] for expert in model.experts], dim=1)
    alone_BC = alone_BEC[torch.arange(len(best_B)), best_B]
    return {
        "train_error": error(model(data.x).log_probs_BC, data.y),
        "error": error(found.log_probs_BC, data.held_y),
        "information": class_information(best_B, data.held_y),
        "information_released": class_information(best_B, alone_BC.argmax(-1)),
        "sample_entropy": sample_entropy(probs_BE),
        "usage_entropy": usage_entropy(probs_BE),
        "error_top1": error(alone_BC, data.held_y),
    }


def singles(seed: int, data: Digits) -> dict[str, dict]:
    """One expert alone, and one of as many parameters as a mixture."""
    found = {}
    for name, sizes in (("single", {}), ("single, as large as a mixture", WIDE)):
        torch.manual_seed(seed)
        network = Expert(**sizes)
        descend(network, lambda x, y, n=network: F.cross_entropy(n(x)[1], y), data)
        with torch.no_grad():
            train, held = (error(network(x)[1], y) for x, y in
                           ((data.x, data.y), (data.held_x, data.held_y)))  # fmt: skip
        found[name] = {"train_error": train, "error": held, "parameters": parameters(network)}
    return found


def mixtures(seed: int, data: Digits) -> dict[str, dict]:
    """Both gates under every loss, and the second one distilled."""
    found = {}
    for name, gate in (("original", ORIGINAL), ("attentive", ATTENTIVE)):
        for beside, losses in LOSSES.items():
            torch.manual_seed(seed)
            experts = [Expert() for _ in range(EXPERTS)]
            model = MixtureOfClassifiers(experts, trunk(), data.x, gate, losses=losses)
            descend(model, lambda x, y, m=model: m(x, y).loss, data)
            found[name + beside] = measured(model, data) | {"parameters": parameters(model)}
            if name == "attentive" and "10" not in beside:
                for how, (trunks, by) in DISTILLED.items():
                    result = distilled(seed, model, data, trunks, by)
                    found[f"distilled{how}: {name}{beside}"] = result
    return found


def distilled(seed: int, model: MixtureOfClassifiers, data: Digits, trunks: bool, by: str) -> dict:
    torch.manual_seed(seed)
    student = model.distilled(trunk=trunks)

    def matching(x: Tensor, y: Tensor) -> Tensor:
        """KL(p || q) of the attentive gate's probabilities p and the new gate's q."""
        with torch.no_grad():
            wanted_BE = model(x).routing.weights_TK
        found_BE = student.router(student.trunk(x)).logits_TE.log_softmax(-1)
        return F.kl_div(found_BE, wanted_BE, reduction="batchmean")

    descend(student, matching if by == "gate" else lambda x, y: student(x, y).loss, data)
    result = measured(student, data) | {"parameters": parameters(student)}
    student.choose(1)
    with torch.no_grad():  # this runs no other expert
        result["error_top1"] = error(student(data.held_x).log_probs_BC, data.held_y)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(1)
        start, runs = time.perf_counter(), []
        for seed in range(args.seeds):
            data = Digits.drawn(seed)
            runs.append({"seed": seed} | singles(seed, data) | mixtures(seed, data))
            print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        about = {
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - start),
            "load": round(os.getloadavg()[0], 1),
        }
        args.out.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
    write(json.loads(args.out.read_text()), HERE / "README.md")


if __name__ == "__main__":
    main()
