"""What stands beside the weights goes where the weights go, and is checked before the work."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.checkpoint.companions import check_settings, copy_companions
from sparsecraft.cli.main import main
from sparsecraft.conversion.merging.write import write_merged
from sparsecraft.conversion.stream import convert_files
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.errors import CheckpointError
from tests import tiny

COPIES = sc.recipes.upcycling(num_experts=2)
ADAPTERS = sc.recipes.camelidae(num_experts=2, adapter_dim=4, lora_rank=2)
FLAGS = {"eos_token_id": 2, "do_sample": False, "temperature": 0.9, "top_p": 0.6}
OTHERS = {
    "LICENSE": "Apache License\nVersion 2",
    "NOTICE.txt": "who made it",
    "USE_POLICY.md": "what it is for",
    "added_tokens.json": "{}",
    "special_tokens_map.json": "{}",
    "preprocessor_config.json": "{}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


def base(tmp_path, **generation):
    folder = tmp_path / "base"
    tiny.save_dense(folder)
    for name, text in OTHERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "generation_config.json").write_text(json.dumps(generation or FLAGS))
    return folder


def trained(model, tmp_path, **options):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(4))
    options = {"steps": 1, "max_length": 64, "progress": False} | options
    sc.train(model, rows, tmp_path / "trained", **options)
    return tmp_path / "trained"


def test_all_of_it_travels(tmp_path):
    folder = base(tmp_path)
    convert_files(folder, COPIES, tmp_path / "streamed")
    model = hub.load_dense(folder)
    sc.convert(model, COPIES)
    sc.save(model, tmp_path / "saved")
    sc.export(sc.load(tmp_path / "saved"), "mixtral", tmp_path / "exported")
    for out in ("streamed", "saved", "exported"):
        for name in [*OTHERS, "generation_config.json", "tokenizer.json", "chat_template.jinja"]:
            assert (tmp_path / out / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("changed", [False, True])
def test_sampling_flags_beside_greedy_decoding_do_not_end_a_run(changed, tmp_path, caplog):
    model = hub.load_dense(base(tmp_path))
    if changed:
        model.generation_config.max_new_tokens = 64
    sc.convert(model, COPIES)
    with caplog.at_level(logging.WARNING, logger="sparsecraft"):
        out = trained(model, tmp_path)
    assert "temperature, top_p" in caplog.text
    sc.export(sc.load(out), "mixtral", tmp_path / "exported")
    merged = sc.load(out)
    report = sc.merge(merged, "average")
    write_merged(merged, tmp_path / "merged", report, out, False)
    for folder in (out, tmp_path / "exported", tmp_path / "merged"):
        found = json.loads((folder / "generation_config.json").read_text())
        assert found["temperature"] == 0.9 and found["top_p"] == 0.6
        assert found.get("max_new_tokens") == (64 if changed else None)
        assert transformers.GenerationConfig.from_pretrained(folder).temperature == 0.9


def test_what_cannot_be_saved_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):
    folder = base(tmp_path)
    model = hub.load_dense(folder)
    sc.convert(model, ADAPTERS)
    model.config.note = object()
    with pytest.raises(CheckpointError, match="configuration could not be saved"):
        trained(model, tmp_path)
    del model.config.note
    model.generation_config.note = object()
    with pytest.raises(CheckpointError, match="generation settings"):
        trained(model, tmp_path)
    del model.generation_config.note
    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(type(tokenizer), "save_pretrained", None)
    with pytest.raises(CheckpointError, match="tokenizer"):
        trained(model, tmp_path, tokenizer=tokenizer)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("trained")]
    (folder / "generation_config.json").write_text('{"max_new_tokens": -1}')
    out = str(tmp_path / "out")
    command = ["convert", "upcycling", "--model", str(folder), "--out", out, "--no-progress"]
    for extra in ([], ["--stream"]):
        assert main([*command, *extra]) == 1
        assert "max_new_tokens" in capsys.readouterr().err


def test_a_configuration_that_no_class_reads_is_refused_before_the_first_step():
    model = tiny.llama()
    model.config.__class__ = type("Own", (transformers.LlamaConfig,), {"model_type": "own"})
    with pytest.raises(CheckpointError, match=r"configuration could not be saved with it: .*own"):
        check_settings(model)


def test_edits_survive_train_save_load_and_export(tmp_path):
    folder = base(tmp_path, eos_token_id=2, do_sample=True, top_k=5)
    tokenizer, model = load_tokenizer(folder), hub.load_dense(folder)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.chat_template = tiny.CHATML + "\n"
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.top_k = 11
    sc.convert(model, COPIES)
    out = trained(model, tmp_path, tokenizer=tokenizer)
    assert not (out / "additional_chat_templates").exists()  # of the base's tokenizer
    loaded = sc.load(out)
    ids = torch.arange(3, 20)[None]
    model.eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    sc.export(loaded, "mixtral", tmp_path / "exported")
    sc.save(loaded, tmp_path / "again")
    for place in (out, tmp_path / "exported", tmp_path / "again"):
        found = load_tokenizer(place)
        assert found.chat_template == tokenizer.chat_template
        assert found.get_vocab() == tokenizer.get_vocab()
        assert transformers.GenerationConfig.from_pretrained(place).top_k == 11
        assert (place / "LICENSE").is_file() and (place / "NOTICE.txt").is_file()


def test_a_template_that_was_taken_away_does_not_come_back(tmp_path):
    folder = base(tmp_path)
    tokenizer, model = load_tokenizer(folder), hub.load_dense(folder)
    tokenizer.chat_template = None
    sc.convert(model, ADAPTERS)
    sc.save(model, tmp_path / "out", tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "out").chat_template is None
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_a_processor_takes_the_place_of_the_bases(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    settings = {"do_resize": True, "size": {"height": 8, "width": 8}}
    transformers.ViTImageProcessor(**settings).save_pretrained(tmp_path / "vit")
    model = hub.load_dense(tmp_path / "vit")
    sc.convert(model, COPIES)
    sc.save(model, tmp_path / "own")
    name = "preprocessor_config.json"
    assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "vit" / name).read_bytes()
    try:
        transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit")
    except ImportError as error:  # that of transformers 5.17 reads none without torchvision
        pytest.skip(f"this version of transformers reads no image processor here: {error}")
    given = transformers.ViTImageProcessor(**settings | {"do_normalize": False})
    check_settings(model, given)
    sc.save(model, tmp_path / "given", tokenizer=given)
    assert json.loads((tmp_path / "given" / name).read_text())["do_normalize"] is False


def test_a_link_to_another_file_outside_does_not_travel(tmp_path):
    secret = tmp_path / "key"
    secret.write_text("secret")
    tiny.save_dense(tmp_path / "base")
    (tmp_path / "base" / "LICENSE").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*key"):
        copy_companions(tmp_path / "base", tmp_path)


def test_links_to_files_of_the_same_name_and_of_the_hubs_cache_travel(tmp_path):
    tiny.save_dense(tmp_path / "shared")
    folder = tmp_path / "models--a--b" / "snapshots" / "123"
    blobs, out = tmp_path / "models--a--b" / "blobs", tmp_path / "out"
    for made in (folder, blobs, out, tmp_path / "linked"):
        made.mkdir(parents=True)
    for number, path in enumerate((tmp_path / "shared").iterdir()):
        (tmp_path / "linked" / path.name).symlink_to(path)
        shutil.copy(path, blobs / f"{number}")
        (folder / path.name).symlink_to(blobs / f"{number}")
    for source in (tmp_path / "linked", folder):
        copy_companions(source, out)
        assert (out / "tokenizer.json").is_file() and not (out / "tokenizer.json").is_symlink()
        shutil.rmtree(out)
        out.mkdir()
