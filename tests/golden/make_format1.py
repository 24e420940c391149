"""Make tests/golden/format1, what the code of commit 1d32273 writes in format 1.

It ran with that commit's code, and need not run with any later one:

    git worktree add OLD 1d32273 && cp -r tests/golden OLD/tests/ && cd OLD
    PYTHONPATH=src:tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python tests/golden/make_format1.py

A second run gives the same bytes but for seconds in three report.json, and the process and the
base's times in the stream's progress.json.

Today's code writes a base's absolute path. `settle` replaces it by one relative to format1
(base/llama) and renews the digests of recipe.json that cover it; nothing else is edited.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import cases
import peft
import tiny
import torch
import transformers
from recipe_names import namespace
from safetensors.torch import save_file
from sparsecraft.budget import split_layers
from sparsecraft.folder import json_digest

import sparsecraft as sc
from sparsecraft import streaming, tensorfile, trainers
from sparsecraft.recipe import to_json

OUT = Path(__file__).resolve().parent / "format1"
D, F, VOCAB = 16, 32, 96
IDS = torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(2))
TRAINING = {"steps": 12, "batch_size": 4, "micro_batch": 2, "max_length": 64,
            "learning_rate": 1e-2, "log_every": 3, "save_every": 5, "progress": False}  # fmt: skip
STREAM = {"shard_size": 4000, "certify": False, "seed": 7}

# ------------------------------------------------------------------------------------------ recipes

# Every function by itself, and each variant, routing or scaling that it takes; and more arguments.
PUBLISHED = {
    "adapter": ["", "adapter_dim=16, lora_rank=4, adapter_scale=0.5", "quantize='nf4'"],
    "bam": ["", "kv='shared'", "1", "2, balance_coef=0.0, z_coef=0.0"],
    "btx": ["", *(f"routing={r!r}" for r in ("top_2", "top_4", "soft", "switch", "sample")),
            "splitting=2", "blending=True", "freeze_experts=True", "balance_coef=0.0"],
    "camel": ["", "lora_rank=4, quantize='nf4'"],
    "camelidae": ["", "variant='released'", "variant='paper', quantize='nf4'",
                  "variant='released', balance='pesc_released', adapter_scale=0.25",
                  "balance='none'", "lora_rank=0, paths='model.layers.1?.mlp'"],
    "cmoe": ["", "variant='released'", "variant='finetuned'", "compensate=True, markers=5",
             "compensate=None"],
    "d2dmoe": ["", "variant='bert'", "variant='released'", "attention_experts=8",
               *(f"sparsity={s!r}" for s in ("relu_hoyer", "relu_l1", "gelu_clamped_l1",
                                             "gelu_clamped_hoyer", "none"))],
    "drop_upcycling": ["", "variant='released'", "ratio=0.0", "balance_coef=0.0"],
    "dsti": ["", "variant='bert'", "sparsity='none'"],
    "gmoefication": ["", "variant='squared'", "variant='output_norm'",
                     "partition='coactivation'", "partition='random', router='oracle'"],
    "hydralora": ["", "attention=True"],
    "ia3": ["", "variant='tuned'"],
    "lora": ["", "variant='released'", "variant='tuned'", "rank=16, variant='tuned'"],
    "lte": ["", "variant='tuned'", "efficiency=2.0, separability=0.1"],
    "mixlora": ["", "variant='released'", "attention_rank=0", "balance_coef=0.0"],
    "moefication": ["", "variant='released'", "partition='coactivation'", "partition='random'",
                    "variant='released', partition='coactivation'",
                    "variant='released', partition='random'", "router='similarity', relu=False",
                    "router='oracle', compensate=True"],
    "molora": ["", "variant='released'", "variant='tuned'", "router='sequence'",
               "router='sentence'", "top_k=2", "top_k=2, renormalize=False",
               "variant='released', top_k=2"],
    "mov": ["", "variant='released'", "variant='tuned'", "router='sequence'", "router='sentence'",
            "top_k=2", "top_k=2, renormalize=False", "variant='released', top_k=2", "noise=0.1"],
    "nexus": ["", "variant='linear'", "encoder='self', embedding_dim=32", "balance_coef=0.0"],
    "smola": ["", "mixing='slots'", "modalities=True", "alpha=8.0"],
    "upcycling": ["", "renormalize=False", "top_k=8, renormalize=False",
                  "noise_std=0.1, noise_share=0.5", "balance_coef=0.0"],
    "upit": ["", "expand=False", "parents='random', drop=0.0", "alpha=1.0",
             "router_learning_rate=0.001"],
    "virtual_groups": ["", "scaling='paper'", "scaling='none'", "scaling='none', renormalize=False",
                       "granularity=1, top_k=2"],
}  # fmt: skip

WHOLE, SPLIT, LORA = "FFNSpec(num_experts=4)", "SplitSpec(num_experts=4)", "LoRASpec(num_experts=4)"


def recipe_of(edits: str, stages: str = "Stage()", more: str = "") -> str:
    return (
        "Recipe(name='odd', title='odd', paper='none', exact_at_start=False, "
        f"edits=({edits},), stages=({stages},){more})"
    )


def routed(router: str, experts: str = WHOLE, edit: str = "") -> str:
    return recipe_of(f"Edit(experts={experts}, router=RouterSpec({router}){edit})")


def of_experts(experts: str, edit: str = "", router: str = "RouterSpec()") -> str:
    return recipe_of(f"Edit(experts={experts}, router={router}{edit})")


def staged(stage: str) -> str:
    return recipe_of(f"Edit(experts={WHOLE}, router=RouterSpec())", f"Stage({stage})")


BESIDE, LINEAR = ", place='beside'", ", place='beside', site='linear'"
ODD = {
    "select_share": routed("scorer='norm', hidden=8, select='share', top_k=None, threshold=0.9, "
                           "weighting='one', target='output_norm'", SPLIT),
    "select_relative": routed("bias=0.5, squash='sigmoid', select='relative', top_k=None, "
                              "threshold=0.25, weighting='score', target='intermediate_norm'",
                              SPLIT),
    "select_threshold": routed("squash='softmax', select='threshold', top_k=None, threshold=0.25, "
                               "weighting='one', target='deviation'", SPLIT),
    "select_threshold_above_one": routed("squash='abs', select='threshold', top_k=None, "
                                         "threshold=3.5, weighting='one', "
                                         "target='squared_deviation'", SPLIT),
    "select_sample": routed("select='sample', top_k=1, soft_first=True"),
    "select_soft": routed("select='soft', top_k=None, temperature=0.5"),
    "select_slots": routed("select='slots', top_k=None, init='normal'", LORA, LINEAR),
    "scorer_mlp": routed("scorer='mlp', hidden=12, weighting='scaled', top_k=2", SPLIT),
    "scorer_norm": routed("scorer='norm', hidden=8, bias=0.0, weighting='one'", SPLIT),
    "scorer_similarity": routed("scorer='similarity', weighting='straight_through'", SPLIT),
    "scorer_oracle": routed("scorer='oracle', weighting='one', top_k=1", SPLIT),
    "scorer_analytic": routed("scorer='analytic', normalize=True, squash='abs', shared=1, top_k=2, "
                              "weighting='gain'", SPLIT),
    "scorer_domain": routed("scorer='domain', init='normal', encoder='owner/encoder', "
                            "sentence_dim=24, top_k=1, renormalize=False", WHOLE, BESIDE),
    "encoder_self": routed("scorer='domain', init='normal', encoder='self', sentence_dim=32",
                           WHOLE, BESIDE),
    **{f"weighting_{w}": routed(f"weighting={w!r}, top_k=2", SPLIT)
       for w in ("one", "scaled", "straight_through", "score", "gain")},
    **{f"init_{i}": routed(f"init={i!r}, init_std=0.05")
       for i in ("kaiming_uniform", "normal", "uniform", "zeros", "hidden", "kmeans")},
    "init_repeat": routed("init='normal', init_repeat=2"),
    "extended": routed("extended=1"),
    "gates_base": routed("gates_base=True", WHOLE, BESIDE),
    "not_balanced": routed("balanced=False"),
    "reads_output": routed("reads='output'", "AdapterSpec(num_experts=4, dim=8)",
                           ", place='after'"),
    "decides_head": routed("decides='head', reads='output'", "VectorSpec(num_experts=4)",
                           ", place='after', site='key'"),
    "decides_sequence": routed("decides='sequence'"),
    "decides_sentence": routed("decides='sentence', encoder='some/folder', sentence_dim=24"),
    "temperature": routed("temperature=2.5, top_k=3"),
    "ffn_width": of_experts("FFNSpec(num_experts=4, width=24)"),
    "ffn_blend": of_experts("FFNSpec(num_experts=4, blend=True)"),
    "ffn_granular": of_experts("FFNSpec(num_experts=4, granularity=2, scaling='paper', scale=2.0)"),
    "ffn_redrawn": of_experts("FFNSpec(num_experts=4, redraw=0.5, redraw_apart=True, "
                              "permute=True)"),
    "ffn_noise": of_experts("FFNSpec(num_experts=4, noise_std=0.1, noise_share=0.5)"),
    "attention_shared": of_experts("AttentionSpec(num_experts=4, kv='shared')",
                                   ", site='attention'"),
    "adapter_before": of_experts("AdapterSpec(num_experts=4, dim=8, activation='relu', "
                                 "dropout=0.0, scale=0.25)", ", place='before'"),
    "lora_shared_a": of_experts("LoRASpec(num_experts=4, rank=2, alpha=8.0, dropout=0.0, "
                                "shared_a=True, init='normal', init_std=0.1)", LINEAR),
    "vector_noise": of_experts("VectorSpec(num_experts=4, init_std=0.1)",
                               ", place='before', site='down'"),
    "ffn_lora": of_experts("FFNLoRASpec(num_experts=4, rank=2, alpha=8.0, dropout=0.0)",
                           ", place='inside'"),
    **{f"split_{p}": of_experts(f"SplitSpec(num_experts=4, partition={p!r}, markers=3)",
                                router="RouterSpec(weighting='one')")
       for p in ("contiguous", "random", "kmeans", "coactivation", "coactivation_released",
                 "activation", "activation_released")},
    "split_compensates": of_experts("SplitSpec(num_experts=4, compensate=True)",
                                    router="RouterSpec(weighting='one')"),
    "split_imitates": of_experts("SplitSpec(num_experts=4, compensate=False, flops_factor=0.5)",
                                 ", place='imitate', site='attention_linear'",
                                 "RouterSpec(weighting='one')"),
    "modalities": recipe_of(", ".join(
        f"Edit(site='linear', place='beside', modality={m!r}, experts={LORA}, router=RouterSpec())"
        for m in (None, "text", "visual"))),
    "sites": recipe_of(", ".join(
        f"Edit(site={s!r}, paths='*.layers.[01].*', place='beside', experts=LoRASpec(rank=2))"
        for s in ("linear", "attention_linear", "ffn_linear", "query", "key", "value", "output",
                  "gate", "down"))),
    "vector_sites": recipe_of(", ".join(
        f"Edit(site={s!r}, place='after', experts=VectorSpec(num_experts=1))"
        for s in ("intermediate", "activation"))),
    "fit_routers": staged("name='router', trains=('router',), fit=FitSpec(loss='bce', tokens=512, "
                          "epochs=3, batch_tokens=64, learning_rate=0.01, holdout=0.2)"),
    "fit_imitations": staged("name='distill', fit=FitSpec(what='imitations', sparsity=0.001, "
                             "dropout=0.05)"),
    "fit_nothing": staged("name='build', fit=FitSpec(loss='none')"),
    "buckets": staged("name='router', buckets=BucketSpec(sample=0.5, at_least=2, at_most=9), "
                      "losses={'own_expert': 1.0}, epochs=4.0"),
    "expansion": recipe_of(f"Edit(experts={WHOLE}, router=RouterSpec())", more=", others='mean', "
                           "expansion=ExpansionSpec(parents='random', drop=0.25)"),
    "quantized": recipe_of("Edit(site='linear', place='beside', experts=LoRASpec(rank=2))",
                           more=", base_quantization='nf4', variant='mine'"),
    "losses": staged("losses={" + ", ".join(
        f"{name!r}: {0.01 * (n + 1):g}" for n, name in enumerate(sorted(sc.losses.LOSSES))) + "}"),
    "schedule_linear": staged("losses={'switch': 0.01}, loss_schedule='linear'"),
    "schedule_linear_warmup": staged("losses={'z': 0.01}, loss_schedule='linear_warmup'"),
    "stage_runs_every": staged("runs='every', activation='relu', trains=('model',)"),
    "stage_runs_soft": staged("runs='soft', trains=('all',)"),
    "stage_settings": staged("name='mine', trains=('router', '*.lora_*', 'others'), "
                             "optimizer='adafactor', learning_rate=0.001, "
                             "router_learning_rate=0.01, schedule='cosine', warmup_ratio=0.1, "
                             "warmup_steps=7, weight_decay=0.1, max_grad_norm=0.0, batch_size=3, "
                             "max_length=5, epochs=1.5"),
}  # fmt: skip


def recipes() -> dict[str, str]:
    """File name without its end -> expression."""
    found = {}
    for function, calls in PUBLISHED.items():
        for arguments in calls:
            words = arguments.replace("'", "").replace(", ", "__").replace("=", "-")
            words = "".join(c if c.isalnum() or c in "-_." else "x" for c in words)
            name = f"{function}__{words}" if words else function
            found[name] = f"sc.recipes.{function}({arguments})"
    assert PUBLISHED.keys() == set(sc.recipes.__all__)
    for name in cases.RECIPES:  # those of RUNNING are the same recipes
        found[f"case__{name}"] = f"RECIPES[{name!r}].make()"
    return found | {f"odd__{name}": expression for name, expression in ODD.items()}


def write(path: Path, data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def make_recipes() -> None:
    index = recipes()
    for name, expression in index.items():
        write(OUT / "recipes" / f"{name}.json", to_json(eval(expression, namespace())))
    write(OUT / "recipes.json", index)


def make_keys() -> None:
    found = {}
    for name, case in cases.RECIPES.items():
        model = cases.dense("llama")
        sc.convert(model, case.make(), certify=False)
        found[name] = {
            key: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            for key, t in sorted(model.state_dict().items())
        }
    write(OUT / "state_dict_keys.json", found)


# -------------------------------------------------------------------------------------------- bases


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model.eval()


def llama(vocab: int = VOCAB, **changes):
    config = {
        "vocab_size": vocab, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | changes))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=D, n_inner=F, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5():
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=D, d_kv=4, d_ff=F, num_layers=1, num_decoder_layers=1,
        num_heads=4, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=F, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def chat():
    return llama(len(tiny.tokenizer()))


BASES = {"llama": llama, "gpt2": gpt2, "t5": t5, "bert": bert, "chat": chat}


def make_bases() -> None:
    for name, build in BASES.items():
        shaken(build()).save_pretrained(OUT / "base" / name)
    tiny.tokenizer().save_pretrained(OUT / "base" / "chat")
    tiny.write_rows(OUT / "rows.jsonl", tiny.chat_rows())


def dense(name: str, moved: int | None = None):
    model = sc.hub.load_dense(str(OUT / "base" / name))
    if moved is not None:
        generator = torch.Generator().manual_seed(moved)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# -------------------------------------------------------------------------------------- checkpoints


def inputs_of(model) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": IDS.clone()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.flip(-1).contiguous()
    if "Classification" in type(model).__name__:
        inputs["attention_mask"] = torch.ones_like(IDS)
        inputs["attention_mask"][1, 7:] = 0
    return inputs


def expect(name: str, model) -> None:
    inputs = inputs_of(model)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.float().contiguous()
    (OUT / "expected").mkdir(exist_ok=True)
    save_file(inputs | {"logits": logits}, OUT / "expected" / f"{name}.safetensors")


def settle(folder: Path) -> None:
    """Replace the absolute paths of bases, and renew the digests over them."""
    for path in (p for p in folder.rglob("*") if p.suffix in (".json", ".md")):
        text = path.read_text()
        if str(OUT) in text:
            path.write_text(text.replace(f"{OUT}/", ""))
    manifest = folder / "recipe.json"
    if manifest.is_file():
        data = json.loads(manifest.read_text())
        data.pop("digest")
        assert data["config"] == json_digest(json.loads((folder / "config.json").read_text()))
        data["digest"] = json_digest(data)
        manifest.write_text(json.dumps(data, indent=2) + "\n")


INDEX: dict[str, str | None] = {}


def keep(name: str, model, base: str | None = None, **saving) -> None:
    """Save a model, on its base if one is named, and what it says."""
    folder = OUT / "checkpoints" / name
    sc.save(model, folder, standalone=base is None, **saving)
    found = json.loads((folder / "recipe.json").read_text())["base"]
    assert (found is None) == (base is None), name
    settle(folder)
    expect(name, model if model.dtype == torch.float32 else sc.load(folder, dtype="float32"))
    INDEX[name] = base


def converted(base: str, recipe, **options):
    model = dense(base)
    sc.convert(model, recipe, certify=False, **options)
    cases.randomize_new(model)
    return model


def make_checkpoints(work: Path) -> None:
    R = sc.recipes
    sources = lambda: [dense("llama", seed) for seed in (1, 2)]  # noqa: E731
    camelidae = R.camelidae(4, 2, adapter_dim=4, lora_rank=2)
    keep("camelidae", converted("llama", camelidae), "llama")
    keep("camelidae_standalone", converted("llama", camelidae))
    keep("camelidae_gpt2", converted("gpt2", camelidae), "gpt2")
    keep("molora", converted("llama", R.molora(3, 2)), "llama")
    keep("molora_bert_classifier", converted("bert", R.molora(3, 2, router="sequence")))
    keep("mov", converted("llama", R.mov(4)), "llama")
    keep("mov_released", converted("llama", R.mov(4, variant="released", top_k=2)), "llama")
    keep("mov_t5", converted("t5", R.mov(4)), "t5")
    keep("mixlora", converted("llama", R.mixlora(4, 2, rank=2)), "llama")
    keep("upcycling", converted("llama", R.upcycling(3, 2)))
    keep("upcycling_on_base", converted("llama", R.upcycling(2, 1, renormalize=False)), "llama")
    keep("upcycling_sharded_bfloat16", converted("llama", R.upcycling(3, 2)).bfloat16(),
         shard_size=9000)  # fmt: skip
    keep("drop_upcycling", converted("llama", R.drop_upcycling(3, 2, variant="released")))
    keep("virtual_groups", converted("llama", R.virtual_groups(2, granularity=2, top_k=2)))
    keep("btx_sample", converted("llama", R.btx(2, routing="sample"), sources=sources()))
    nexus = converted("llama", R.nexus(2, embedding_dim=6), sources=sources(),
                      domains=torch.eye(6)[:2])  # fmt: skip
    keep("nexus", nexus)
    keep("bam", converted("llama", R.bam(2), sources=sources()))
    keep("bam_shared", converted("llama", R.bam(2, kv="shared")))
    generator = torch.Generator().manual_seed(5)
    new, old = ([torch.randint(low, high, (4, 16), generator=generator) for _ in range(2)]
                for low, high in ((3, 40), (40, VOCAB)))  # fmt: skip
    extended = converted("llama", R.btx(2), sources=sources())
    sc.extend(extended, dense("llama", 3), new, old)
    assert extended.sparsecraft.recipe.edits[0].router.extended == 1
    keep("extended", extended)
    sc.extend(nexus, dense("llama", 3), embedding=torch.eye(6)[2])
    keep("extended_nexus", nexus)
    make_splits(work)
    write(OUT / "checkpoints.json", INDEX)


def make_splits(work: Path) -> None:
    R, calibration = sc.recipes, [(0.25, 0.75), (0.5, 0.625), (1.0, 0.0)]
    model = converted("llama", R.moefication(4, 2))
    sc.set_budget(model, 0.75)
    keep("moefication_budget", model)
    model = converted("llama", R.gmoefication(4, 2))
    cases.choosy(model)
    keep("gmoefication_own_rule", model)
    model = converted("llama", R.lte(4))
    cases.choosy(model)
    model.sparsecraft.running.calibration = calibration
    sc.set_budget(model, 0.4)
    keep("lte_calibrated", model, "llama")
    options = {"steps": 2, "batch_size": 4, "micro_batch": 4, "max_length": 64, "fit_tokens": 256,
               "learning_rate": 1e-2, "progress": False}  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(OUT / "base" / "chat")
    trained = {
        "d2dmoe_trained": R.d2dmoe(4, 0.5, router_dim=4, sparsity_coef=0.01),
        "d2dmoe_attention_trained": R.d2dmoe(4, 0.5, router_dim=4, attention_experts=2),
        "cmoe_trained": R.cmoe(4, 2, shared=1),
        "cmoe_finetuned": R.cmoe(4, 2, shared=1, variant="finetuned"),
    }
    for name, recipe in trained.items():
        model = dense("chat")
        sc.convert(model, recipe, certify=False)
        rows = str(OUT / "rows.jsonl")
        sc.train(model, rows, work / name, tokenizer=tokenizer, **options)
        if name.startswith("d2dmoe"):
            model.sparsecraft.running.calibration = calibration
            sc.set_budget(model, 0.5)
        assert split_layers(model) and model.sparsecraft.running.stages
        keep(name, model)


# ------------------------------------------------------------------------------------- PEFT folders


def make_peft() -> None:
    configs = {
        "mov": (sc.MovConfig(num_experts=4), "llama"),
        "mov_t5": (sc.MovConfig(num_experts=2, top_k=1), "t5"),
        "molora": (sc.MoloraConfig(num_experts=3, r=2), "llama"),
        "pesc": (sc.PescConfig(num_experts=4, top_k=2, adapter_dim=4, lora_r=2), "llama"),
        "hydralora": (sc.SparsecraftConfig(recipe=sc.recipes.hydralora(3, 2)), "gpt2"),
    }
    for name, (config, base) in configs.items():
        model = peft.get_peft_model(dense(base), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(OUT / "peft" / name)
        expect(f"peft_{name}", model.eval())
        PEFT[name] = base
    model = converted("llama", sc.recipes.mixlora(3, 2, rank=2))
    sc.export(model, "peft", OUT / "peft" / "exported_mixlora")
    expect("peft_exported_mixlora", model)
    PEFT["exported_mixlora"] = "llama"
    for name in PEFT:
        settle(OUT / "peft" / name)
    write(OUT / "peft.json", PEFT)


PEFT: dict[str, str] = {}

# ------------------------------------------------------------------------------------- interrupted


class Killed(BaseException):
    pass


def make_training(kind: str, recipe: sc.Recipe) -> None:
    """A run with a state every 5 steps, killed after step 8; then what it comes to."""
    folder, out = OUT / kind, OUT / kind / "out"
    start = dense("chat")
    sc.convert(start, recipe, certify=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(OUT / "base" / "chat")
    sc.save(start, folder / "start", standalone=True, tokenizer=tokenizer)
    settle(folder / "start")
    rows, kept = str(OUT / "rows.jsonl"), trainers.ProgressBar.on_step_end

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise Killed

    trainers.ProgressBar.on_step_end = kill
    with suppress(Killed):
        sc.train(folder / "start", rows, out, **TRAINING)
    trainers.ProgressBar.on_step_end = kept
    settle(folder)
    write(folder / "options.json", TRAINING)
    with tempfile.TemporaryDirectory() as work:
        copy = Path(shutil.copytree(folder, Path(work) / "training"))
        model = sc.load(copy / "start")
        sc.train(model, rows, copy / "out", resume=True, **TRAINING)
        whole = sc.load(copy / "start")
        sc.train(whole, rows, copy / "whole", **TRAINING)
        for (name, a), b in zip(model.state_dict().items(), whole.state_dict().values(),
                                strict=True):  # fmt: skip
            assert torch.equal(a, b), name
        expect(kind, model)


def make_stream() -> None:
    """A conversion tensor by tensor, killed in the middle of the fourth file."""
    folder, base = OUT / "stream", str(OUT / "base" / "llama")
    folder.mkdir()
    recipe, original = sc.recipes.upcycling(2, 1, renormalize=False), tensorfile.write_each
    count = 0

    def kill(path, tensors):
        nonlocal count
        count += 1
        found = original(path, tensors)
        if count == 4:
            path.write_bytes(path.read_bytes()[:-100])
            raise Killed
        return found

    tensorfile.write_each = kill
    with suppress(Killed):
        streaming.convert_files(base, recipe, folder / "out", **STREAM)
    tensorfile.write_each = original
    write(folder / "options.json", STREAM)
    write(folder / "recipe.json", to_json(recipe))
    with tempfile.TemporaryDirectory() as work:
        copy = Path(shutil.copytree(folder, Path(work) / "stream"))
        streaming.convert_files(base, recipe, copy / "out", resume=True, **STREAM)
        expect("stream", sc.load(copy / "out"))


def main() -> None:
    logging.getLogger("sparsecraft").setLevel("ERROR")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shutil.rmtree(OUT, ignore_errors=True)
    make_recipes()
    make_keys()
    make_bases()
    with tempfile.TemporaryDirectory() as work:
        make_checkpoints(Path(work))
    make_peft()
    make_training("training", sc.recipes.camelidae(4, 2, adapter_dim=4, lora_rank=2))
    make_training("training_dealt", sc.recipes.upit(2, 1))
    make_stream()


if __name__ == "__main__":
    main()
