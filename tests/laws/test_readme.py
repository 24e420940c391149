"""What the README says, held against the code."""

from __future__ import annotations

import sparsecraft as sc
from tests.laws.test_house import ROOT, SOURCE

README = (ROOT / "README.md").read_text()


def test_the_readme_shows_the_tree():
    packages = sorted(p.name for p in SOURCE.iterdir() if (p / "__init__.py").is_file())
    missing = [name for name in packages if f"{name}/" not in README]
    assert not missing, f"README.md does not mention {', '.join(missing)}"


def test_the_methods_table_of_the_readme_agrees_with_the_recipes():
    from sparsecraft.recipe.words import facts

    rows = {
        cells[0].split("`")[1]: cells
        for line in README.splitlines()
        if line.startswith("| [`")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    assert set(rows) == set(sc.recipes.__all__)
    for name, (_, _, placement, experts, router, exact) in rows.items():
        recipe = sc.recipes.__dict__[name]()
        for edit in recipe.edits:
            assert {"replace": "replaces"}.get(edit.place, edit.place) in placement
        assert str(recipe.edits[0].experts.num_experts) in experts
        routed = recipe.edits[0].router
        if routed:
            assert (f"top-{routed.top_k}" if routed.top_k else routed.select) in router
        else:
            assert router == "none"
        claim = facts(recipe)["exact_at_start"]
        assert exact.startswith(claim if name != "upcycling" else "if renormalized")


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
