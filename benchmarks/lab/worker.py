"""What a study of text keeps while it works: arguments, texts' sizes, the dense model, results."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable

import torch

from benchmarks.lab.clocks import about
from benchmarks.lab.models import dense_model
from benchmarks.lab.queue import Rows


class Worker:
    """Base of the studies' workers.

    Args:
        sizes: a dataclass: how much of everything.
        words: of the tiny model's vocabulary.
    """

    def __init__(self, args, sizes, words: int):
        torch.set_float32_matmul_precision("high")  # on a CPU this changes nothing
        self.args, self.begun, self.sizes = args, time.time(), sizes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        args.cache.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(args.results, args.copy)
        self.dense = dense_model("tiny_wide" if args.tiny else "smollm2", self.device, words)
        self.about = about(self.device) | {"sizes": dataclasses.asdict(sizes)}

    @property
    def spent(self) -> float:
        return time.time() - self.begun

    @property
    def late(self) -> bool:
        return self.spent > self.args.seconds

    def say(self, *words) -> None:
        print(f"{self.spent:6.0f}s", *words, flush=True)

    def kept(self, name: str, make: Callable, start: Callable | None = None):
        """A trained model, from the cache if it is there, and what `make` says of it.

        Args:
            make: trains the model in place.
            start: the model to train; by default a copy of the dense one.
        """
        path = self.args.cache / f"{name}.pt"
        model = start() if start else copy.deepcopy(self.dense)
        if path.exists():
            model.load_state_dict(torch.load(path, map_location=self.device))
            return model.requires_grad_(False).eval(), None
        facts = make(model)
        torch.save(model.state_dict(), path)
        return model, facts
