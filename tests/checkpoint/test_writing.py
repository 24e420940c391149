"""Output folders: one writer each, never replaced in silence, no name lost, nothing left behind."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

import sparsecraft as sc
from sparsecraft.checkpoint import claim, renames, replacing
from sparsecraft.checkpoint import save as saving
from sparsecraft.checkpoint.claim import bring_back, locked
from sparsecraft.checkpoint.folder import check_free
from sparsecraft.cli.main import main
from sparsecraft.errors import CheckpointError
from tests import tiny

MANIFEST = '{"format_version": 1, "recipe": {}, "tensors": ""}'


def ours(folder: Path, content: str = "old") -> Path:
    """A folder that stands for a checkpoint of ours."""
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(MANIFEST)
    (folder / "moe.safetensors").write_text(content)
    return folder


def write(out: Path, content: str = "new", overwrite: bool = True, meanwhile=lambda: None) -> None:
    with replacing.replacing(out, overwrite) as folder:
        (folder / "recipe.json").write_text(MANIFEST)
        (folder / "moe.safetensors").write_text(content)
        meanwhile()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@contextmanager
def small_files(limit: int):
    """A disk that takes `limit` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def any_system(request, monkeypatch):
    """Linux, and a system where two names cannot change places in one step."""
    if not request.param:
        monkeypatch.setattr(renames, "_renameat2", lambda *args: False)
    return request.param


# ----------------------------------------------------------------------------------- one writer


def test_a_second_process_is_told_who_writes(tmp_path):
    out = tmp_path / "new" / "out"
    code = (
        f"import sparsecraft.checkpoint.replacing as r\nr.claimed({str(out)!r}, False).__enter__()"
    )
    with locked(out):
        argv = [sys.executable, "-c", code, str(out)]
        run = subprocess.run(argv, capture_output=True, text=True)
        last = run.stderr.strip().splitlines()[-1]
        assert f"is being written by process {os.getpid()} on" in last, run.stderr
        assert "pytest" in last and "wait until that has ended" in last
        assert hidden(out.parent) == [".out.lock"]
    assert list(tmp_path.iterdir()) == [], "neither a lock nor the folders that were made for it"


@pytest.mark.parametrize("door", ["replacing", "adding", "claimed"])
def test_a_second_thread_is_refused_and_the_same_may_go_on(door, tmp_path):
    out, said = tmp_path / "out", []
    arguments = () if door == "adding" else (True,)

    def second() -> None:
        try:
            with getattr(replacing, door)(out, *arguments):
                said.append("it has begun")
        except CheckpointError as error:
            said.append(str(error))

    with replacing.claimed(out, True):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        write(out)
        write(out, "newer")
        assert hidden(tmp_path) == [".out.lock"]
    assert len(said) == 1 and "is being written by process" in said[0]
    assert (out / "moe.safetensors").read_text() == "newer" and hidden(tmp_path) == []


def test_only_the_first_of_processes_that_run_together_holds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with replacing.claimed(tmp_path / "out", False):
        assert list(tmp_path.iterdir()) == []


def test_a_lock_that_a_kill_left_holds_nobody_up(tmp_path):
    (tmp_path / ".out.lock").write_text("process 1 on another machine")
    write(tmp_path / "out")
    assert hidden(tmp_path) == []


# ----------------------------------------------------------------- what appears, and what is there


@pytest.mark.parametrize("what", ["checkpoint", "folder", "file", "link"])
def test_what_appears_meanwhile_is_left_and_what_was_made_is_kept(any_system, what, tmp_path):
    out = tmp_path / "out"

    def appear() -> None:
        if what == "checkpoint":
            ours(out, "of another")
        elif what == "folder":
            out.mkdir()
        elif what == "file":
            out.write_text("mine")
        else:
            out.symlink_to(tmp_path / "nowhere")

    with pytest.raises(CheckpointError, match=r"appeared while it was being written.*out-2"):
        write(out, overwrite=False, meanwhile=appear)
    assert (tmp_path / "out-2" / "moe.safetensors").read_text() == "new"
    assert hidden(tmp_path) == []
    assert {
        "checkpoint": lambda: (out / "moe.safetensors").read_text() == "of another",
        "folder": lambda: out.is_dir() and not any(out.iterdir()),
        "file": lambda: out.read_text() == "mine",
        "link": lambda: out.is_symlink() and not out.exists(),
    }[what]()


def test_what_appears_before_the_writing_is_left_too(any_system, tmp_path):
    """A verb holds its output from before its work, at whose end alone it is written."""
    out = tmp_path / "out"
    with replacing.claimed(out, overwrite=False):
        out.mkdir()
        with pytest.raises(CheckpointError, match=r"appeared while it was being written.*out-2"):
            write(out, overwrite=False)
    assert (tmp_path / "out-2" / "moe.safetensors").read_text() == "new"
    assert hidden(tmp_path) == [] and not any(out.iterdir())
    with (
        pytest.raises(CheckpointError, match="exists already"),
        replacing.claimed(out, overwrite=False),
    ):
        pass


def test_with_overwrite_only_what_is_ours_is_replaced(any_system, tmp_path):
    out = tmp_path / "out"
    write(out, meanwhile=lambda: ours(out))
    assert (out / "moe.safetensors").read_text() == "new"
    thesis = tmp_path / "thesis"

    def appear() -> None:
        thesis.mkdir()
        (thesis / "thesis.txt").write_text("mine")

    with pytest.raises(CheckpointError, match=r"not written by sparsecraft.*thesis-2"):
        write(thesis, meanwhile=appear)
    assert os.listdir(thesis) == ["thesis.txt"] and (thesis / "thesis.txt").read_text() == "mine"


def test_what_is_the_users_stays(any_system, tmp_path):
    out, data = ours(tmp_path / "out"), tmp_path / "data"
    data.mkdir()
    (data / "rows.jsonl").write_text("rows")
    (out / "data").symlink_to(data)
    (out / "near").symlink_to("../data/rows.jsonl")
    (out / "broken").symlink_to(tmp_path / "nowhere")
    (out / "notes").mkdir()
    (out / "notes" / "a.txt").write_text("mine")
    (out / "notes" / "linked").symlink_to(data)
    os.mkfifo(out / "notes" / "pipe")
    inode = (out / "notes" / "a.txt").stat().st_ino
    write(out)
    assert (out / "moe.safetensors").read_text() == "new"
    for link in ("data", "near", "broken", "notes/linked"):
        assert (out / link).is_symlink(), link
    assert (out / "near").read_text() == "rows" and os.listdir(data) == ["rows.jsonl"]
    assert (out / "notes" / "a.txt").stat().st_ino == inode, "no second copy"
    assert (out / "notes" / "pipe").is_fifo() and hidden(tmp_path) == []


# --------------------------------------------------------------------------------------- kills


def killed(out: Path, when: str) -> None:
    """Write in a process that is killed at a moment."""
    patches = {
        "while writing": "r.flush = kill",
        "between two renames": "n._renameat2 = lambda *a: False; r.rename_to_free = kill",
        "while the old is removed": "r._remove = kill",
        "while the old is half removed": "import shutil; shutil.rmtree = half",
    }
    code = f"""
import os, signal, pathlib
import sparsecraft.checkpoint.replacing as r, sparsecraft.checkpoint.renames as n
def kill(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
def half(path, **kwargs): next(pathlib.Path(path).iterdir()).unlink(); kill()
{patches[when]}
with r.replacing(pathlib.Path({str(out)!r}), True) as folder:
    (folder / "recipe.json").write_text({MANIFEST!r})
    (folder / "moe.safetensors").write_text("new")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


@pytest.mark.parametrize("reads", [True, False], ids=["then read", "then written"])
@pytest.mark.parametrize(
    ("when", "holds"),
    [
        ("while writing", "old"),
        ("between two renames", "old"),
        ("while the old is removed", "new"),
        ("while the old is half removed", "new"),
    ],
)
def test_a_kill_loses_no_name_and_leaves_nothing(when, holds, reads, tmp_path, caplog):
    out = ours(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    (beside := ours(tmp_path / "out.2")).joinpath("notes.txt").write_text("another's")
    killed(out, when)
    assert hidden(tmp_path)
    bring_back(out)
    assert (out / "moe.safetensors").read_text() == holds
    assert (out / "notes.txt").read_text() == "mine"
    if not reads:
        write(out, "newest")
        assert (out / "moe.safetensors").read_text() == "newest" and hidden(tmp_path) == []
        assert (out / "notes.txt").read_text() == "mine"
        assert "left by a run that was killed, was removed" in caplog.text
    assert (beside / "notes.txt").read_text() == "another's"


def test_what_another_folder_leaves_is_not_ours_to_remove(tmp_path):
    for name in (".out.2.tmp", ".out.a.b.tmp", ".out2.1.1.tmp", ".outer.partial", ".out.1.1.tmpx"):
        (tmp_path / name).mkdir()
    before = hidden(tmp_path)
    write(tmp_path / "out")
    assert hidden(tmp_path) == before


def test_a_stream_that_was_killed_while_the_old_was_removed_runs_again(tmp_path):
    base = tmp_path / "base"
    tiny.save_dense(base)
    out = tmp_path / "out"
    argv = ["convert", "upcycling", "--num-experts", "2", "--model", str(base), "--out", str(out)]
    argv += ["--stream", "--overwrite", "--no-certify"]
    assert main(argv) == 0
    wanted = (out / "moe.safetensors").read_bytes()
    shutil.copytree(out, tmp_path / ".out.partial")  # the old one, after the two changed places
    assert main(argv) == 0 and hidden(tmp_path) == []
    shutil.copytree(out, tmp_path / ".out.partial")
    assert main([*argv, "--resume"]) == 0 and hidden(tmp_path) == []
    assert (out / "moe.safetensors").read_bytes() == wanted and not (out / "progress.json").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_cleans_up_as_ctrl_c_does(number, status, tmp_path, monkeypatch, capsys):
    tiny.save_dense(tmp_path / "base")
    monkeypatch.setattr(saving, "write_settings", lambda *args: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    argv = ["convert", "mov", "--num-experts", "2", "--model", str(tmp_path / "base")]
    assert main([*argv, "--out", str(tmp_path / "a" / "out")]) == status
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# --------------------------------------------------------------------------- disks and permissions


def test_a_full_disk_is_one_sentence_for_every_verb(tmp_path, monkeypatch, capsys):
    base, lora, up = (tmp_path / name for name in ("base", "lora", "up"))
    tiny.save_dense(base)
    model = ["--model", str(base)]
    assert main(["convert", "lora", "--rank", "4", *model, "--out", str(lora)]) == 0
    assert main(["convert", "upcycling", "--num-experts", "2", *model, "--out", str(up)]) == 0
    verbs = [
        ["convert", "upcycling", "--num-experts", "4", *model],
        ["convert", "upcycling", "--num-experts", "4", *model, "--stream"],
        ["export", str(up), "--to", "mixtral"],
        ["merge", str(lora)],
    ]
    capsys.readouterr()
    for argv in verbs:
        with small_files(9_000):
            assert main([*argv, "--out", str(tmp_path / "o")]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert "could not be written (" in said[-1] and "Traceback" not in "".join(said), said
        assert not (tmp_path / "o").exists()
        assert hidden(tmp_path) == ([".o.partial"] if "--stream" in argv else [])
        shutil.rmtree(tmp_path / ".o.partial", ignore_errors=True)


def test_a_training_state_is_written_whole_or_not_at_all(tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(12))
    tiny.save_dense(tmp_path / "base")
    options = {"steps": 4, "save_every": 2, "batch_size": 2, "max_length": 32, "progress": False}

    def model():
        found = sc.hub.load_dense(str(tmp_path / "base"))
        sc.convert(found, sc.recipes.lora(rank=4), seed=1)
        return found

    sc.train(model(), rows, tmp_path / "wanted", **options)
    state = sum(t.numel() * 4 for t in model().parameters() if t.requires_grad)
    with small_files(state + 10_000), pytest.raises(CheckpointError, match="checkpoint-2 could"):
        sc.train(model(), rows, tmp_path / "out", **options)  # the optimizer holds twice as much
    stages = tmp_path / "out.training"
    assert not [*stages.rglob("checkpoint-*")] and not (tmp_path / "out").exists()
    sc.train(model(), rows, tmp_path / "out", **options)
    assert not stages.exists() and hidden(tmp_path) == []
    bits = [(tmp_path / n / "moe.safetensors").read_bytes() for n in ("wanted", "out")]
    assert bits[0] == bits[1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda at: at / ("x" * 300), "too long"),
        (lambda at: at / ("x" * 240), "too long"),
        (lambda at: at / "loop", "cannot be written"),
        (lambda at: at / "loop" / "out", "cannot be written"),
        (lambda at: at / "file" / "out", "no writable folder"),
        (lambda at: at / "dangling" / "out", ""),
        (lambda at: Path("/proc/1/out"), "cannot be written|could not be written"),
    ],
)
def test_a_place_that_takes_nothing_is_found_before_the_work(make, said, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    if not said:  # a link that leads to a folder yet to be made
        with replacing.claimed(make(tmp_path), False):
            return
    with pytest.raises(CheckpointError, match=said), replacing.claimed(make(tmp_path), False):
        pytest.fail("it has begun")


def test_a_folder_that_may_not_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    ours(tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    for overwrite, name in ((True, "out"), (False, "new")):
        with pytest.raises(CheckpointError, match="no writable folder"):
            check_free(tmp_path / name, overwrite)


def test_what_cannot_be_removed_is_said(tmp_path, monkeypatch, caplog):
    out = ours(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        write(out)
    assert (out / "moe.safetensors").read_text() == "new"
    assert "holds what was replaced and cannot be removed" in caplog.text
    write(out, "newer")
    assert "left by a run that was killed, was removed" in caplog.text and hidden(tmp_path) == []


def test_a_sweeps_files_come_together_or_not_at_all(tmp_path):
    out = tmp_path / "plots"
    out.mkdir()
    (out / "a").write_text("old")
    with pytest.raises(RuntimeError), replacing.adding(out) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (out / "a").read_text() == "old"
    with replacing.adding(out) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
    assert [(out / name).read_text() for name in "ab"] == ["new", "new"] and hidden(tmp_path) == []


def test_locks_and_leftovers_know_their_names(tmp_path):
    out = tmp_path / "a.b-c_1"
    (stale := claim.temporary(out)).mkdir()
    (tmp_path / ".a.b-c_1.7.8.old").mkdir()
    with pytest.raises(CheckpointError, match="exists"), replacing.claimed(out, False):
        pytest.fail("what was .old is not back")
    with replacing.claimed(out, True, foreign=True):
        assert not stale.exists() and out.is_dir()
