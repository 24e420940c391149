"""lm-eval's own command line on our folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import sparsecraft as sc
from tests import tiny
from tests.clients.starting import RECIPES, checkpoint, converted

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

TASK = """task: tiny_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "say"
doc_to_choice: ["{words}"]
doc_to_target: answer
metric_list:
  - metric: acc
"""
# What docs/guides/evaluation.md gives: lm-eval's command line, which does not import us.
ONE_LINER = "import sparsecraft; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


def task(folder) -> None:
    rows = tiny.write_rows(folder / "rows.jsonl", [{"answer": i % 10} for i in range(20)])
    text = TASK.format(rows=rows, words='", "'.join(tiny.WORDS))
    (folder / "tiny_words.yaml").write_text(text)


def command_line(folder, model: str) -> float:
    """The accuracy by the one-liner."""
    arguments = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    arguments += ["--tasks", "tiny_words", "--include_path", folder, "--device", "cpu"]
    arguments += ["--batch_size", "4", "--output_path", folder / "results"]
    run = [sys.executable, "-c", ONE_LINER, *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = next((folder / "results").rglob("results*.json"))
    return json.loads(found.read_text())["results"]["tiny_words"]["acc,none"]


def in_python(folder, model) -> float:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        HFLM(model, tokenizer=tiny.tokenizer(), device="cpu", batch_size=4),
        tasks=["tiny_words"],
        task_manager=TaskManager(include_path=str(folder)),
    )
    return results["results"]["tiny_words"]["acc,none"]


CASES = [(recipe, False) for recipe in RECIPES] + [("moefication", True)]


@pytest.mark.parametrize(("recipe", "standalone"), CASES)
def test_its_command_line_evaluates_the_converted_model(recipe, standalone, tmp_path):
    task(tmp_path)
    if standalone:
        folder = str(sc.save(converted(tmp_path, recipe), tmp_path / "whole", standalone=True))
        tiny.tokenizer().save_pretrained(folder)
    else:
        folder = checkpoint(tmp_path, recipe)
    assert command_line(tmp_path, folder) == in_python(tmp_path, sc.load(folder))
