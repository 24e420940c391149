"""What a user edits is accepted by one command, once it loads, and never looks measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import sparsecraft as sc
from sparsecraft.checkpoint.edits import accept_edits
from sparsecraft.cli.main import main
from sparsecraft.errors import CheckpointError
from sparsecraft.evaluation.report import describe
from tests.checkpoint import folders
from tests.checkpoint.folders import edit
from tests.golden.test_format1 import FORMAT1


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shelf")
    folders.checkpoint(root), folders.sharded(root), folders.adapter(root, "MOLORA")
    return root


@pytest.fixture
def copy(shelf, tmp_path):
    return lambda kind: shutil.copytree(shelf / kind, tmp_path / "copy")


def change(folder: Path, name: str, add: float) -> None:
    path = folder / name
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + add}, path, metadata={"format": "pt"})


def test_every_edit_is_listed_accepted_and_remembered(copy, capsys):
    folder = copy("checkpoint")
    edit(folder / "generation_config.json", lambda data: data.update(temperature=0.5))
    edit(folder / "recipe.json", lambda data: data["recipe"].update(title="Mine"))
    edit(folder / "config.json", lambda data: data["base_config"].update(rms_norm_eps=0.5))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "added_tokens.json").write_text("{}")
    change(folder, "moe.safetensors", 0.5)
    with pytest.raises(CheckpointError, match="accept"):
        sc.load(folder)
    assert main(["inspect", str(folder), "--accept-edits"]) == 0
    said = capsys.readouterr().out
    names = ("added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json",
             "moe.safetensors", "recipe.json")  # fmt: skip
    for name in names:
        assert f"Accepted: {name} " in said
    assert "temperature from 0.9 to 0.5" in said, "the base's own file says what it was"
    model = sc.load(folder)
    assert model.config.rms_norm_eps == 0.5 and model.generation_config.temperature == 0.5
    assert model.sparsecraft.recipe.title == "Mine"
    assert model.sparsecraft.report["edited"] == sorted(names)
    text = "\n".join(describe(folder))
    assert f"Edited by hand after it was written, and accepted: {', '.join(names)}." in text
    assert "before config.json, moe.safetensors, recipe.json was edited" in text
    assert accept_edits(folder) == {}
    assert main(["inspect", str(folder), "--accept-edits"]) == 0
    assert "Nothing was edited" in capsys.readouterr().out


def test_an_edited_certificate_never_looks_measured(copy, tmp_path):
    folder = copy("checkpoint")
    edit(folder / "report.json", lambda r: r["conversion"]["certificate"].update(max_difference=0))
    with pytest.raises(CheckpointError, match=r"report\.json has changed"):
        describe(folder)
    assert "report.json" in accept_edits(folder)
    again = sc.save(sc.load(folder), tmp_path / "again")
    for place in (folder, again):
        text = "\n".join(describe(place))
        assert "what was measured is not known" in text and "report.json" in text
        assert "measured max" not in text
        assert (place / "README.md").read_text().count("report.json was edited by hand") == (
            place != folder
        )
    edit(again / "report.json", lambda report: report.pop("edited"))
    assert "report.json" in accept_edits(again)
    assert "measured max" not in "\n".join(describe(again))


UNREADABLE = {
    "a recipe that says nonsense": lambda f: edit(
        f / "recipe.json", lambda data: data["recipe"].update(nonsense=1)
    ),
    "no recipe": lambda f: (f / "recipe.json").write_text("{"),
    "an impossible recipe": lambda f: edit(
        f / "recipe.json",
        lambda data: data["recipe"]["edits"][0]["experts"].update(num_experts=3),
    ),
    "another base": lambda f: edit(
        f / "recipe.json", lambda data: data["base"].update(fingerprint="xxh3_128:0")
    ),
    "weights that are no numbers": lambda f: change(f, "moe.safetensors", float("nan")),
    "weights cut short": lambda f: (f / "moe.safetensors").write_bytes(b"short"),
    "a tensor less": lambda f: save_file(
        dict(list(load_file(f / "moe.safetensors").items())[1:]), f / "moe.safetensors"
    ),
    "a broken tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    "broken settings": lambda f: (f / "generation_config.json").write_text("{"),
    "an impossible configuration": lambda f: edit(
        f / "config.json", lambda data: data["base_config"].update(hidden_size=30)
    ),
    "a report that is none": lambda f: (f / "report.json").write_text("[]"),
    "a report without a log": lambda f: edit(
        f / "report.json", lambda report: report.update(training=["none"])
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_loaded_is_not_accepted(what, copy):
    folder = copy("checkpoint")
    UNREADABLE[what](folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"were not accepted: .") as caught:
        accept_edits(folder)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(sc.SparsecraftError):
        sc.load(folder)


def test_of_several_files_the_one_that_was_edited_is_named(copy):
    folder = copy("sharded")
    name = "moe-00002-of-00005.safetensors"
    change(folder, name, 0.25)
    with pytest.raises(CheckpointError, match=name):
        sc.load(folder)
    assert list(accept_edits(folder)) == [name]
    assert sc.load(folder)
    change(folder, name, 0.25)
    with pytest.raises(CheckpointError, match=name):
        sc.load(folder)


def test_a_peft_folder_and_its_export_are_accepted(copy, shelf):
    folder = copy("MOLORA")
    wanted = folders.logits(sc.load(folder))
    change(folder, "adapter_model.safetensors", 0.5)
    edit(folder / "adapter_config.json", lambda config: config.update(inference_mode=False))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert list(accept_edits(folder)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    ]
    found = folders.logits(sc.load(folder))
    dense = sc.hub.load_dense(folders.base(shelf))
    assert not torch.equal(found, wanted)
    assert torch.equal(folders.logits(PeftModel.from_pretrained(dense, folder)), found)
    change(folder, "adapter_model.safetensors", float("nan"))
    with pytest.raises(CheckpointError, match="not accepted"):
        accept_edits(folder)


def test_an_export_that_was_edited_is_imported_and_named(shelf, tmp_path, caplog):
    model = folders.converted(shelf, folders.RECIPES.upcycling(num_experts=2))
    sc.export(model, "mixtral", tmp_path / "mixtral")
    assert sc.import_moe(tmp_path / "mixtral") and not caplog.text
    change(tmp_path / "mixtral", "model.safetensors", 0.1)
    sc.import_moe(tmp_path / "mixtral")
    assert "model.safetensors has changed" in caplog.text
    assert list(accept_edits(tmp_path / "mixtral")) == ["model.safetensors"]
    caplog.clear()
    assert sc.import_moe(tmp_path / "mixtral") and not caplog.text
    record = json.loads((tmp_path / "mixtral" / "sparsecraft_export.json").read_text())
    assert record["edited"] == ["model.safetensors"]
    change(tmp_path / "mixtral", "model.safetensors", float("inf"))
    with pytest.raises(CheckpointError, match="not accepted"):
        accept_edits(tmp_path / "mixtral")


def test_a_folder_that_is_not_the_users_to_write_is_one_sentence(copy, tmp_path, monkeypatch):
    folder = copy("checkpoint")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    commit = tmp_path / "hub" / "models--user--moe" / "snapshots" / "0123"
    commit.parent.mkdir(parents=True)
    cached = folder.rename(commit)
    with pytest.raises(CheckpointError, match=r"hub's cache.*copy the folder"):
        accept_edits(cached)
    mine = shutil.copytree(cached, tmp_path / "mine")
    monkeypatch.setattr("os.access", lambda *args: False)  # root may write anywhere
    with pytest.raises(CheckpointError, match="cannot be written; copy it"):
        accept_edits(mine)
    monkeypatch.undo()
    assert accept_edits(mine)
    with pytest.raises(CheckpointError, match="no checkpoint, PEFT folder or export"):
        accept_edits(tmp_path)


def test_an_older_folder_has_a_record_once_an_edit_is_accepted(tmp_path):
    folder = shutil.copytree(FORMAT1 / "checkpoints" / "cmoe_trained", tmp_path / "old")
    edit(folder / "recipe.json", lambda data: data["recipe"].update(title="Mine"))
    assert list(accept_edits(folder)) == ["recipe.json"]
    assert sc.load(folder).sparsecraft.recipe.title == "Mine"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        sc.load(folder)
