"""Base folders that others wrote: one sentence of ours, before memory or time is taken."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
import transformers

from sparsecraft import hub
from sparsecraft.dense.bounds import bounded
from sparsecraft.dense.door import check_asked, guarded, read_generation
from sparsecraft.dense.loading import load_tokenizer, skeleton
from sparsecraft.errors import HubError, ResourceError, SparsecraftError
from tests import tiny


@pytest.fixture
def base(tmp_path):
    tiny.save_dense(tmp_path)
    return tmp_path


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CONFIGS = {
    "architectures of numbers": {"architectures": [5]},
    "architectures of a dict": {"architectures": {"a": 1}},
    "a word for a width": {"hidden_size": "x"},
    "a list for heads": {"num_key_value_heads": [2]},
    "no heads": {"num_attention_heads": 0},
    "an unknown activation": {"hidden_act": "zz"},
    "an unknown rope": {"rope_parameters": {"rope_type": "zz", "rope_theta": 1.0}},
    "another's quantization": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "packed and is not": {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    },
    "a number for quantization": {"quantization_config": 7},
    "a list for a family": {"model_type": [1]},
    "a family of its own": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.E"}},
    "many layers": {"num_hidden_layers": 100_000},
    "very many layers": {"num_hidden_layers": 10**12},
    "wide": {"hidden_size": 10**9},
    "wide networks": {"intermediate_size": 10**8},
    "many tokens": {"vocab_size": 10**9},
    "a head of its own width": {"head_dim": 10**9},
    "positions": {"max_position_embeddings": 10**15},
    "labels": {"num_labels": 10**9},
    "a padding out of range": {"pad_token_id": 10**9},
    "a type that is none": {"dtype": "zz"},
    "a number for a type": {"dtype": 5},
    "a list for a type": {"dtype": ["x"]},
    "weights elsewhere": {"transformers_weights": "../model.safetensors"},
    "weights at the root": {"transformers_weights": "/etc/passwd"},
    "a kernel": {"_attn_implementation": "kernels-community/flash-attn"},
    "a kernel for a part": {"attn_implementation": {"": "evil/kernel"}},
    "a kernel for experts": {"experts_implementation": "evil/kernel"},
    "a kernel that would be fetched": {"attn_implementation": "flash_attention_2"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_no_model_has_is_one_sentence(base, name):
    (base / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    edit(base / "config.json", **CONFIGS[name])
    start = time.perf_counter()
    with pytest.raises(SparsecraftError):
        hub.load_dense(str(base))
    assert time.perf_counter() - start < 20


def test_a_skeleton_is_bounded_too(base):
    edit(base / "config.json", num_hidden_layers=100_000)
    with pytest.raises(HubError, match="weights cannot fill"):
        skeleton(base)


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_folder_is_not_waited_for(base, name):
    _pipe(base / name)
    with pytest.raises(HubError, match="is a pipe"):
        hub.load_dense(str(base))
    with pytest.raises(HubError, match="is a pipe"):
        load_tokenizer(base)


TOKENIZERS = {
    "empty": b"",
    "deep": b"[" * 100_000,
    "no UTF-8": b"\xff\xfe",
    "an array": b"[]",
    "no model": b'{"version": "1.0"}',
}


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_is_none_is_one_sentence(base, file, name):
    (base / file).write_bytes(TOKENIZERS[name])
    if (file, name) == ("tokenizer_config.json", "no model"):
        return  # a valid file
    with pytest.raises(HubError):
        load_tokenizer(base)


def test_a_number_that_no_token_has_is_one_sentence(base):
    path = base / "tokenizer.json"
    data = json.loads(path.read_text())
    token = next(iter(data["model"]["vocab"]))
    data["model"]["vocab"][token] = 10**9
    path.write_text(json.dumps(data))
    with pytest.raises(HubError, match="number 1000000000"):
        load_tokenizer(base)


@pytest.mark.parametrize("text", ["", "[", "7", '{"pad_token_id": [0]}'])
def test_generation_settings_that_are_none_are_one_sentence(base, text):
    (base / "generation_config.json").write_text(text)
    with pytest.raises(HubError, match="generation_config"):
        read_generation(base, HubError)


def test_a_user_who_asks_for_code_gets_a_sentence(base):
    for asked in (
        {"trust_remote_code": True},
        {"attn_implementation": "evil/kernel"},
        {"attn_implementation": {"text_config": "evil/kernel@main"}},
    ):
        with pytest.raises(HubError, match="never run"):
            hub.load_dense(str(base), **asked)
    check_asked({"trust_remote_code": False, "attn_implementation": "sdpa"})
    assert hub.load_dense(str(base), trust_remote_code=False) is not None


def test_a_panic_of_a_library_is_a_sentence_and_a_signal_is_not():
    class PanicException(BaseException):
        pass

    with pytest.raises(HubError, match="PanicException: index"), guarded("x"):
        raise PanicException("index out of range")
    with pytest.raises(KeyboardInterrupt), guarded("x"):
        raise KeyboardInterrupt
    with pytest.raises(ResourceError, match=r"x does not fit into memory.*bfloat16"), guarded("x"):
        raise MemoryError


def test_what_is_bounded_is_of_the_block_alone():
    config = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=50)
    with torch.device("meta"):
        with bounded(21, 10**6, "x", HubError):
            pass
        with pytest.raises(HubError), bounded(0, 0, "x", HubError):
            transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=3))
        assert transformers.LlamaForCausalLM(config) is not None
