"""One row of the table, in this process: what a verb says that it needs, and its measured peak."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import sparsecraft as sc
import sparsecraft.conversion.stream
import sparsecraft.training.train  # what is imported later would count as memory of the work
from sparsecraft.cli import main as cli

SAID = re.compile(r"needs about ([\d.]+) GB of memory")


def resident() -> int:
    """Bytes of this process that no file stands behind: pages of mapped files are given back."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) * 1024


class Peak:
    """The most memory that a block takes beyond what was taken before."""

    def __init__(self, device: str):
        self.cuda, self.bytes = device == "cuda", 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            self.bytes = torch.cuda.max_memory_allocated() - before
            return
        done, before = threading.Event(), resident()

        def watch() -> None:
            while not done.wait(0.002):
                self.bytes = max(self.bytes, resident() - before)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class Lines(logging.Handler):
    """What the verb says."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(asked: dict, work: Path, peak: Peak) -> None:
    model = converted(asked)
    options = {"steps": 2, "batch_size": 2 * asked["rows"], "micro_batch": asked["rows"]}
    options |= {"max_length": asked["length"], "packing": False, "progress": False}
    options |= {"activation_checkpointing": asked.get("checkpointing", False)}
    with peak.watched():
        sc.train(model, asked["data"], work / "out", **options)


def converted(asked: dict) -> torch.nn.Module:
    options = {"device_map": asked["device"], "quantize": asked.get("quantize")}
    model = sc.hub.load_dense(asked["model"], **options)
    recipe = getattr(sc.recipes, asked["recipe"])(**asked.get("arguments", {}))
    sc.convert(model, recipe, certify=False)
    return model


def convert(asked: dict, work: Path, peak: Peak) -> None:
    words = ["convert", asked["recipe"], "--model", asked["model"], "--out", str(work / "out")]
    words += ["--device", asked["device"]] if asked["device"] != "cpu" else []
    with peak.watched():
        assert cli.main([*words, *asked.get("words", ())]) == 0


def evaluate(asked: dict, work: Path, peak: Peak) -> None:
    model = converted(asked)
    with peak.watched():
        sc.evaluate(model, asked["data"], max_length=asked["length"], limit=asked["rows"])


VERBS: dict[str, Callable[[dict, Path, Peak], None]] = {
    "train": train,
    "convert": convert,
    "eval": evaluate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", help="JSON, as of __main__.rows")
    asked = json.loads(parser.parse_args().row)
    lines, peak = Lines(), Peak(asked["device"])
    logger = logging.getLogger("sparsecraft")
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    cli.say = lines.lines.append
    with tempfile.TemporaryDirectory() as folder:
        VERBS[asked["verb"]](asked, Path(folder), peak)
    told = [found[0] for line in lines.lines for found in [SAID.search(line)] if found]
    said = max(float(SAID.search(line)[1]) for line in told)
    print(json.dumps({"said": said, "measured": round(peak.bytes / 1e9, 2)}))


if __name__ == "__main__":
    sys.exit(main())
