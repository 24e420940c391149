"""Faults that readers of the code thought of, most of them once alive: what each is, and where."""

from __future__ import annotations

from pathlib import Path

from benchmarks.mutation.operators import Mutant

# (what, file below src/sparsecraft, text, what stands in its place)
NAMED: tuple[tuple[str, str, str, str], ...] = (
    (
        "BTX's loss has no gradient through u",
        "moe/losses.py",
        "_mean(routing.weights_TE().float(), routing, mask_T)",
        "_mean(routing.weights_TE().float().detach(), routing, mask_T)",
    ),
    (
        "drop-upcycling draws from the statistics of all rows",
        "moe/init/neurons.py",
        "mean, deviation = old.mean(), old.std(correction=0)",
        "mean, deviation = tensor.float().mean(), tensor.float().std(correction=0)",
    ),
    (
        "imitations are as sparse at the start as at the end",
        "training/fit/regression.py",
        "spec.sparsity * progress * square.mean()",
        "spec.sparsity * square.mean()",
    ),
    (
        "k-means of the up rows of a gated network",
        "moe/init/banks.py",
        'bank.dense()["first"][: bank.neurons.numel()].float()',
        'bank.dense()["first"][-bank.neurons.numel() :].float()',
    ),
    (
        "targets are scaled by those of shared experts too",
        "training/fit/regression.py",
        "inputs[n], wanted[n][:, layers[n].router.spec.shared :], spec, degree_of(layers[n])\n"
        "            )",
        "inputs[n], wanted[n], spec, degree_of(layers[n])\n"
        "            )[:, layers[n].router.spec.shared :]",
    ),
    (
        "weighting `scaled` counts shared experts",
        "moe/routers/gate.py",
        "p_TR * (p_TR.shape[-1] / self.k)",
        "p_TR * (self.num_experts / self.k)",
    ),
    (
        "the captured mass counts shared experts",
        "training/fit/fit.py",
        "wanted_TR = wanted_TE[:, shared:].to(device)",
        "wanted_TR = wanted_TE[:, : len(wanted_TE[0]) - shared].to(device)",
    ),
    (
        "the mean of sources is taken in their dtype",
        "conversion/sources/source.py",
        "torch.promote_types(first.dtype, torch.float32)",
        "first.dtype",
    ),
    (
        "the constant of a split bank is kept after an edit",
        "moe/experts/split.py",
        "if self._kept is None or self._kept[0] != state:",
        "if self._kept is None:",
    ),
    (
        "camelidae trains at ten times the rate",
        "recipes/camelidae.py",
        "learning_rate=2e-4",
        "learning_rate=2e-3",
    ),
    (
        "bam has no z-loss",
        "recipes/bam.py",
        '{"switch": balance_coef, "z": z_coef}',
        '{"switch": balance_coef}',
    ),
    (
        "nexus takes its other tensors from the base",
        "recipes/nexus.py",
        'others="mean"',
        'others="base"',
    ),
    (
        "drop-upcycling's balance loss is divided by K",
        "recipes/drop_upcycling.py",
        '"switch_unnormalized"',
        '"switch"',
    ),
    (
        "an upcycled expert is a tenth short",
        "moe/experts/ffn.py",
        'by_name = {"down": [down]',
        'by_name = {"down": [0.9 * down]',
    ),
    (
        "a dropped slot counts as the load of the last expert",
        "moe/routing.py",
        "empty_TE.scatter_add(-1, self.indices_TK, ones_TK)",
        "empty_TE.scatter_add(-1, self.indices_TK.clamp(max=self.num_experts - 1), ones_TK)",
    ),
    (
        "LTE's scores are judged at 0.25",
        "moe/losses.py",
        "LTE_THRESHOLD, LTE_EPSILON = 0.5, 1e-2",
        "LTE_THRESHOLD, LTE_EPSILON = 0.25, 1e-2",
    ),
    (
        "LoRA's scale is alpha",
        "moe/experts/lora.py",
        "spec.alpha / spec.rank",
        "spec.alpha",
    ),
)


def named(root: Path) -> list[Mutant]:
    """The mutants of `NAMED`.

    Raises:
        ValueError: the text is not there, or more than once.
    """
    found = []
    for about, file, old, new in NAMED:
        source = (root / file).read_text()
        if source.count(old) != 1:
            raise ValueError(f"{about}: {file} has {source.count(old)} times {old!r}")
        start = source.index(old)
        found.append(Mutant(file, source.count("\n", 0, start) + 1, start, old, new, about))
    return found
