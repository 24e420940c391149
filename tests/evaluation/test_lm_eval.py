"""Tasks of lm-eval: known names, and errors of its own."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.lm_eval import check_tasks, run_lm_eval
from tests import tiny

KNOWN = ["arc_easy", "arc_challenge", "hellaswag"]


@pytest.fixture
def lm_eval(monkeypatch):
    """What of lm-eval is called, without its fourteen thousand tasks."""
    modules = {
        name: ModuleType(name)
        for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    }
    modules["lm_eval.tasks"].TaskManager = lambda: SimpleNamespace(
        all_tasks=KNOWN, match_tasks=lambda names: [n for n in names if n in KNOWN]
    )
    modules["lm_eval.models.huggingface"].HFLM = SimpleNamespace
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["lm_eval"]


def test_an_unknown_task_names_the_nearest(lm_eval):
    check_tasks(KNOWN)
    with pytest.raises(DataError, match=r"no task 'arc_eazy'.*arc_easy"):
        check_tasks(["hellaswag", "arc_eazy"])


def test_a_file_of_a_task_is_one(lm_eval, tmp_path):
    (tmp_path / "own.yaml").write_text("task: own\n")
    check_tasks([str(tmp_path / "own.yaml")])


def test_an_error_of_a_task_is_ours(lm_eval):
    def fail(**kwargs):
        raise ConnectionError("no network\nand more")

    lm_eval.simple_evaluate = fail
    with pytest.raises(DataError, match=r"could not run arc_easy \(ConnectionError: no network\)"):
        run_lm_eval(tiny.llama(), tiny.tokenizer(), ["arc_easy"], None)


def test_a_metric_that_does_not_apply_is_none(lm_eval):
    lm_eval.simple_evaluate = lambda **kwargs: {
        "results": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": float("nan"), "alias": "a"}}
    }
    found = run_lm_eval(tiny.llama(), tiny.tokenizer(), ["arc_easy"], 3)
    assert found == {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": None, "alias": "a"}}


def test_without_lm_eval_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    check_tasks([])
    with pytest.raises(SparsecraftError, match="pip install"):
        check_tasks(["arc_easy"])
