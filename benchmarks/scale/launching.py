"""Start a program of this folder in one process or several, by torchrun or accelerate launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).parent
# What accelerate's configuration fsdp2.yaml says, for torchrun.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ENGINES = ("one", "ddp", "fsdp2", "accelerate ddp", "accelerate fsdp2")


@dataclass(frozen=True)
class Launch:
    """One program to start.

    Attributes:
        name: of its files in `out`.
        engine: one of ENGINES.
        gpu: where one process runs.
        environment: beside what all of them have.
    """

    name: str
    engine: str
    options: list[str]
    processes: int = 1
    gpu: int = 0
    port: int = 29500
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, program: str) -> list[str]:
        python = [sys.executable, "-m"]
        match self.engine.split():
            case ["one"]:
                return [*python, program]
            case ["accelerate", kind]:
                where = ["--config_file", str(HERE / f"{kind}.yaml"), "--num_processes"]
                where += [str(self.processes), "--main_process_port", str(self.port)]
                where += [] if torch.cuda.is_available() or kind != "ddp" else ["--cpu"]
                return [*python, "accelerate.commands.launch", *where, "-m", program]
        workers = f"--nproc-per-node={self.processes}"
        return [*python, "torch.distributed.run", "--standalone", workers, "-m", program]

    def variables(self) -> dict[str, str]:
        gpus = range(self.processes) if self.engine != "one" else [self.gpu]
        return {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)) if torch.cuda.is_available() else "",
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
            **(FSDP2 if self.engine == "fsdp2" else {}),
            **self.environment,
        }


def run(launch: Launch, out: Path, program: str = "worker", limit: int = 280) -> dict | None:
    """What a program has written; None where it failed, which is said."""
    found, start = out / f"{launch.name}.json", time.perf_counter()
    found.unlink(missing_ok=True)
    command = [*launch.command(f"benchmarks.scale.{program}"), "--out", str(found)]
    try:
        done = subprocess.run(
            [*command, *launch.options],
            cwd=ROOT,
            env=launch.variables(),
            capture_output=True,
            text=True,
            timeout=limit,
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, text = "none in time", str(error.stderr)
    (out / f"{launch.name}.log").write_text(text)
    seconds = time.perf_counter() - start
    if code or not found.exists():
        print(f"{launch.name} FAILED ({code}) in {seconds:.0f} s: {text[-1500:]}", flush=True)
        return None
    result = json.loads(found.read_text()) | {"said": said(text)}
    shown = {key: value for key, value in result.items() if key not in ("losses", "strides")}
    print(f"{launch.name} {seconds:.0f} s: {json.dumps(shown)}"[:600], flush=True)
    return result


def said(text: str) -> list[str]:
    """The lines of a log that tell of gradients that are copied or looked for."""
    words = ("strides", "find_unused_parameters", "deterministic")
    lines = [line.strip()[:200] for line in text.splitlines()]
    return sorted({line for line in lines if any(word in line for word in words)})[:6]
