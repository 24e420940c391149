"""`make crash`: kill every verb that writes, run it again, and look at what there is.

    python -m tests.checkpoint.crash [--kills N] [--seed S] [--only VERB ...]

Half of the kills come at an event of the file system (a file is opened for writing, renamed,
linked, removed, a folder made), chosen evenly over all that the verb causes; the others at random
moments. After each: no input has changed; a folder that was there has its name, and is the old or
the new one, with the user's own file. After the same command has run once more: the bits of a run
that was not killed, and nothing hidden beside them.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

EVENTS = ("open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir")
EVENTS += ("ctypes.dlsym", "shutil.rmtree", "shutil.copyfile")
WEIGHTS = ("*.safetensors", "sweep.md")


@dataclass
class Verb:
    """A command that writes `out`.

    Attributes:
        argv: without `--out` and `--overwrite`.
        out: what it is called in the folder of a try.
        earlier: a folder, of which a copy is the output that it overwrites or changes in place.
        resumes: goes on with `--resume`, if `left` of the try's folder says that something is.
        in_place: has no `--out`.
    """

    argv: list[str]
    earlier: str = ""
    out: str = "out"
    resumes: str = ""
    in_place: bool = False
    overwrite: bool = False
    events: int = 0
    seconds: float = 0.0
    wanted: dict[str, bytes] = field(default_factory=dict)

    def words(self, place: Path, again: bool = False) -> list[str]:
        out = place / self.out
        words = [word.replace("OUT", str(out)) for word in self.argv]
        words += [] if self.in_place else ["--out", str(out)]
        words += ["--overwrite"] if self.overwrite else []
        left = self.resumes and [*place.glob(self.resumes)]
        return words + (["--resume"] if again and left else [])


def child(words: list[str], at: int | None, said: Path) -> int:
    """Run a command in a fork of this process, killed at an event; the process."""
    pid = os.fork()
    if pid:
        return pid
    out = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    status = 1
    try:
        from sparsecraft.cli.main import main

        count, place = 0, str(said.parent)

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event not in EVENTS or (event == "open" and not _writes(args)):
                return
            if event != "ctypes.dlsym" and not str(args[0]).startswith(place):
                return
            if event == "ctypes.dlsym" and args[1] != "renameat2":
                return
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = main(words)
        print(f"events: {count}")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _writes(args: tuple) -> bool:
    flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def run(words: list[str], said: Path, at: int | None = None, after: float | None = None) -> int:
    pid = child(words, at, said)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def bits(folder: Path) -> dict[str, bytes]:
    """What a run must give again: its tensors, and the user's own file. Reports hold times."""
    names = {p for pattern in (*WEIGHTS, "mine.txt") for p in folder.glob(pattern)}
    return {p.name: b"" if p.suffix == ".md" else p.read_bytes() for p in sorted(names)}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def verbs(ground: Path) -> dict[str, Verb]:
    """Every verb that writes, with and without something to overwrite; their inputs are made."""
    from sparsecraft.cli.main import main
    from tests import tiny

    at = {name: str(ground / name) for name in ("base", "up", "lora", "split", "mix", "camelid")}
    tiny.save_dense(ground / "base")
    rows = str(tiny.write_rows(ground / "rows.jsonl", tiny.chat_rows(24)))
    model = ["--model", at["base"]]
    upcycling = ["convert", "upcycling", "--num-experts", "4", *model]
    training = ["--data", rows, "--steps", "4", "--save-every", "1", "--batch-size", "2"]
    training += ["--max-length", "32", "--no-progress"]
    made = [
        [*upcycling, "--out", at["up"]],
        ["convert", "lora", "--rank", "4", *model, "--out", at["lora"]],
        ["convert", "camelidae", "--num-experts", "2", "--adapter-dim", "8", *model],
        ["export", at["up"], "--to", "mixtral", "--out", at["mix"]],
        ["convert", "gmoefication", "--num-experts", "4", *model, "--out", str(ground / "g")],
        [
            *("train", str(ground / "g"), "--data", rows, "--fit-tokens", "256"),
            "--out",
            at["split"],
        ],
    ]
    made[2] += ["--out", at["camelid"]]
    for words in made:
        assert main(words) == 0, words
    measured = ["--data", rows, "--max-tokens", "128"]
    plain = {
        "convert": Verb(upcycling),
        "convert --standalone": Verb([*upcycling, "--standalone", "--shard-size", "0.0001"]),
        "convert --stream": Verb(
            [*upcycling, "--stream", "--shard-size", "0.0001", "--no-progress"],
            resumes=".out.partial/progress.json",
        ),
        "train": Verb(
            ["train", at["camelid"], *training],
            resumes="out.training/*/checkpoint-*/trainer_state.json",
        ),
        "extend": Verb(
            [
                "extend",
                at["up"],
                "--expert",
                at["base"],
                "--no-train",
                "--data",
                rows,
                "--rows",
                "reset",
            ]
        ),
        "remove": Verb(["remove", at["up"], "--expert", "1"]),
        "merge": Verb(["merge", at["lora"]]),
        "export": Verb(["export", at["up"], "--to", "mixtral"]),
        "import": Verb(["import", at["mix"]]),
        "calibrate": Verb(["calibrate", at["split"], "--target-flops", "0.8", *measured]),
        "sweep": Verb(["sweep", at["split"], "--shares", "0.5", "--no-latency", *measured]),
    }
    found = dict(plain)
    for name, verb in plain.items():
        if name != "sweep":
            earlier = at["mix"] if name == "export" else at["lora"]
            found[f"{name} --overwrite"] = Verb(
                verb.argv, earlier, resumes=verb.resumes, overwrite=True
            )
    found["calibrate in place"] = Verb(
        ["calibrate", "OUT", "--target-flops", "0.8", *measured],
        at["split"],
        in_place=True,
    )
    return found


def prepare(verb: Verb, place: Path) -> None:
    """The folder of a try, with the output of an earlier run and a file of the user's in it."""
    place.mkdir()
    if verb.earlier:
        shutil.copytree(verb.earlier, place / verb.out)
        (place / verb.out / "mine.txt").write_text("mine")


def measure(verb: Verb, place: Path) -> None:
    """Run it to its end, counting what it does."""
    prepare(verb, place)
    start, said = time.monotonic(), place / "said.txt"
    status = run(verb.words(place), said)
    assert status == 0, said.read_text()
    verb.seconds = time.monotonic() - start
    verb.events = int(said.read_text().rsplit("events: ", 1)[1])
    verb.wanted = bits(place / verb.out)
    shutil.rmtree(place)


def kill(verb: Verb, place: Path, at: int | None, after: float | None) -> list[str]:
    """One kill, and another run; what is wrong then."""
    prepare(verb, place)
    out, said, wrong = place / verb.out, place / "said.txt", []
    before = bits(out) if out.exists() else None
    status = run(verb.words(place), said, at, after)
    if status not in (0, -signal.SIGKILL):
        wrong.append(f"the killed run ended with {status}: {said.read_text()[-300:]}")
    if before is not None and (not out.exists() or bits(out) not in (before, verb.wanted)):
        wrong.append("the name is lost, or holds neither the old nor the new")
    done = out.exists() and before is None
    status = run(verb.words(place, again=True), said)
    if done and status == 1 and "exists already" in said.read_text():
        status = 0
    if status:
        wrong.append(f"the next run ended with {status}: {said.read_text()[-300:]}")
    elif bits(out) != verb.wanted:
        wrong.append("other bits")
    left = [p.name for p in place.iterdir() if p.name not in (verb.out, "said.txt")]
    if left and not (done and left == ["out.training"]):
        wrong.append(f"left: {left}")
    shutil.rmtree(place)
    return wrong


def tried(job: tuple[str, Verb, Path, Path, int, int]) -> tuple[str, int, int, list[str]]:
    """All kills of one verb: its name, how many, over how many events, and what was wrong."""
    name, verb, ground, scratch, kills, seed = job
    draw, inputs, faults = random.Random(f"{seed} {name}"), tree(ground), []
    place = scratch / name.replace(" ", "-")
    measure(verb, place)
    for number in range(kills):
        at = after = None
        if number % 2:
            after = draw.uniform(0, verb.seconds)
        else:
            at = 1 + (number * verb.events) // kills
        wrong = kill(verb, place, at, after)
        if tree(ground) != inputs:
            wrong.append("an input has changed")
            inputs = tree(ground)
        when = f"event {at} of {verb.events}" if at else f"{after:.2f} s"
        faults += [f"{name}, killed at {when}: {fault}" for fault in wrong]
    return name, kills, verb.events, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="names of verbs")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    total, faults = 0, []
    with tempfile.TemporaryDirectory() as scratch:
        ground = Path(scratch, "inputs")
        ground.mkdir()
        found = {n: v for n, v in verbs(ground).items() if not options.only or n in options.only}
        kills = -(-options.kills // len(found))
        jobs = [(n, v, ground, Path(scratch), kills, options.seed) for n, v in found.items()]
        with get_context("fork").Pool(options.processes) as pool:
            for name, count, events, wrong in pool.imap_unordered(tried, jobs):
                print(f"{name}: {count} kills over {events} events", flush=True)
                total, faults = total + count, faults + wrong
    print(f"{total} kills, {len(faults)} faults", *faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
