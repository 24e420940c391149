"""A folder is read by one rule, transformers', whatever else lies in it."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sparsecraft as sc
from sparsecraft.checkpoint.jsonfile import json_digest
from sparsecraft.conversion.stream import convert_files
from sparsecraft.dense import hub
from sparsecraft.dense.digests import combine, digest
from sparsecraft.dense.origin import Origin
from sparsecraft.errors import CheckpointError, HubError, SparsecraftError
from tests import tiny

IDS = torch.arange(3, 43)[None]
ADAPTERS = sc.recipes.camelidae(num_experts=2, adapter_dim=4, lora_rank=2)
COPIES = sc.recipes.upcycling(num_experts=2)
BTX = sc.recipes.btx(2)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Of a tiny Llama, all of them far from each other's seeds."""
    tensors = tiny.llama().state_dict()
    torch.manual_seed(seed)
    tensors = {
        n: t + 0.2 * torch.randn_like(t) for n, t in tensors.items() if n != "lm_head.weight"
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_safe(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def write_shards(folder: Path, tensors: dict, single: str = "model.safetensors") -> None:
    """Two shards and their index."""
    stem, ending = single.split(".")
    names = sorted(tensors)
    halves = {
        f"{stem}-00001-of-00002.{ending}": names[:9],
        f"{stem}-00002-of-00002.{ending}": names[9:],
    }
    write = write_safe if ending == "safetensors" else lambda path, held: torch.save(held, path)
    for file, half in halves.items():
        write(folder / file, {name: tensors[name] for name in half})
    where = {name: file for file, half in halves.items() for name in half}
    (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def single(folder: Path) -> None:
    write_safe(folder / "model.safetensors", weights())


def single_and_averages(folder: Path) -> None:
    single(folder)
    write_safe(folder / "model_ema.safetensors", weights(1))
    write_safe(
        folder / "consolidated.safetensors", {"layers.0.attention.wq.weight": torch.zeros(2)}
    )
    torch.save(weights(1), folder / "pytorch_model.bin")


def index_and_shards_of_another_upload(folder: Path) -> None:
    write_shards(folder, weights())
    for number in range(1, 4):
        write_safe(folder / f"model-0000{number}-of-00003.safetensors", weights(number))


def single_beside_an_index(folder: Path) -> None:
    write_shards(folder, weights(1))
    single(folder)


def pickled(folder: Path) -> None:
    torch.save(weights(), folder / "pytorch_model.bin")


def pickled_shards(folder: Path) -> None:
    write_shards(folder, weights(), "pytorch_model.bin")


def pickled_of_an_old_torch(folder: Path) -> None:
    torch.save(weights(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def pickled_beside_another_name(folder: Path) -> None:
    pickled(folder)
    write_safe(folder / "adapter.safetensors", weights(1))


def named_in_the_config(folder: Path) -> None:
    write_safe(folder / "model.safetensors", weights(1))
    write_safe(folder / "chosen.safetensors", weights())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "chosen.safetensors"})
    )


LAYOUTS = [
    single, single_and_averages, index_and_shards_of_another_upload, single_beside_an_index,
    pickled, pickled_shards, pickled_of_an_old_torch, pickled_beside_another_name,
    named_in_the_config,
]  # fmt: skip


def folder_of(layout, folder: Path) -> Path:
    tiny.save_dense(folder)
    (folder / "model.safetensors").unlink()
    layout(folder)
    return folder


def by_transformers(folder: Path, **kwargs):
    return transformers.LlamaForCausalLM.from_pretrained(folder, **kwargs).eval()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_reader_reads_what_transformers_reads(layout, tmp_path):
    folder = folder_of(layout, tmp_path / "base")
    theirs = by_transformers(folder)
    wanted, held = logits(theirs), dict(theirs.named_parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in weights().items())
    origin = Origin.of(theirs)
    assert all(torch.equal(origin.tensor(theirs, name), held[name]) for name in held)

    convert_files(folder, COPIES, tmp_path / "streamed")
    assert torch.allclose(logits(sc.load(tmp_path / "streamed")), wanted, atol=1e-5)

    model = hub.load_dense(folder)
    sc.convert(model, BTX, sources=[folder, folder])
    bank = model.model.layers[0].mlp.experts
    assert torch.equal(bank.down[1], held["model.layers.0.mlp.down_proj.weight"])

    sc.convert(theirs, ADAPTERS)
    out = sc.save(theirs, tmp_path / "saved")
    assert (out / "moe.safetensors").stat().st_size < 40_000  # nothing of the base
    write_safe(folder / "later.safetensors", weights(5))
    loaded = sc.load(out)
    assert torch.equal(logits(loaded), logits(theirs))
    with torch.no_grad():
        loaded.model.embed_tokens.weight.add_(1)
    assert torch.equal(logits(sc.revert(loaded)), wanted)


def test_a_folder_saved_from_a_pickled_base_has_its_settings(tmp_path):
    folder = folder_of(pickled, tmp_path / "base")
    (folder / "LICENSE").write_text("Apache License\nVersion 2")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 7}')
    model = hub.load_dense(folder)
    sc.convert(model, COPIES)
    sc.save(model, tmp_path / "saved")
    sc.export(sc.load(tmp_path / "saved"), "mixtral", tmp_path / "exported")
    convert_files(folder, COPIES, tmp_path / "streamed")
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"]
    for out in ("saved", "exported", "streamed"):
        assert not [n for n in names if not (tmp_path / out / n).is_file()], out
        assert json.loads((tmp_path / out / "generation_config.json").read_text())["top_k"] == 7
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(4))
    sc.train(tmp_path / "saved", rows, tmp_path / "trained", steps=1, max_length=64, progress=False)


def test_a_variant_is_found_again(tmp_path):
    folder = folder_of(single, tmp_path / "base")
    write_safe(folder / "model.ours.safetensors", weights(3))
    for name, variant in (("plain", None), ("ours", "ours")):
        model = by_transformers(folder, variant=variant)
        sc.convert(model, ADAPTERS)
        out = sc.save(model, tmp_path / name)
        assert (out / "moe.safetensors").stat().st_size < 40_000
        assert json.loads((out / "recipe.json").read_text())["base"].get("variant") == variant
        assert torch.equal(logits(sc.load(out)), logits(model))


def test_a_fingerprint_over_all_safetensors_is_known_still(tmp_path):
    folder = folder_of(single_and_averages, tmp_path / "base")
    model = hub.load_dense(folder)
    sc.convert(model, ADAPTERS)
    out = sc.save(model, tmp_path / "saved")
    manifest = json.loads((out / "recipe.json").read_text())
    everything = {}
    for file in sorted(folder.glob("*.safetensors")):
        everything |= load_file(file)
    manifest["base"]["fingerprint"] = combine({n: digest(t) for n, t in everything.items()})
    manifest.pop("digest")
    (out / "recipe.json").write_text(json.dumps({**manifest, "digest": json_digest(manifest)}))
    assert torch.equal(logits(sc.load(out)), logits(model))
    write_safe(folder / "model_ema.safetensors", weights(2))
    with pytest.raises(CheckpointError, match="holds other tensors"):
        sc.load(out)


# --------------------------------------------------------------- what has no place, or has not come


def test_weights_without_a_place_are_named(tmp_path, caplog):
    extra = {
        "model.layers.2.mlp.up_proj.weight": torch.zeros(2),
        "value_head.weight": torch.zeros(2),
    }
    folder = folder_of(
        lambda f: write_safe(f / "model.safetensors", weights() | extra), tmp_path / "b"
    )
    for read in (hub.load_dense, lambda f: convert_files(f, COPIES, tmp_path / "out")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sparsecraft"):
            read(folder)
        assert [r.getMessage() for r in caplog.records if "value_head.weight" in r.getMessage()]
        assert "layers 2 to 2, beyond num_hidden_layers=2" in caplog.text


@pytest.mark.parametrize("streams", [False, True])
def test_what_would_be_random_is_refused(streams, tmp_path):
    def read(folder):
        return (
            convert_files(folder, COPIES, tmp_path / "out") if streams else hub.load_dense(folder)
        )

    held = weights()
    held.pop("model.norm.weight")
    folder = folder_of(lambda f: write_safe(f / "model.safetensors", held), tmp_path / "lacks")
    with pytest.raises(HubError, match=r"random: model\.norm\.weight"):
        read(folder)
    held = weights() | {"model.norm.weight": torch.ones(8)}
    folder = folder_of(lambda f: write_safe(f / "model.safetensors", held), tmp_path / "shape")
    with pytest.raises(HubError, match=r"weight is \[8\] and the config says \[32\]"):
        read(folder)


def test_damaged_files_are_one_sentence(tmp_path):
    folder = folder_of(index_and_shards_of_another_upload, tmp_path / "shard")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SparsecraftError, match=r"model-00002-of-00002|model\.safetensors\.index"):
        hub.load_dense(folder)
    with pytest.raises(SparsecraftError, match=r"are not there|cannot be read"):
        convert_files(folder, COPIES, tmp_path / "out")

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    folder = folder_of(
        lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(Evil())), tmp_path / "evil"
    )
    for read in (hub.load_dense, lambda f: convert_files(f, COPIES, tmp_path / "out")):
        with pytest.raises(SparsecraftError, match="cannot be read"):
            read(folder)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------- a head of its own


def untied(folder: Path) -> None:
    """A head that differs from the table, beside tie_word_embeddings: true."""
    held = weights()
    write_safe(
        folder / "model.safetensors",
        held | {"lm_head.weight": held["model.embed_tokens.weight"] + 1},
    )


def tied_twice(folder: Path) -> None:
    """The same head twice, as old files have it."""
    held = weights()
    torch.save(
        held | {"lm_head.weight": held["model.embed_tokens.weight"]}, folder / "pytorch_model.bin"
    )


@pytest.mark.parametrize("layout", [untied, tied_twice], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("standalone", [False, True])
def test_a_head_beside_tied_embeddings_is_the_one_of_transformers(layout, standalone, tmp_path):
    folder = folder_of(layout, tmp_path / "base")
    wanted = logits(by_transformers(folder))
    convert_files(folder, COPIES, tmp_path / "streamed", standalone=standalone)
    model = hub.load_dense(folder)
    assert model.config.tie_word_embeddings is (layout is tied_twice)
    sc.convert(model, COPIES)
    sc.save(model, tmp_path / "saved", standalone=standalone)
    for out in ("streamed", "saved"):
        assert torch.allclose(logits(sc.load(tmp_path / out)), wanted, atol=1e-5)


def test_sources_with_and_without_a_head_of_their_own_are_no_mixture(tmp_path):
    tied, apart = folder_of(single, tmp_path / "tied"), folder_of(untied, tmp_path / "apart")
    for base, source in ((tied, apart), (apart, tied)):
        with pytest.raises(sc.SparsecraftError, match="tie_word_embeddings"):
            sc.convert(hub.load_dense(base), BTX, sources=[source, source])
    model = hub.load_dense(apart)
    sc.convert(model, sc.override(BTX, {"others": "mean"}), sources=[apart, apart])
    assert torch.allclose(logits(model), logits(by_transformers(apart)), atol=1e-5)


def test_an_encoder_decoder_with_a_head_of_its_own_is_refused(tmp_path):
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=True,
    )
    config.tie_word_embeddings = True
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    file = tmp_path / "t5" / "model.safetensors"
    held = load_file(file)
    write_safe(file, held | {"lm_head.weight": torch.ones(64, 16)})
    with pytest.raises(HubError, match=r"lm_head\.weight' of its own"):
        hub.load_dense(tmp_path / "t5")


# ---------------------------------------------------------------------- LoRAs of tied embeddings


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_a_lora_with_embeddings_gives_pefts_model_or_is_refused(modules, tied, tmp_path):
    peft = pytest.importorskip("peft")
    folder = folder_of(single if tied else untied, tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=modules)
    lora = peft.get_peft_model(hub.load_dense(folder), settings)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lora.save_pretrained(tmp_path / "lora")
    model = hub.load_dense(folder)
    if tied:
        with pytest.raises(sc.SparsecraftError, match="tie_word_embeddings"):
            sc.convert(model, BTX, sources=[tmp_path / "lora"] * 2)
        assert not hasattr(model, "sparsecraft")
        return
    sc.convert(model, sc.override(BTX, {"others": "mean"}), sources=[tmp_path / "lora"] * 2)
    assert torch.allclose(logits(model), logits(lora.eval()), atol=1e-4)


def test_an_older_name_of_layer_norms_is_found(tmp_path):
    tiny.save_encoder(tmp_path / "bert")
    model = transformers.BertModel.from_pretrained(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in load_file(file).items()
    }
    write_safe(file, old)
    origin = Origin.find(tmp_path / "bert")
    again = hub.load_dense(tmp_path / "bert")
    for name, tensor in again.named_parameters():
        assert torch.equal(origin.tensor(again, name), tensor), name
        assert torch.equal(model.get_parameter(name), tensor)
