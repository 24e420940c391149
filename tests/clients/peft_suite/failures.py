"""Which of PEFT's own tests fail with our configurations, and why: the one list.

`make peft-suite` holds it: a failure that does not stand here, a listed one that passes or fails
for another reason, and a count that is not right are errors. docs/guides/peft.md prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

VERSION = "0.21.2"

ROUTED = ("pesc", "pesc_lora", "mov", "mov_top1", "molora", "molora_top1", "hydralora", "mixlora")
NO_MERGE = (*ROUTED, "smola", "adapter")
BALANCED = ("pesc", "pesc_lora", "mixlora")
AT_ATTENTION = ("mov", "mov_top1", "ia3")
LINEAR = ("lora", "camel", "ia3")


@dataclass(frozen=True)
class Failure:
    """Tests that fail for one reason.

    Attributes:
        tests: globs over `file::Class::function`, of files without `test_` and `.py`.
        words: in the message of the failure.
        reason: for docs/guides/peft.md.
        count: how many there are.
        configurations: their names; all, unless given.
        cases: globs over what stands between the brackets of the id.
    """

    tests: tuple[str, ...]
    words: str
    reason: str
    count: int
    configurations: tuple[str, ...] = ()
    cases: tuple[str, ...] = ("*",)

    def ids(self) -> list[str]:
        """The ids of the tests, as globs: what is between brackets has a configuration too."""
        ends = "" if self.cases == ("*",) else f"[{' or '.join(self.cases)}]"
        return [f"{glob}{ends}" for glob in self.tests]

    def is_of(self, nodeid: str) -> bool:
        """Whether the id of a test, as pytest prints it, is meant."""
        name, _, case = nodeid.rpartition("/test_")[2].replace(".py::", "::").partition("[")
        case = case.removesuffix("]")
        ours = not self.configurations or set(self.configurations) & set(case.split("-"))
        named = any(fnmatchcase(name, glob) for glob in self.tests)
        fits = any(fnmatchcase(case, glob) for glob in self.cases)
        return bool(ours) and named and fits


FAILURES = (
    Failure(
        (
            "*_models::*::test_merge_layers",
            "custom_models::*::test_merge_layers_is_*",
            "custom_models::*::test_disable_adapters_with_merging",
            "custom_models::*::test_delete_merged_adapter_*",
            "custom_models::*::test_forward_*float16*",
        ),
        "merge_adapter keeps the adapters beside the merged weights",
        "`merge_adapter` is refused, and these tests call it; `merge_and_unload` of what is linear "
        "is in our own tests",
        187,
    ),
    Failure(
        (
            "*_models::*::test_merge_layers_fp16",
            "*_models::*::test_merge_layers_multi",
            "*_models::*::test_merge_layers_nan",
            "custom_models::*::test_safe_merge",
        ),
        "merge_and_unload cannot merge",
        "`merge_and_unload` is refused: a router's weights depend on the token, or an adapter has "
        "an activation inside",
        84,
        NO_MERGE,
    ),
    Failure(
        ("decoder_models::*::test_merge_layers_nan",),
        "gives weights that are not finite; nothing was merged",
        "weights that are not finite are refused, by a `MergeError` in our words; the tests ask "
        "for a `ValueError` in PEFT's",
        6,
        LINEAR,
    ),
    Failure(
        ("decoder_models::*::test_merge_layers*",),
        "unexpected keyword argument 'target_modules'",
        "these tests give `target_modules=['fc_out']` to every method; a recipe says where layers "
        "stand, and our configurations have no such field",
        52,
        cases=("*-GPTJForCausalLM",),
    ),
    Failure(
        ("*_models::*_gradient_checkpointing",),
        "Use use_reentrant=False",
        "reentrant checkpointing is refused where the recipe has a balance loss, which would have "
        "no gradient; with `use_reentrant=False` these tests pass",
        36,
        BALANCED,
        ("True-*",),
    ),
    Failure(
        ("feature_extraction_models::*",),
        "has no attention of a known form",
        "DeBERTa's attention (keys, queries and values in one matrix, mixed by head) has no known "
        "form, and vectors at keys and values have no place; DeBERTa v2 passes",
        45,
        AT_ATTENTION,
        ("*-DebertaModel",),
    ),
    Failure(
        ("*coder_models::*::test_get_base_model_state_dict",),
        "AssertionError",
        "a real one: around siblings that no module holds together (`fc1` and `fc2`), PEFT derives "
        "names of dense tensors from where they are now, such as `fc1.first.weight`; take the "
        "state dict of the dense model before, or `unload()`",
        8,
        ("pesc", "pesc_lora", "adapter", "mixlora"),
        ("*-*OPT*", "*-*Bart*"),
    ),
    Failure(
        ("*coder_models::*::test_get_base_model_state_dict",),
        "AssertionError",
        "a real one, the same around a Linear and its activation",
        15,
        AT_ATTENTION,
        ("*-*OPT*", "*-*GPT*", "*-*T5*", "*-*Bart*"),
    ),
    Failure(
        ("custom_models::*",),
        "MLP has no ",
        "a bare MLP has no blocks, and so no place for experts (`DonorError`)",
        155,
        cases=("*-MLP",),
    ),
    Failure(
        ("custom_models::*::test_merge_layers_is_deterministic_in_train_mode",),
        "make a new configuration instead of changing one",
        "this test changes `dropout` of a configuration that is made; its recipe would still say "
        "the old rate",
        5,
        ("pesc", "pesc_lora", "molora", "molora_top1"),
    ),
    Failure(
        ("custom_models::*::test_only_params_are_updated",),
        "assert not True",
        "the test asks three steps of SGD to move every tensor by 1e-4: a router whose one chosen "
        "weight is renormalized to 1 has no gradient, and SMoLA's soft router a smaller one",
        2,
        ("molora_top1", "smola"),
    ),
    Failure(
        ("config::*::test_from_pretrained_cache_dir",),
        "cannot find the requested files",
        "reads the hub into an empty cache, and this run has no hub",
        13,
    ),
    Failure(
        ("config::*::test_from_peft_type",),
        "SparsecraftConfig needs a recipe",
        "makes a configuration of every type that PEFT knows without arguments; "
        "`SparsecraftConfig` must be given a recipe",
        1,
    ),
)
PASSED, SKIPPED = 4501, 1265


def of(nodeid: str) -> list[Failure]:
    """What is listed for a test."""
    return [failure for failure in FAILURES if failure.is_of(nodeid)]
