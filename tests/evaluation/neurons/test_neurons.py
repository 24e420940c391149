"""Statistics and scores of neurons are what a hand computes; planted modules are found, and absent
ones are not; a model without neurons is the model with zeros in their places.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.logprobs import label_logprobs
from sparsecraft.evaluation.neurons import neurons as module
from sparsecraft.evaluation.neurons.neurons import Ranking, analyze_neurons
from sparsecraft.evaluation.neurons.overlaps import (
    by_random_clusters,
    clusters_of,
    enriched,
    overlap,
)
from sparsecraft.evaluation.neurons.page import drawings, write_page
from sparsecraft.evaluation.neurons.pruning import random_like, share_to_prune, without
from sparsecraft.evaluation.neurons.scores import SCORES, beyond_chance, top
from sparsecraft.evaluation.neurons.sources import right_of, run, sources_of
from sparsecraft.evaluation.neurons.statistics import Statistics, neurons_of, statistics_of
from tests import tiny
from tests.cases import dense
from tests.evaluation.analysis.test_analyze import batches

FAMILIES = ["llama", "gpt2", "opt", "phi3", "gemma"]


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_each_token(family):
    model, given = dense(family), batches()
    neurons = neurons_of(model)
    found = statistics_of(model, neurons, {"a": given[:1], "b": given[1:]}, label_logprobs)
    seen = {path: [] for path in neurons.networks}
    for batch in given:
        for ids, mask in zip(batch["input_ids"], batch["token_mask"], strict=True):
            handles = [
                network.down.module.register_forward_pre_hook(
                    lambda module, args, path=path: seen[path].append(args[0].detach())
                )
                for path, network in neurons.networks.items()
            ]
            with torch.no_grad():
                model(ids[mask][None])
            for handle in handles:
                handle.remove()
    documents = [
        torch.cat([seen[path][i].reshape(-1, seen[path][i].shape[-1]) for path in seen], -1)
        for i in range(5)
    ]
    for domain, own in enumerate((documents[:2], documents[2:])):
        a_TN = torch.cat(own).double()
        wanted = {
            "absolute": a_TN.abs(), "active": (a_TN > 0).double(), "root": a_TN.abs().sqrt(),
            "mean": a_TN, "square": a_TN**2,
        }  # fmt: skip
        assert found.tokens_D[domain] == len(a_TN)
        for moment, values_TN in wanted.items():
            got_N = found.means[moment][domain]
            torch.testing.assert_close(got_N, values_TN.mean(0), rtol=1e-4, atol=1e-6)
        std_N = a_TN.std(0, correction=0)
        torch.testing.assert_close(found.std_DN[domain], std_N, rtol=1e-3, atol=1e-6)
    each_RN = torch.stack([a_TN.abs().mean(0) for a_TN in documents])
    torch.testing.assert_close(found.documents_RN, each_RN, rtol=1e-4, atol=1e-6)
    assert found.domain_R.tolist() == [0, 0, 1, 1, 1]


def planted(documents_RN: torch.Tensor, domain_R: torch.Tensor) -> Statistics:
    """As if each document were one token."""
    rows = [documents_RN[domain_R == d].double() for d in range(int(domain_R.max()) + 1)]
    of = {
        "absolute": torch.abs, "active": lambda a: (a > 0).double(),
        "root": lambda a: a.abs().sqrt(), "mean": lambda a: a, "square": lambda a: a**2,
    }  # fmt: skip
    means = {name: torch.stack([f(row).mean(0) for row in rows]) for name, f in of.items()}
    tokens_D = torch.tensor([len(row) for row in rows], dtype=torch.float64)
    return Statistics(tokens_D, means, documents_RN.abs(), domain_R)


def test_scores_by_formula():
    torch.manual_seed(0)
    domain_R = torch.tensor([0] * 3 + [1] * 5 + [2] * 7)
    a_RN = torch.randn(15, 6).double()
    found, own, others = planted(a_RN, domain_R), a_RN[domain_R == 1], a_RN[domain_R != 1]
    wanted = {
        "abs": own.abs().mean(0) / (others.abs().mean(0) + 1e-3),
        "freq": (own > 0).double().mean(0) / ((others > 0).double().mean(0) + 1e-3),
        "sqrt": own.abs().sqrt().mean(0) / (others.abs().sqrt().mean(0) + 1e-3),
        "std": own.std(0, correction=0) / (others.std(0, correction=0) + 1e-3),
        "rms": (own**2).mean(0).sqrt() / ((others**2).mean(0).sqrt() + 1e-3),
        "mean": (own.mean(0) - others.mean(0)).abs(),
    }
    assert wanted.keys() == SCORES.keys()
    for name, score_N in wanted.items():
        torch.testing.assert_close(SCORES[name](found, 1), score_N)


def test_a_reference_takes_the_place_of_the_others():
    torch.manual_seed(0)
    domain_R = torch.tensor([0] * 3 + [1] * 5 + [2] * 7)
    a_RN = torch.randn(15, 6).double()
    found = replace(planted(a_RN, domain_R), reference=2)
    own, others = a_RN[domain_R == 1], a_RN[domain_R == 2]
    assert list(found.compared) == [0, 1]
    wanted_N = own.abs().mean(0) / (others.abs().mean(0) + 1e-3)
    torch.testing.assert_close(SCORES["abs"](found, 1), wanted_N)
    wanted_N = own.std(0, correction=0) / (others.std(0, correction=0) + 1e-3)
    torch.testing.assert_close(SCORES["std"](found, 1), wanted_N)


def test_planted_modules_are_found_and_absent_ones_are_not():
    """Ten of a hundred neurons do twice as much for domain 0; in other models none does."""
    domain_R, false = torch.tensor([0] * 20 + [1] * 20), 0
    for seed in range(100):
        torch.manual_seed(seed)
        a_RN = 1 + 0.3 * torch.randn(40, 100)
        false += beyond_chance(planted(a_RN, domain_R), 0).any().item()
    assert false <= 10  # five are expected at most
    a_RN[:20, :10] *= 2
    found = planted(a_RN, domain_R)
    found_N = beyond_chance(found, 0)
    assert found_N[:10].all() and found_N[10:].sum() <= 2  # one in twenty may be false
    for name in ("abs", "sqrt", "rms", "mean"):
        assert top(SCORES[name](found, 0), 0.1).nonzero().flatten().tolist() == list(range(10))
    assert beyond_chance(planted(a_RN[[0, 20]], torch.tensor([0, 1])), 0) is None


def test_clusters_of_weights_are_found_and_random_ones_are_not():
    model = dense("llama")
    network = next(iter(neurons_of(model).networks.values()))
    F, E = network.hidden_width, 4
    torch.manual_seed(0)
    with torch.no_grad():  # neurons e, E+e, 2E+e, ... are alike
        for linear in (network.gate, network.up):
            centers_ED = torch.randn(E, linear.in_features)
            labels_F = torch.arange(F) % E
            noise_FD = 0.05 * torch.randn(F, linear.in_features)
            linear.module.weight.copy_(centers_ED[labels_F] + noise_FD)
    labels_F = clusters_of(network, E)
    chosen_F = torch.arange(F) % E == 2
    found = enriched(labels_F, chosen_F)
    assert len(found["found"]) == 1 and found["inside"] == 1 and found["clusters"] == E
    false = 0
    for seed in range(100):
        torch.manual_seed(seed)
        drawn_F = torch.rand(F) < 0.2
        false += bool(enriched(labels_F, drawn_F)["found"])
    assert false <= 10
    assert len(by_random_clusters(labels_F, chosen_F)["found"]) <= 1


def test_overlap_and_shares():
    first, second = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    assert overlap(first, second) == 0.5 and overlap(first, first) == 1
    score_N = torch.tensor([5.0, 4, 1, 0, 9, 8, 7, 6])
    layers_N = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert top(score_N, 0.5).tolist() == [False] * 4 + [True] * 4
    assert top(score_N, 0.5, layers_N).tolist() == [True, True, False, False] * 2
    assert random_like(first).sum() == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_that_are_left_out_are_zeros_in_the_weights(family):
    model, ids = dense(family), torch.randint(3, 90, (2, 7))
    neurons = neurons_of(model)
    torch.manual_seed(0)
    gone_N = torch.rand(sum(neurons.widths)) < 0.3
    with torch.no_grad():
        before = model(ids).logits
        with without(neurons, gone_N):
            found = model(ids).logits
        assert torch.equal(before, model(ids).logits)
        parts = gone_N.split(neurons.widths)
        for network, gone_F in zip(neurons.networks.values(), parts, strict=True):
            network.down.weight()[:, gone_F] = 0  # a view
        torch.testing.assert_close(found, model(ids).logits)
    assert not torch.allclose(found, before)


def test_the_share_that_costs_a_fifth():
    share, there = share_to_prune(lambda part: 1 - part, 1.0)
    assert 0.2 <= share <= 0.221 and there <= 0.8
    assert share_to_prune(lambda part: 0.9, 1.0) == (1.0, 0.9)  # it never falls
    share, there = share_to_prune(lambda part: 0.5 if part > 0.3 else 1.0, 1.0)
    assert share == pytest.approx(0.3, abs=1e-3) and there == 0.5


def learn(model, tokenizer, rows) -> None:
    """A few steps, so that there is accuracy to lose."""
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(
            **{k: given[k] for k in ("input_ids", "attention_mask")}, labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def interrupted(*args):
    raise KeyboardInterrupt


def test_a_model_of_two_domains(tmp_path, monkeypatch):
    rows = tiny.chat_rows(40)
    files = [
        tiny.write_rows(tmp_path / f"{name}.jsonl", part)
        for name, part in (("a", rows[:20]), ("b", rows[20:]))
    ]
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    learn(model, tokenizer, rows)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = analyze_neurons(model, files, tokenizer=tokenizer)
    json.dumps(found, allow_nan=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert found["neurons"] == 128 and found["domains"] == files and len(found["layers"]) == 2
    for which in ("model", "twin"):
        for kind in ("overlap", "overlap_by_layer"):
            assert [found[which][kind][d][d] for d in range(2)] == [1, 1]
        assert [sum(shares) for shares in found[which]["by_layer"]] == pytest.approx([1, 1])
        assert [len(layer["domains"]) for layer in found[which]["clusters"]] == [2, 2]
    for domain, row in enumerate(found["pruning"]):
        assert 0 < row["share"] <= 1 and len(row["accuracy"]) == 2
        assert row["accuracy"][domain] <= 0.8 < max(row["accuracy_random"])
    written = write_page(found, drawings(found), tmp_path / "report", "Neurons")
    assert {"overlaps.png", "places.png", "clusters.png", "pruned.png"} < set(written)
    with pytest.raises(DataError, match="one domain"):
        analyze_neurons(model, files[:1], tokenizer=tokenizer)
    with pytest.raises(SparsecraftError, match="Did you mean"):
        analyze_neurons(model, files, tokenizer=tokenizer, ranking=Ranking("asb"))
    monkeypatch.setattr(module, "_pruned", interrupted)
    found = analyze_neurons(model, files, tokenizer=tokenizer)
    assert found["twin"] and "pruning" not in found
    assert write_page(found, drawings(found), tmp_path / "part", "Neurons")
    monkeypatch.undo()
    third = tiny.write_rows(tmp_path / "c.jsonl", rows[10:30])
    beside = analyze_neurons(model, files, tokenizer=tokenizer, ranking=Ranking(reference=third))
    assert beside["domains"] == files and beside["reference"] == third
    assert len(beside["model"]["overlap"]) == len(beside["pruning"]) == 2 < len(beside["tokens"])
    assert write_page(beside, drawings(beside), tmp_path / "beside", "Neurons")
    with pytest.raises(SparsecraftError, match="encoder and a decoder"):
        analyze_neurons(dense("t5"), files, tokenizer=tokenizer)


# ------------------------------------------------------------------ encoders and images
def two_files(tmp_path) -> list[str]:
    rows = tiny.chat_rows(40)
    parts = rows[:20], rows[20:]
    return [tiny.write_rows(tmp_path / f"{n}.jsonl", part) for n, part in enumerate(parts)]


def bert(kind: str):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=64, vocab_size=512)
    return getattr(transformers, kind)(config).eval()


def test_an_encoder_has_neurons_and_no_accuracy(tmp_path):
    found = analyze_neurons(bert("BertModel"), two_files(tmp_path), tokenizer=tiny.tokenizer())
    assert found["neurons"] == 128 and len(found["layers"]) == 2
    assert "pruning" not in found and found["twin"]["overlap"]
    assert write_page(found, drawings(found), tmp_path / "page", "Neurons")


def test_means_of_an_encoder_leave_padding_out(tmp_path):
    model, tokenizer = bert("BertModel"), tiny.tokenizer()
    text = [{"text": "say red"}, {"text": "say red and blue and green"}]
    files = [tiny.write_rows(tmp_path / f"{n}.jsonl", text) for n in range(2)]
    neurons = neurons_of(model)
    sources = sources_of(model, files, tokenizer, None, None)
    found = statistics_of(model, neurons, sources, run)
    alone = [tokenizer(row["text"], return_tensors="pt") for row in text]
    tokens = sum(given["input_ids"].numel() for given in alone)
    assert found.tokens_D.tolist() == [tokens, tokens]
    first = model.encoder.layer[0]
    total_F = 0
    for given in alone:
        with torch.no_grad():
            x = first.attention(model.embeddings(input_ids=given["input_ids"]))[0]
            total_F = total_F + first.intermediate(x)[0].sum(0)
    assert torch.allclose(found.means["mean"][0, :64].float(), total_F / tokens, atol=1e-5)


def test_a_masked_language_model_is_right_about_what_is_hidden(tmp_path):
    model, tokenizer = bert("BertForMaskedLM"), tiny.tokenizer()
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(3)
    files = two_files(tmp_path)
    (batch, *_) = sources_of(model, files, tokenizer, None, None)[files[0]]
    hidden = batch["labels"] != -100
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(batch["labels"][hidden], special).any()
    assert 0.05 < hidden.float().mean() < 0.3 and (batch["input_ids"][hidden] == 3).all()
    right = right_of(model, batch)
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    best = model(**given).logits.argmax(-1)
    assert right.tolist() == (best == batch["labels"])[hidden].tolist()
    found = analyze_neurons(model, files, tokenizer=tokenizer)
    assert len(found["pruning"]) == 2


def images(kind: int, labels: bool) -> list[dict]:
    torch.manual_seed(kind)
    batch = {"pixel_values": torch.randn(6, 3, 16, 16) + 2 * kind}
    return [batch | ({"labels": torch.full((6,), kind)} if labels else {})] * 2


@pytest.mark.parametrize("labels", [True, False])
def test_images_by_batches(labels, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=64, image_size=16, patch_size=8, num_labels=2)
    model = ViTForImageClassification(config).eval()
    data = {"dark": images(0, labels), "light": images(1, labels)}
    found = analyze_neurons(model, data)
    assert found["domains"] == ["dark", "light"] and found["tokens"] == [2 * 6 * 5] * 2
    assert ("pruning" in found) == labels
    assert write_page(found, drawings(found), tmp_path / "page", "Neurons")
    with pytest.raises(SparsecraftError, match="pixel_values"):
        analyze_neurons(model, two_files(tmp_path))
    with pytest.raises(DataError, match="'dark' has no batch"):
        analyze_neurons(model, {"dark": [], "light": images(1, labels)})
    with pytest.raises(DataError, match="one domain"):
        analyze_neurons(model, {"dark": images(0, labels)})
    with pytest.raises(SparsecraftError, match="cut the batches"):
        analyze_neurons(model, data, limit=3)


def test_networks_that_read_merged_patches_have_means_over_their_own():
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4,
        num_labels=2,
    )  # fmt: skip
    model = SwinForImageClassification(config).eval()
    found = statistics_of(model, neurons_of(model), {"a": images(0, False)}, run)
    assert 0 < found.means["active"].max() <= 1


def test_padding_of_given_batches_is_no_token_and_names_are_there_once(tmp_path):
    model, ids = bert("BertModel"), torch.arange(5, 31).reshape(2, 13)
    mask = torch.arange(13).expand(2, 13) < torch.tensor([[13], [6]])
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    sources = sources_of(model, {"a": [batch], "b": [batch]}, None, None, None)
    assert statistics_of(model, neurons_of(model), sources, run).tokens_D.tolist() == [19, 19]
    files = two_files(tmp_path)
    for given, reference in (([files[0]] * 2, None), (files, files[0])):
        with pytest.raises(DataError, match="twice"):
            ranking = Ranking(reference=reference)
            analyze_neurons(model, given, tokenizer=tiny.tokenizer(), ranking=ranking)
