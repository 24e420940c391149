"""One GPU against several. Each verb is one part of a few minutes and adds to results.json:

profile      where the time of a step goes, with one process and with all
measure      tokens per second, memory and losses of a 1B model, by one GPU, DDP and FSDP2
checkpoints  a small model by every engine and launcher: its checkpoint loaded by one process, and a
             run that another number of processes goes on with
experts      an exported Mixtral by transformers' expert parallelism; needs transformers 5.23
soak         one recipe of each kind of experts, 500 steps in bf16 and in fp16, and twice the same
all          measure, checkpoints and soak
table        the page, from results.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import torch
import transformers

import sparsecraft as sc
from benchmarks.scale.launching import ENGINES, HERE, Launch, run
from benchmarks.scale.page import write
from benchmarks.scale.subject import KINDS, converted, draw_routers, write_dense, write_rows

EXACT = ("camelidae without dropout", "upcycling")  # of which each engine has the same losses
CONTINUED = (("fsdp2", "one"), ("fsdp2", "ddp"), ("ddp", "fsdp2"), ("one", "fsdp2"))
RUNS = ("first", "again", "deterministic first", "deterministic again")
DTYPES = ("bfloat16", "float16")


LOCK = threading.Lock()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "scale")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), help="logs and results")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--commit", default="", help="of this code, for the results")
    parser.add_argument("--quick", action="store_true", help="tiny models, a few steps: a trial")
    asked = parser.parse_args()
    for folder in (asked.work, asked.out):
        folder.mkdir(parents=True, exist_ok=True)
    VERBS[asked.verb](asked)


def prepare(asked: argparse.Namespace, size: str, tokens: int, longest: int) -> list[str]:
    """The dense model and the rows on disk, and the options that name them."""
    rows = asked.work / f"{size}.jsonl"
    with LOCK:
        dense = write_dense(asked.work / size, size)
        if not rows.exists():
            write_rows(rows, tokens, longest)
    return ["--dense", str(dense), "--rows", str(rows)]


def keep(asked: argparse.Namespace, part: str, found: dict) -> None:
    """Add a part to the results."""
    with LOCK:
        _keep(asked, part, found)


def _keep(asked: argparse.Namespace, part: str, found: dict) -> None:
    path = asked.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate)}
    machine = {"gpu": gpu, "gpus": asked.gpus, "commit": asked.commit, "versions": versions}
    path.write_text(json.dumps({**results, "machine": machine, part: found}, indent=1) + "\n")


def words(**options: object) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# ------------------------------------------------------------------ parts
def profile(asked: argparse.Namespace) -> None:
    given, shape = subject_of_speed(asked, steps=11, warmup=3)
    links(asked)
    for name, engine in (("profile_1", "one"), (f"profile_{asked.gpus}", "ddp")):
        run(Launch(name, engine, [*given, *shape, "--profile"], asked.gpus), asked.out)
        print((asked.out / f"{name}.txt").read_text(), flush=True)


def subject_of_speed(asked: argparse.Namespace, steps: int, warmup: int) -> tuple[list, list]:
    """The 1B model's options, and those of a run that is left before it saves."""
    if asked.quick:
        shape = {"steps": 5, "warmup": 2, "batch": 4, "micro": 1, "length": 64, "leave-at": 5}
        return prepare(asked, "tiny", 9_000, 14), words(**shape)
    shape = {"steps": steps, "warmup": warmup, "batch": 16, "micro": 8, "length": 2048}
    return prepare(asked, "1b", 1_200_000, 350), words(**shape, **{"leave-at": steps})


def links(asked: argparse.Namespace) -> None:
    """How the GPUs are linked, and how fast they sum 1 GiB."""
    if torch.cuda.is_available():
        subprocess.run(["nvidia-smi", "topo", "-m"], check=False)
        run(Launch("links", "ddp", [], asked.gpus), asked.out, "links")


def measure(asked: argparse.Namespace) -> None:
    """The 1B model, one after the other, each with all GPUs that it uses to itself."""
    given, shape = subject_of_speed(asked, steps=23, warmup=3)
    found = {}
    for recipe, engine in itertools.product(("camelidae", "upcycling"), ENGINES[:3]):
        name = f"{recipe} {engine}"
        launch = Launch(name, engine, [*given, *shape, "--recipe", recipe], asked.gpus)
        found[name] = run(launch, asked.out)
        keep(asked, "measure", found)


def checkpoints(asked: argparse.Namespace) -> None:
    """A small model by all engines, and runs that stop at half their steps, which others go on
    with; several at once, because no clock runs."""
    given = prepare(asked, "tiny" if asked.quick else "small", 9_000, 14)
    shape = {"steps": 8, "warmup": 1, "batch": 8, "micro": 2, "length": 64, "save-every": 4}
    given += words(**shape)
    every = [(recipe, engine) for recipe in EXACT for engine in ENGINES]
    every, continued = (every[2:3], CONTINUED[:1]) if asked.quick else (every, CONTINUED)
    with ThreadPoolExecutor(2 if asked.quick else 7) as pool:
        once = [pool.submit(to_the_end, asked, given, *pair, n) for n, pair in enumerate(every)]
        twice = [pool.submit(go_on, asked, given, *pair) for pair in continued]
        done = dict(future.result() for future in (*once, *twice))
    ready = [str(asked.work / "trained" / name) for name, losses in done.items() if losses]
    away = run(Launch("reload", "one", ready), asked.out, "reload")
    keep(asked, "checkpoints", {"losses": done, "away": away})


def to_the_end(
    asked: argparse.Namespace, given: list[str], recipe: str, engine: str, number: int
) -> tuple[str, list | None]:
    name = f"{recipe} {engine}".replace(" ", "_")
    folder = asked.work / "trained" / name
    options = [*given, "--recipe", recipe, "--checkpoint", str(folder)]
    launch = Launch(f"checkpoint_{name}", engine, options, asked.gpus, port=29510 + number)
    found = run(launch, asked.out)
    return name, found and found["losses"]


def go_on(
    asked: argparse.Namespace, given: list[str], first: str, second: str
) -> tuple[str, list | None]:
    """A run that one engine begins and another ends."""
    name = f"{first}_then_{second}"
    folder = asked.work / "trained" / name
    shutil.rmtree(folder.with_name(f"{name}.training"), ignore_errors=True)
    options = [*given, "--recipe", EXACT[0], "--checkpoint", str(folder)]
    run(Launch(f"{name}_begun", first, [*options, "--leave-at", "6"], asked.gpus), asked.out)
    found = run(Launch(name, second, [*options, "--resume"], asked.gpus), asked.out)
    return name, found and found["losses"]


def experts(asked: argparse.Namespace) -> None:
    """One export in float32, for the logits, and in bfloat16, for speed and memory."""
    size = "tiny" if asked.quick else "1b"
    dense, mixtral = write_dense(asked.work / size, size), asked.work / f"{size}-mixtral"
    if not mixtral.exists():
        model = converted(dense, "upcycling", torch.device("cpu"), torch.float32)
        draw_routers(model)
        sc.export(model, "mixtral", mixtral)
    found, shape = {}, ["2", "32"] if asked.quick else ["8", "2048"]
    for dtype in ("float32", "bfloat16"):
        options = ["--model", str(mixtral), "--dtype", dtype, "--shape", *shape]
        for engine in ENGINES[:2]:
            name, processes = f"experts {dtype} {engine}", asked.gpus if engine == "ddp" else 1
            launch = Launch(name.replace(" ", "_"), engine, options, processes)
            found[name] = run(launch, asked.out, "experts")
        one, several = (
            torch.load(asked.out / f"experts_{dtype}_{engine}.logits") for engine in ENGINES[:2]
        )
        away = (one - several).abs().max() / one.abs().max()
        found[f"experts {dtype} away"] = away.item()
        print(f"{dtype}: logits of {asked.gpus} away by {away:.1e} of the largest", flush=True)
    keep(asked, "experts", found)


def soak(asked: argparse.Namespace) -> None:
    """Small models, many at once: the device has room for all of them."""
    given = prepare(asked, "tiny", 9_000, 14)
    steps, some = (6, 4) if asked.quick else (500, 100)
    kinds, dtypes = (("adapter", "split"), DTYPES[:1]) if asked.quick else (KINDS, DTYPES)
    launches = []
    for kind, dtype in itertools.product(kinds, dtypes):
        own = some if kind != "split" else some // 2
        arguments = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
        if not torch.cuda.is_available():
            arguments = {"bf16": True}  # a CPU has no scaler of float16
        for name in RUNS[:1] if asked.quick else RUNS:
            stages = 2 if kind == "split" else 1  # LTE has two, each of so many steps
            last = (steps if name == "first" else some) // stages
            shape = {"steps": last, "warmup": 1, "batch": 8, "micro": 4, "length": 64}
            options = [*given, *words(**shape), "--recipe", kind, "--dtype", dtype]
            options += ["--arguments", json.dumps(arguments), "--prints", str(own), str(last)]
            options += ["--checkpoint", str(asked.work / "soaked" / f"{kind}_{dtype}_{name}")]
            options += ["--deterministic"] if "det" in name else []
            where = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
            title, gpu = f"soak_{kind}_{dtype}_{name}".replace(" ", "_"), len(launches) % asked.gpus
            launches.append(Launch(title, "one", options, 1, gpu, environment=where))
    with ThreadPoolExecutor(2 if asked.quick else 14 * asked.gpus) as pool:
        runs = list(pool.map(lambda launch: run(launch, asked.out), launches))
    keep(asked, "soak", {launch.name: r for launch, r in zip(launches, runs, strict=True)})


def everything(asked: argparse.Namespace) -> None:
    """The parts without a clock at the same time."""
    measure(asked)
    with ThreadPoolExecutor(2) as pool:
        for part in [pool.submit(checkpoints, asked), pool.submit(soak, asked)]:
            part.result()


def table(asked: argparse.Namespace) -> None:
    write(HERE)


VERBS = {
    "profile": profile,
    "measure": measure,
    "checkpoints": checkpoints,
    "experts": experts,
    "soak": soak,
    "all": everything,
    "table": table,
}

if __name__ == "__main__":
    sys.exit(main())
