"""What the README says, held against the code; its tables are those of test_docs.py."""

from __future__ import annotations

import re

import sparsecraft as sc
from tests.laws.test_house import ROOT, SOURCE

README = (ROOT / "README.md").read_text()


def test_every_recipe_has_a_row():
    rows = re.findall(r"^\| \[`(\w+)`\]\(docs/methods/\1\.md\)", README, re.MULTILINE)
    assert sorted(rows) == sorted(sc.recipes.__all__)


def test_every_package_has_a_row():
    packages = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    assert set(re.findall(r"^\| \[`(\w+)/`\]", README, re.MULTILINE)) == packages


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    from tests import tiny

    block = README.split("```python\n")[1].split("```")[0]
    base = tiny.save_dense(tmp_path / "dense")
    for name in ("math", "code"):
        tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.chat_rows())
    monkeypatch.chdir(tmp_path)
    block = block.replace('"smollm2"', repr(base)).replace("steps=100", "steps=1, max_length=64")
    names: dict = {}
    exec(block, names)
    assert names["model"].sparsecraft.recipe.name == "camelidae"
