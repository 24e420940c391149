"""Does llama.cpp take our exports? Its converter, the tensors of its GGUF, and its logits.

Command: python -m benchmarks.conversion.llama_cpp --converter LLAMA_CPP/convert_hf_to_gguf.py
It needs the packages gguf, sentencepiece and llama-cpp-python; --source says of which llama.cpp.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

import sparsecraft as sc
from benchmarks.lab.tables import markdown, measure_and_write

PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Why is the sky blue? 12 + 7 = 19, and the sea is blue because " * 4,
)
GREEDY = 32

TINY = {
    "vocab_size": 49152, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


UPCYCLING = partial(sc.recipes.upcycling, num_experts=4, noise_std=0.05)


@dataclass(frozen=True)
class Case:
    """One model, recipe and target; `dense` is a family of random weights, or smollm2."""

    target: str
    dense: str = "Llama"
    recipe: Callable = UPCYCLING
    what: str = ""
    changes: dict = field(default_factory=dict)


RAW = partial(sc.recipes.upcycling, num_experts=4, noise_std=0.05, renormalize=False)
TOP1 = partial(sc.recipes.upcycling, num_experts=3, noise_std=0.05, top_k=1)
NEXUS = partial(sc.recipes.nexus, 4)


def GATED() -> sc.Recipe:
    return sc.override(NEXUS(), {"router.gates_base": True})


def BESIDE() -> sc.Recipe:
    return sc.override(UPCYCLING(), {"place": "beside", "exact_at_start": False})


SMOL = partial(sc.recipes.upcycling, num_experts=4, noise_std=0.02)
CASES = (
    Case("mixtral", "smollm2", SMOL),
    Case("granite", "smollm2", SMOL),
    Case("qwen2_moe", "smollm2", SMOL, "tied output"),
    Case("mixtral"),
    Case("mixtral", "Mistral", TOP1, "3 experts, top-1"),
    Case("mixtral", "Mistral", what="head_dim 64", changes={"head_dim": 64}),
    Case("mixtral", "Mistral", what="window of 16", changes={"sliding_window": 16}),
    Case("mixtral", what="gelu", changes={"hidden_act": "gelu"}),
    Case("mixtral", what="rope llama3", changes={"rope_parameters": LLAMA3}),
    Case("mixtral", what="rope yarn", changes={"rope_parameters": YARN}),
    Case("mixtral", what="rope linear", changes={"rope_parameters": LINEAR}),
    Case("granite", "Llama", partial(sc.recipes.btx, num_experts=4, routing="soft"), "soft"),
    Case("granite", what="attention_bias", changes={"attention_bias": True}),
    Case("granite", what="head_dim 64", changes={"head_dim": 64}),
    Case("granite", "Qwen2"),
    Case("granite", "Granite", what="multipliers",
         changes={"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    Case("qwen2_moe", "Qwen2", what="renormalized"),
    Case("qwen2_moe", "Qwen2", RAW, "not renormalized"),
    Case("qwen2_moe", "Qwen2", NEXUS, "nexus"),
    Case("qwen2_moe", "Llama", RAW, "not renormalized"),
    Case("qwen2_moe", "Qwen2", GATED, "nexus, gated network"),
    Case("granite", recipe=BESIDE, what="beside the network"),
    Case("qwen3_moe", "Qwen3", what="renormalized, head_dim 64", changes={"head_dim": 64}),
    Case("qwen3_moe", "Qwen3", RAW, "not renormalized", {"head_dim": 64}),
    Case("qwen3_moe", "Qwen3", what="tied output",
         changes={"head_dim": 64, "tie_word_embeddings": True}),
)  # fmt: skip


def dense(case: Case, folder: Path) -> transformers.PreTrainedModel:
    if case.dense == "smollm2":
        return sc.hub.load_dense("smollm2", dtype=torch.float32)
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.dense}Config")(**{**TINY, **case.changes})
    model = getattr(transformers, f"{case.dense}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if "norm" in name else 0.1 * noise)
    model.save_pretrained(folder)
    sc.hub.load_tokenizer(sc.hub.resolve("smollm2")).save_pretrained(folder)
    return sc.hub.load_dense(str(folder))


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key as llama.cpp's rotary embedding wants them: pairs side by side."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def expected(model: transformers.PreTrainedModel, rotates_pairs: bool) -> dict[str, torch.Tensor]:
    """GGUF name -> tensor of an exported model, which transformers loaded."""
    config, state = model.config, model.state_dict()
    ends = {"embed_tokens": "token_embd", "norm": "output_norm"}
    found = {f"{new}.weight": state[f"model.{old}.weight"] for old, new in ends.items()}
    if not config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
        "block_sparse_moe.router": "ffn_gate_inp", "block_sparse_moe.router.layer": "ffn_gate_inp",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp", "shared_mlp.output_linear":
        "ffn_down_shexp", "mlp.experts.down_proj": "ffn_down_exps",
        "block_sparse_moe.output_linear": "ffn_down_exps", "block_sparse_moe.experts.down_proj":
        "ffn_down_exps",
    }  # fmt: skip
    fused = {
        "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
        "block_sparse_moe.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
        "block_sparse_moe.input_linear": ("ffn_gate_exps", "ffn_up_exps"),
        "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp"),
    }
    for name, tensor in state.items():
        if not name.startswith("model.layers."):
            continue
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        leaf = "bias" if rest.endswith(".bias") else "weight"
        rest = rest.removesuffix(f".{leaf}")
        if rest in fused:
            for new, half in zip(fused[rest], tensor.chunk(2, dim=-2), strict=True):
                found[f"blk.{number}.{new}.{leaf}"] = half
            continue
        if rotates_pairs and (count := heads.get(rest.rpartition(".")[2])):
            tensor = permuted(tensor, count)
        found[f"blk.{number}.{parts[rest]}.{leaf}"] = tensor
    return found


def compare_files(folder: Path, file: Path, model: transformers.PreTrainedModel) -> dict:
    """What the GGUF holds beside what the exported folder holds."""
    import gguf

    reader = gguf.GGUFReader(file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    kind = meta["general.architecture"]
    wanted = expected(model, rotates_pairs=kind in ("llama", "granite", "granitemoe"))
    held = {tensor.name: tensor for tensor in reader.tensors}
    extra = sorted(held.keys() - wanted.keys())
    unequal = [
        name
        for name, tensor in wanted.items()
        if name not in held
        or not np.array_equal(
            np.asarray(held[name].data).reshape(-1), tensor.float().reshape(-1).numpy()
        )
    ]
    keys = (
        "expert_count expert_used_count expert_feed_forward_length rope.freq_base "
        "rope.dimension_count rope.scaling.type rope.scaling.factor attention.key_length "
        "attention.head_count attention.head_count_kv context_length feed_forward_length "
        "expert_shared_feed_forward_length attention.sliding_window vocab_size"
    ).split()
    vocabulary = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "architecture": kind,
        "tensors": len(held),
        "equal": len(wanted) - len(unequal),
        "unequal": unequal,
        "extra": extra,
        "metadata": {key: meta[f"{kind}.{key}"] for key in keys if f"{kind}.{key}" in meta},
        "tokens": len(tokens),
        "tokens_equal": sum(vocabulary.get(token) == n for n, token in enumerate(tokens)),
        "pre": meta.get("tokenizer.ggml.pre"),
        "special": {n: meta.get(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos", "padding")},
        "chat_template": "tokenizer.chat_template" in meta,
    }


@torch.no_grad()
def run(folder: Path, file: Path, model: transformers.PreTrainedModel) -> dict:
    """Logits and greedy tokens of llama.cpp beside transformers', caches and products float32."""
    from llama_cpp import Llama

    try:
        engine = Llama(
            str(file), n_ctx=512, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1,
            type_k=0, type_v=0, flash_attn=False,
        )  # fmt: skip
    except ValueError as error:
        return {"loads": False, "error": str(error).replace(str(file), file.name)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    difference, scale, same_tokens, agree, greedy = 0.0, 0.0, True, [], []
    not_a_number = False
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        same_tokens &= ids == engine.tokenize(prompt.encode(), add_bos=False, special=True)
        engine.reset()
        engine.eval(ids)
        ours = torch.tensor(np.array(engine.scores[: len(ids)]))
        theirs = model(torch.tensor([ids])).logits[0]
        off = (ours - theirs).abs().max().item()
        not_a_number |= math.isnan(off)
        difference = max(difference, off)
        scale = max(scale, theirs.abs().max().item())
        agree.append((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
        wanted = model.generate(
            torch.tensor([ids]), max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False,
            eos_token_id=None, pad_token_id=2,
        )[0, len(ids) :].tolist()  # fmt: skip
        found = []
        for _ in range(GREEDY):
            found.append(int(np.argmax(engine.scores[engine.n_tokens - 1])))
            engine.eval(found[-1:])
        greedy.append(sum(a == b for a, b in zip(found, wanted, strict=True)))
    engine.close()
    return {
        "loads": True, "difference": difference, "not_a_number": not_a_number,
        "scale": scale, "same_tokenization": same_tokens,
        "argmax_agreement": sum(agree) / len(agree), "greedy_equal": greedy,
    }  # fmt: skip


def measure_case(case: Case, converter: Path) -> dict:
    found = {"target": case.target, "dense": case.dense, "recipe": case.recipe().name}
    found["what"] = case.what
    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary) / "export", Path(temporary) / "model.gguf"
        model = dense(case, Path(temporary) / "dense")
        sc.convert(model, case.recipe(), certify=False)
        found["lint"] = sc.export(model, case.target, folder)["lint"]
        command = [sys.executable, str(converter), str(folder), "--outfile", str(file)]
        process = subprocess.run([*command, "--outtype", "f32"], capture_output=True, text=True)
        found["accepted"] = process.returncode == 0
        if not found["accepted"]:
            return found | {"error": process.stderr.strip().splitlines()[-1]}
        exported = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        return found | compare_files(folder, file, exported) | run(folder, file, exported)


def measure(args: argparse.Namespace) -> dict:
    results = []
    for case in CASES:
        results.append(measure_case(case, args.converter))
        print(results[-1], file=sys.stderr)
    names = ("gguf", "llama-cpp-python", "torch", "transformers")
    return {
        "llama.cpp": args.source,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, "
        f"Python {platform.python_version()}",
        "versions": {name: version(name) for name in names},
        "cases": results,
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def tables(data: dict) -> str:
    rows = []
    for case in data["cases"]:
        logits = None if case.get("loads") else "does not load"
        if case.get("not_a_number"):
            logits = "not a number"
        elif case.get("loads"):
            logits = f"{case['difference']:.1e} at {case['scale']:.0f}"
        rows.append([
            f"`{case['target']}`", f"{case['dense']} {case['recipe']}", case["what"] or None,
            "yes" if case["accepted"] else "no",
            f"{case['equal']} of {case['tensors']}" if case["accepted"] else None,
            logits, case.get("greedy_equal") and "/".join(map(str, case["greedy_equal"])),
            "yes" if case["lint"] else None,
        ])  # fmt: skip
    header = "target;from;what;converted;tensors equal;logits differ;greedy tokens of 32;we warn"
    versions = ", ".join(f"{name} {v}" for name, v in data["versions"].items() if v)
    return (
        f"llama.cpp {data['llama.cpp']}; {versions}; {data['machine']}.\n\n"
        + markdown(header.split(";"), rows)
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--converter", type=Path)
    parser.add_argument("--source", default="of an unknown version")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="rewrite the tables only")
    measure_and_write(parser.parse_args(), measure, tables)
