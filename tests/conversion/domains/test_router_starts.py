"""What routers start from: embeddings of domains, mean inputs and centers; and what is refused."""

from __future__ import annotations

import gzip
import json

import numpy
import pytest
import torch
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.conversion.domains import domain as reading
from sparsecraft.conversion.domains.domain import Domain
from sparsecraft.conversion.domains.router_starts import embed_domains
from sparsecraft.data.sentences import embed
from sparsecraft.dense.packaged import alias_folder
from sparsecraft.errors import DataError, RecipeError, SparsecraftError
from sparsecraft.evaluation.report import describe
from sparsecraft.moe.init.centers import Centers
from tests import tiny
from tests.cases import VOCAB, dense, layers, moved

SUBJECTS = {
    "sums": ["add three and four", "what is nine times two", "divide ten by five"],
    "seas": ["the sea is deep and blue", "ships sail over the ocean"],
    "cats": ["a cat sleeps in the sun", "kittens chase a red ball", "the dog barks", "milk"],
}
TEXTS = list(SUBJECTS.values())
WIDTH = 16  # of the tiny sentence encoder


def files(folder) -> list[str]:
    return [
        tiny.write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts])
        for name, texts in SUBJECTS.items()
    ]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return tiny.save_encoder(tmp_path_factory.mktemp("encoder"), WIDTH)


def nexus(experts: int, encoder: str) -> sc.Recipe:
    return sc.recipes.nexus(experts, encoder=encoder, embedding_dim=WIDTH)


def base(folder):
    return sc.hub.load_dense(tiny.save_dense(folder / "base"))


def batches(seed: int, sizes=((3, 9), (2, 5)), low: int = 3, high: int = VOCAB) -> list[dict]:
    """Token ids and masks, padded left and right."""
    generator, found = torch.Generator().manual_seed(seed), []
    for number, (B, S) in enumerate(sizes):
        ids_BS = torch.randint(low, high, (B, S), generator=generator)
        mask_BS = torch.ones_like(ids_BS)
        mask_BS[0, : 2 + number] = 0
        mask_BS[-1, -1] = 0
        found.append({"input_ids": ids_BS, "attention_mask": mask_BS})
    return found


# ----------------------------------------------------------------------------- sentence embeddings


def test_each_expert_gets_the_mean_embedding_of_its_domain_in_order(tmp_path, encoder):
    wanted_EM = torch.stack([embed(texts, encoder).mean(0) for texts in TEXTS])
    model = base(tmp_path)
    report = sc.convert(model, nexus(3, encoder), domains=files(tmp_path))
    for layer in layers(model):
        torch.testing.assert_close(layer.router.scorer.domains, wanted_EM)
        rows_ED = layer.router.scorer.rows()[:3]
        assert rows_ED.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-5)
    assert [name.rsplit("/")[-1] for name in report.domains] == [f"{n}.jsonl" for n in SUBJECTS]
    turned = base(tmp_path)
    sc.convert(turned, nexus(3, encoder), domains=TEXTS[::-1])
    torch.testing.assert_close(layers(turned)[0].router.scorer.domains, wanted_EM.flip(0))
    assert turned.sparsecraft.report["conversion"]["domains"] == ("4 texts", "2 texts", "3 texts")


@pytest.mark.minilm
def test_the_packaged_encoder_is_what_nexus_reads_by_default(tmp_path):
    if not alias_folder("minilm").exists():
        pytest.skip("minilm is absent: run `make model`, which fetches it")
    model = base(tmp_path)
    sc.convert(model, sc.recipes.nexus(3), domains=TEXTS)
    found_EM = layers(model)[0].router.scorer.domains
    torch.testing.assert_close(found_EM, torch.stack([embed(texts).mean(0) for texts in TEXTS]))
    cat, kitten, sum_ = embed(["A cat sleeps.", "The kitten naps.", "Add three and four."])
    assert cat @ kitten > 0.5 > 0.2 > cat @ sum_


def test_domains_are_saved_and_named(tmp_path, encoder):
    model = base(tmp_path)
    sc.convert(model, nexus(3, encoder), domains=files(tmp_path))
    sc.save(model, tmp_path / "out")
    loaded = sc.load(tmp_path / "out")
    for ours, theirs in zip(layers(model), layers(loaded), strict=True):
        assert torch.equal(ours.router.scorer.domains, theirs.router.scorer.domains)
        assert theirs.router.scorer.domains.dtype == torch.float32
    lines = "\n".join(describe(tmp_path / "out"))
    assert "The routers started from, one for each expert: " in lines and "seas.jsonl; " in lines
    plain = base(tmp_path)
    sc.convert(plain, sc.recipes.nexus(3))
    sc.save(plain, tmp_path / "plain")
    assert "random embeddings; no domains" in "\n".join(describe(tmp_path / "plain"))


def test_without_domains_the_conversion_says_so(caplog):
    caplog.set_level("WARNING", "sparsecraft")
    sc.convert(dense("llama"), sc.recipes.nexus(3, embedding_dim=8))
    assert "No domains are given: the embeddings are random" in caplog.text


def test_chats_are_embedded_whole_and_long_sets_are_sampled_evenly(tmp_path, monkeypatch):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(10)]
    with gzip.open(tmp_path / "chat.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(reading, "ROWS", 4)
    domain = Domain.of(tmp_path / "chat.jsonl.gz")
    assert sorted(domain.texts()) == [f"question {i}\n\nanswer {i}" for i in (0, 2, 5, 7)]
    assert domain.name.endswith("chat.jsonl.gz (4 of 10 rows)")


def test_the_model_reads_of_a_domain_no_more_than_so_many_tokens(tmp_path, monkeypatch):
    model, texts = base(tmp_path), [f"{word} {word}" for word in tiny.WORDS * 4]
    monkeypatch.setattr(reading, "TOKENS", 60)
    read = list(reading.domain_batches(model, Domain.of(texts), None))
    tokens = [int(batch["token_mask"].sum()) for batch in read]
    assert sum(tokens[:-1]) < 60 <= sum(tokens) and len(read) < len(texts) // 8
    monkeypatch.setattr(reading, "LENGTH", 2)
    assert all(
        b["input_ids"].shape[1] == 2 for b in reading.domain_batches(model, Domain.of(texts), None)
    )


def test_embeddings_of_ones_own_are_taken_as_they_are():
    model, given_EM = dense("llama"), torch.randn(3, 8)
    report = sc.convert(model, sc.recipes.nexus(3, embedding_dim=8), domains=given_EM)
    assert all(torch.equal(layer.router.scorer.domains, given_EM) for layer in layers(model))
    assert report.domains == ("embedding 0", "embedding 1", "embedding 2")


# --------------------------------------------------------------------------- the model's own states


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "t5"])
def test_a_model_embeds_by_the_mean_of_its_last_hidden_states(family):
    model, given = dense(family), [batches(1), batches(2)]
    wanted = []
    for domain in given:
        states = []
        for batch in domain:
            for ids_S, mask_S in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                inputs = {"input_ids": ids_S[None], "attention_mask": mask_S[None]}
                with torch.no_grad():
                    inner = model.get_encoder() if family == "t5" else model.base_model
                    hidden_SD = inner(**inputs).last_hidden_state[0]
                states += [h for h, real in zip(hidden_SD, mask_S, strict=True) if real]
        wanted.append(F.normalize(torch.stack(states).mean(0), dim=0))
    sc.convert(model, sc.recipes.nexus(2, encoder="self"), domains=given)
    for layer in layers(model):
        torch.testing.assert_close(
            layer.router.scorer.domains, torch.stack(wanted), rtol=1e-4, atol=1e-5
        )


def test_the_models_own_embeddings_of_texts(tmp_path):
    model = base(tmp_path)
    found_EM = embed_domains(TEXTS, "self", model)
    tokenizer, wanted = tiny.tokenizer(), []
    for texts in TEXTS:
        ids = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
        with torch.no_grad():
            bos = tokenizer("a")["input_ids"][:1] == [1]
            states = [
                model.model(torch.tensor([i if bos else i[1:]])).last_hidden_state[0] for i in ids
            ]
        wanted.append(F.normalize(torch.cat(states).mean(0), dim=0))
    torch.testing.assert_close(found_EM, torch.stack(wanted), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------- starts of linear routers


def inputs_of_ffns(model, domain: list[dict]) -> list[list[torch.Tensor]]:
    """For each FFN of a Llama what it reads of every real token, one sequence at a time."""
    read: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for batch in domain:
        for ids_S, mask_S in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen = {}
            hooks = [
                block.post_attention_layernorm.register_forward_hook(
                    lambda module, args, output, n=n, seen=seen: seen.update({n: output[0]})
                )
                for n, block in enumerate(model.model.layers)
            ]
            with torch.no_grad():
                model(input_ids=ids_S[None], attention_mask=mask_S[None])
            for hook in hooks:
                hook.remove()
            for n, x_SD in seen.items():
                read[n] += [x for x, real in zip(x_SD, mask_S, strict=True) if real]
    return read


@pytest.mark.parametrize("recipe", ["upcycling", "nexus"])
def test_rows_start_from_the_centered_means_of_what_the_router_reads(recipe):
    made = {
        "upcycling": sc.recipes.upcycling(num_experts=3),
        "nexus": sc.recipes.nexus(3, "linear"),
    }[recipe]
    model, given = dense("llama"), [batches(seed) for seed in range(3)]
    means = [[torch.stack(x).mean(0) for x in inputs_of_ffns(model, domain)] for domain in given]
    changed = sc.override(made, {"router.init": "hidden", "router.init_std": 0.05})
    sc.convert(model, changed, domains=given)
    for n, layer in enumerate(layers(model)):
        of_domains_ED = torch.stack([of_layers[n] for of_layers in means])
        wanted_ED = of_domains_ED - of_domains_ED.mean(0)
        wanted_ED = wanted_ED * 0.05 / (wanted_ED**2).mean() ** 0.5
        torch.testing.assert_close(layer.router.scorer.weight, wanted_ED, rtol=1e-3, atol=1e-4)
        weight_ED = layer.router.scorer.weight
        assert weight_ED.square().mean().sqrt().item() == pytest.approx(0.05, rel=1e-4)


def test_rows_start_from_a_regression_on_the_real_tokens():
    """By numpy, on the inputs of every sequence alone: padding does not count."""
    model, given = dense("llama"), [batches(seed) for seed in range(3)]
    read = [inputs_of_ffns(model, domain) for domain in given]
    recipe = sc.override(
        sc.recipes.upcycling(num_experts=3), {"router.start": "ridge", "start.scale": 4.0}
    )
    sc.convert(model, recipe, domains=given)
    for n, layer in enumerate(layers(model)):
        x = [torch.stack(of_layers[n]).double().numpy() for of_layers in read]
        y = [numpy.repeat(numpy.eye(3)[[e]], len(of_domain), 0) for e, of_domain in enumerate(x)]
        x, y = numpy.concatenate(x), numpy.concatenate(y)
        wanted = numpy.linalg.solve(x.T @ x + 0.01 * numpy.eye(x.shape[1]), x.T @ y).T
        wanted = 4.0 * (wanted - wanted.mean(0))
        found = layer.router.scorer.weight.detach().double().numpy()
        numpy.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_without_training_tokens_go_to_the_expert_of_their_domain(family):
    """Two dense models, each of other words: held-out sequences of each."""
    halves = [{"low": 3, "high": 20}, {"low": VOCAB - 17, "high": VOCAB}]
    sizes = ((8, 12),) * 8
    domains = [batches(seed, sizes, **half) for seed, half in enumerate(halves)]
    shares = {}
    for start in ("ridge", "normal"):
        model = dense(family)
        recipe = sc.override(sc.recipes.btx(2), {"router.start": start, "router.select.k": 1})
        given = {"domains": domains} if start == "ridge" else {}
        sc.convert(model, recipe, sources=[moved(family, 1, 0.01), moved(family, 2, 0.01)], **given)
        for e, half in enumerate(halves):
            for batch in batches(10 + e, ((4, 10),), **half):
                inputs = {"input_ids": batch["input_ids"]}
                if family == "t5":
                    inputs["decoder_input_ids"] = batch["input_ids"]
                with torch.no_grad(), sc.trace(model) as routing:
                    model(**inputs)
                chosen = torch.cat([r.indices_TK.flatten() for r in routing.values()])
                shares[start, e] = (chosen == e).double().mean().item()
    assert min(shares["ridge", 0], shares["ridge", 1]) > 0.7
    assert shares["ridge", 0] + shares["ridge", 1] > 1.65
    assert shares["normal", 0] + shares["normal", 1] < 1.4


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "t5"])
@pytest.mark.parametrize("init", ["hidden", "kmeans", "ridge"])
def test_other_families_start_from_data_too(family, init):
    recipe = sc.override(sc.recipes.upcycling(num_experts=2), {"router.init": init})
    model = dense(family)
    report = sc.convert(model, recipe, domains=[batches(1), batches(2)])
    assert report.certificate.exact
    for layer in layers(model):
        weight_ED = layer.router.scorer.weight
        if init != "ridge":  # which keeps the regression's own size
            assert weight_ED.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
        if init != "kmeans":
            torch.testing.assert_close(weight_ED.sum(0), torch.zeros(32), atol=1e-6, rtol=0)


def test_prompts_in_python_tell_domains_apart(tmp_path):
    model = base(tmp_path)
    recipe = sc.override(sc.recipes.upcycling(num_experts=3, top_k=1), {"router.init": "hidden"})
    sc.convert(model, recipe, domains=TEXTS)
    weight_ED = layers(model)[0].router.scorer.weight
    assert weight_ED.isfinite().all() and not torch.equal(weight_ED[0], weight_ED[1])


def test_centers_follow_a_stream_of_clusters():
    torch.manual_seed(0)
    wanted_ED = 10 * torch.eye(4, 6)
    stream = [wanted_ED[torch.randint(4, (50,))] + 0.1 * torch.randn(50, 6) for _ in range(20)]
    found = Centers(4, seed=1)
    for part in (stream[0][:2], stream[0][2:], *stream[1:]):
        found.take(part)
    distances = torch.cdist(found.centers().float(), wanted_ED)
    assert distances.amin(0).max() < 0.1 and distances.amin(1).max() < 0.1
    x_TD = torch.cat(stream).double()
    nearest_T = torch.cdist(x_TD, found.centers()).argmin(1)
    means = torch.stack([x_TD[nearest_T == e].mean(0) for e in range(4)])
    torch.testing.assert_close(found.centers(), means)  # far clusters: the same tokens throughout
    few = Centers(3)
    few.take(torch.randn(2, 6))
    with pytest.raises(DataError, match="2 tokens have no 3 centers"):
        few.centers()
    with pytest.raises(DataError, match="too few different ones for 3"):
        Centers(3).take(torch.ones(5, 6))


def test_kmeans_reads_data_where_there_are_no_domains():
    recipe = sc.override(sc.recipes.upcycling(num_experts=4), {"router.init": "kmeans"})
    found = []
    for data in (batches(1), batches(1), batches(2)):
        model = dense("llama")
        sc.convert(model, recipe, data)
        found.append(layers(model)[0].router.scorer.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# ----------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_and_the_model_stays_dense(tmp_path, encoder):
    def refused(match, domains, recipe=None, error=RecipeError, **options):
        model = dense("llama")
        recipe = nexus(3, encoder) if recipe is None else recipe
        with pytest.raises(error, match=match):
            sc.convert(model, recipe, domains=domains, **options)
        assert not hasattr(model, "sparsecraft")

    hidden = sc.override(sc.recipes.upcycling(num_experts=3), {"router.init": "hidden"})
    kmeans = sc.override(sc.recipes.upcycling(num_experts=3), {"router.init": "kmeans"})
    refused("2 domains are given for 3 experts", TEXTS[:2])
    refused("2 domains are given for 3 experts", TEXTS[:2], hidden)
    refused("no router of recipe 'upcycling' reads them", TEXTS, sc.recipes.upcycling())
    refused("start='hidden' .* give domains=", (), hidden)
    refused("start='hidden' .* give domains=", torch.randn(3, 384), hidden)
    refused("start='kmeans' .* data=", (), kmeans)
    ridge = sc.override(sc.recipes.upcycling(num_experts=3), {"router.start": "ridge"})
    refused("start='ridge' .* give domains=", (), ridge)
    with pytest.raises(RecipeError, match="penalty is 0"):
        sc.override(ridge, {"start.penalty": 0.0})
    for recipe, domains in ((sc.recipes.upcycling(), ()), (kmeans, TEXTS)):
        unread = {"data": "nowhere.jsonl", "certify": False, "tokenizer": tiny.tokenizer()}
        refused("certify=False .* compares nothing", domains, recipe, **unread)
    refused(
        r"are \(3, 8\) and the router takes \(3, 16\)", torch.randn(3, 8), None, SparsecraftError
    )
    refused(
        "Domains 0 .2 texts. and 2 .2 texts. are the same",
        [TEXTS[1], ["a"], TEXTS[1]],
        None,
        DataError,
    )
    refused(
        "embeds texts, and a domain is given as batches",
        [batches(n) for n in range(3)],
        None,
        DataError,
    )
    refused("holds nothing", [["a"], [], ["b"]], None, DataError)
    refused("is text; pass the model's tokenizer", TEXTS, hidden, DataError)
    refused(
        r"none\.jsonl",
        [str(tmp_path / "none.jsonl"), *TEXTS[:2]],
        None,
        SparsecraftError,
    )


def test_the_command_takes_sources_and_domains(tmp_path, capsys, encoder):
    folders = [tiny.save_dense(tmp_path / name) for name in ("base", "math", "code")]
    paths = files(tmp_path)
    argv = ["convert", "nexus", "--model", folders[0], "--sources", *folders[1:]]
    argv += ["--encoder", encoder, "--embedding-dim", str(WIDTH)]
    argv += ["--domains", *paths[:2], "--out", str(tmp_path / "out")]
    assert main(argv) == 0, capsys.readouterr().err
    assert "Routers start from " in capsys.readouterr().out
    model = sc.load(tmp_path / "out")
    wanted_EM = torch.stack([embed(texts, encoder).mean(0) for texts in TEXTS[:2]])
    torch.testing.assert_close(layers(model)[0].router.scorer.domains, wanted_EM)
    assert main([*argv, "--overwrite", "--no-certify", "--data", paths[0]]) == 1
    assert "and --no-certify compares nothing" in capsys.readouterr().err
    argv[argv.index("--domains") + 1 : argv.index("--out")] = paths
    assert main([*argv, "--overwrite"]) == 1
    assert "3 domains are given for 2 experts" in capsys.readouterr().err


def test_the_command_takes_prompts(tmp_path, capsys, encoder):
    folders = [tiny.save_dense(tmp_path / name) for name in ("base", "math", "code")]
    prompts = ["say red two| say blue one", "=|write | read=it"]
    texts = [["say red two", "say blue one"], ["=", "write", "read=it"]]
    hidden = ["--set", "router.init=hidden"]
    sources = ["--sources", *folders[1:]]
    sentences = ["--encoder", encoder, "--embedding-dim", str(WIDTH)]
    given = {
        "nexus": (["nexus", *sources, *sentences], nexus(2, encoder), folders[1:]),
        "btx": (["btx", *sources, *hidden], sc.recipes.btx(2), folders[1:]),
        "upcycling": (["upcycling", *hidden], sc.recipes.upcycling(num_experts=2), ()),
    }
    for name, (argv, recipe, models) in given.items():
        # An option said twice has all its values, whatever stands between.
        said = ["--prompts", prompts[0], "--model", folders[0], "--prompts", prompts[1]]
        argv = ["convert", *argv, *said, "--out", str(tmp_path / name)]
        assert main(argv) == 0, capsys.readouterr().err
        assert "Routers start from 2 texts, 3 texts." in capsys.readouterr().out
        model = sc.hub.load_dense(folders[0])
        changes = {} if name == "nexus" else {"router.init": "hidden"}
        sc.convert(model, sc.override(recipe, changes), sources=models, domains=texts)
        loaded = sc.load(tmp_path / name).state_dict()
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded[key]), key


def test_prompts_that_cannot_be_meant_are_refused_before_the_model_is_loaded(
    tmp_path, capsys, monkeypatch
):
    base, data = tiny.save_dense(tmp_path / "base"), files(tmp_path)[:2]
    monkeypatch.setattr(sc.hub, "load_dense", None)

    def refused(match, recipe, *argv):
        out = ["--model", base, "--out", str(tmp_path / "out")]
        assert main(["convert", recipe, *out, *argv]) == 1
        assert match in capsys.readouterr().err

    for option, given in (("--prompts", ["a|b", "c"]), ("--domains", data)):
        for recipe in ("btx", "upcycling", "molora"):
            refused("--set router.start=hidden", recipe, option, *given)
        refused("is not for --stream", "btx", option, *given, "--stream")
    refused("both say what the routers start", "nexus", "--domains", *data, "--prompts", "a", "b")
    refused(
        "prompt 1 of expert 1 is empty (both from 0), in 'c| '", "nexus", "--prompts", "a", "c| "
    )
    refused("prompt 0 of expert 0 is empty", "nexus", "--prompts", "", "c")
    refused(
        "2 domains are given for 3 experts", "nexus", "--num-experts", "3", "--prompts", "a", "b"
    )
    refused("--domains or --prompts", "btx", "--set", "router.init=hidden")


def test_loras_start_their_routers_from_prompts(tmp_path, capsys):
    from tests.conversion.sources.test_lora_folder import FFN, adapter

    base = tiny.save_dense(tmp_path / "base")
    loras = [adapter(base, tmp_path / str(n), n, target_modules=FFN) for n in range(2)]
    argv = [
        "convert",
        "molora",
        "--model",
        base,
        "--sources",
        *loras,
        "--prompts",
        "red|two",
        "sea",
    ]
    argv += ["--set", "router.init=hidden", "--out", str(tmp_path / "out")]
    assert main(argv) == 0, capsys.readouterr().err
    for layer in layers(sc.load(tmp_path / "out")):
        weight_ED = layer.router.scorer.weight
        assert weight_ED.any() and layer.experts.lora_A.any()
        torch.testing.assert_close(
            weight_ED.sum(0), torch.zeros_like(weight_ED[0]), atol=1e-6, rtol=0
        )
