"""One GPU against several; each verb is one part that takes under three minutes.

profile   where the time of a step goes, with one process and with all
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.scale.subject import write_dense, write_rows

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "scale")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps: a trial")
    asked = parser.parse_args()
    for folder in (asked.work, asked.out):
        folder.mkdir(parents=True, exist_ok=True)
    VERBS[asked.verb](asked)


def prepare(asked: argparse.Namespace) -> list[str]:
    """The dense model and the rows on disk, and the options that name them."""
    size = "tiny" if asked.quick else "1b"
    dense = write_dense(asked.work / size, size)
    rows = write_rows(
        asked.work / f"{size}.jsonl", *((9_000, 14) if asked.quick else (1_200_000, 350))
    )
    return ["--dense", str(dense), "--rows", str(rows)]


def settings(asked: argparse.Namespace, **changes: int) -> list[str]:
    large = {"steps": 24, "warmup": 4, "batch": 16, "micro": 4, "length": 2048}
    small = {"steps": 7, "warmup": 2, "batch": 4, "micro": 1, "length": 64}
    chosen = (small if asked.quick else large | changes).items()
    return [word for name, value in chosen for word in (f"--{name}", str(value))]


def launch(asked: argparse.Namespace, name: str, processes: int, options: list[str]) -> dict | None:
    """Run a worker in so many processes; None where it failed, which is said."""
    out = asked.out / f"{name}.json"
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["benchmarks.scale.worker", "--out", str(out), *options]
    visible = ",".join(map(str, range(processes)))
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": visible if torch.cuda.is_available() else "",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    start = time.perf_counter()
    print(f"== {name}: {' '.join(options)}", flush=True)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    (asked.out / f"{name}.log").write_text(done.stdout + done.stderr)
    print(f"{done.stdout}\n{name}: {time.perf_counter() - start:.0f} s", flush=True)
    for line in done.stderr.splitlines():
        if "stride" in line or "find_unused" in line:
            print(line[:300])
    if done.returncode:
        print(f"{name} FAILED: {done.stderr[-2500:]}", flush=True)
        return None
    return json.loads(out.read_text())


def profile(asked: argparse.Namespace) -> None:
    given = prepare(asked)
    machine(asked)
    short = settings(asked, steps=11, warmup=3)
    for name, processes, options in (
        ("profile_1", 1, ["--profile"]),
        (f"profile_{asked.gpus}", asked.gpus, ["--profile"]),
        ("plain_1", 1, []),
        (f"plain_{asked.gpus}", asked.gpus, []),
        (f"no_find_{asked.gpus}", asked.gpus, ["--ddp", '{"ddp_find_unused_parameters": false}']),
    ):
        launch(asked, name, processes, [*given, *short, *options])


def machine(asked: argparse.Namespace) -> None:
    """How the GPUs are linked, and how fast they sum 1 GiB."""
    if not torch.cuda.is_available():
        return
    subprocess.run(["nvidia-smi", "topo", "-m"], check=False)
    gpus = range(torch.cuda.device_count())
    peers = {
        f"{a}{b}": torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a < b
    }
    print("peer access", peers, flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={asked.gpus}", "-m", "benchmarks.scale.links"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=120)


VERBS = {"profile": profile}

if __name__ == "__main__":
    main()
