"""What of a converted model a standard architecture has to have: one mixture in every layer, and
the attention of the dense model around it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsecraft.moe.layer import MoELayer
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.experts import FFNSpec
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.scorers import Linear, Normal
from sparsecraft.recipe.selections import Sample, Soft, Token, TopK
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.record import conversion_of

# The standard form that a model with split networks has.
MERGE_PARTS = (
    "sc.merge(model) makes it a dense model again, which transformers writes as it is; "
    "sc.set_budget(model, 1.0) first."
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A mixture of full feed-forward networks, alike in every layer.

    Attributes:
        num_experts, top_k: experts, and how many of them a token meets.
        width: hidden width F of an expert.
        normalized: whether the k weights sum to one; otherwise they are the softmax over all.
        shared: hidden width of the dense network beside the experts; 0 where they replace it.
        gated: whether that network is multiplied by the sigmoid of a learned row.
        temperature: divides the router's logits.
    """

    num_experts: int
    top_k: int
    width: int
    normalized: bool
    shared: int = 0
    gated: bool = False
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The dense model around the mixtures.

    Attributes:
        family: its model_type.
        head_dim: width of one head.
        qkv_bias, out_bias: whether its projections have biases.
        qk_norm: whether queries and keys are normalized.
        windows: tokens that each layer sees; None for all.
        scaled: whether embeddings, residuals and logits have Granite's multipliers.
    """

    family: str
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    scaled: bool


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite")


def attention_of(config: Any) -> Attention | str:
    """The attention that a dense model's configuration describes, or why no target fits."""
    family = config.model_type
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        return f"no standard MoE has the blocks of {family!r}; those of {known} have one."
    biased = family == "qwen2" or bool(read_field(config, "attention_bias"))
    window, types = read_field(config, "sliding_window"), read_field(config, "layer_types")
    if types is None:
        types = ["sliding_attention"] * config.num_hidden_layers
    return Attention(
        family=family,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        qkv_bias=biased,
        out_bias=biased and family != "qwen2",
        qk_norm=family == "qwen3",
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        scaled=family == "granite",
    )


def read_field(config: Any, name: str) -> Any:
    """A field of a configuration, if its family has such a field; None otherwise.

    transformers keeps whatever a config.json says, and other families' fields do nothing.
    """
    known = inspect.signature(type(config).__init__).parameters
    return getattr(config, name, None) if name in known else None


def form_of(model: nn.Module) -> Form | str:
    """The mixture in every layer of a converted model, or why no standard architecture fits."""
    record = conversion_of(model)
    if splits(record.recipe):
        return (
            "its experts are parts of one network that add up, and a standard architecture mixes "
            f"whole networks by weights of a softmax. sc.save keeps it as it is; {MERGE_PARTS}"
        )
    edits = record.recipe.edits
    if reason := next(filter(None, map(_why_not_standard, edits)), None):
        later = next((stage.name for stage in record.recipe.stages if stage.router), None)
        more = f" A stage puts in another: sparsecraft train --stages {later}." if later else ""
        return reason + more
    if any(_parts(edit) != _parts(edits[0]) for edit in record.recipe.layers):
        by_layer = "; ".join(str(by) for edit in edits for by in edit.by_layer)
        which = f" ({by_layer})" if by_layer else ""
        return f"its layers differ from each other{which}, and those of a standard one are alike."
    if isinstance(reason := attention_of(model.config), str):
        return reason
    if model.get_output_embeddings() is None:
        return f"a {type(model).__name__} has another head than a language model's."
    if len(record.layers) != model.config.num_hidden_layers:
        return (
            f"{len(record.layers)} of {model.config.num_hidden_layers} layers are converted, and "
            "those of a standard architecture are all alike; convert with paths='*'."
        )
    return _form(record.layers[0], edits[0], model.config)


def _form(layer: MoELayer, edit: Edit, config: Any) -> Form | str:
    bank, router = layer.experts, edit.router
    if not bank.gated:
        return "its networks have no gate, and those of a standard architecture do."
    if bank.gate_up_bias is not None or bank.down_bias is not None:
        return "the model has mlp_bias=True, and no standard architecture has biases there."
    if bank.activation.state_dict():
        return "each expert has tensors in its activation, which those of no standard one have."
    if layer.router.scorer.weight_rows() is None:
        return f"its {router.scorer.kind} scorer is more than a matrix at inference."
    top_k = bank.num_experts if router.slots is None else router.slots
    # At inference `sample` takes the best expert with weight one.
    normalized = (
        router.sums_to_one or isinstance(router.select, Sample) or top_k == bank.num_experts
    )
    return Form(
        num_experts=bank.num_experts,
        top_k=top_k,
        width=bank.down.shape[-1],
        normalized=normalized,
        shared=config.intermediate_size if edit.adds else 0,
        gated=router.gates_base,
        temperature=router.temperature,
    )


def _parts(edit: Edit) -> tuple:
    return edit.experts, edit.place, edit.router


def _why_not_standard(edit: Edit) -> str | None:
    """Why no linear top-k mixture of feed-forward networks is this edit."""
    if edit.experts.materializes:
        return (
            f"its {edit.experts.kind!r} experts share tensors, and those of a standard "
            "architecture do not; `sparsecraft export --materialize`, or "
            "sparsecraft.interop.materialize.materialize(model), makes them full networks."
        )
    if not (edit.experts.standard and (edit.replaces or edit.adds)):
        return (
            f"its {edit.experts.kind!r} experts stand {edit.place} a dense module, and a standard "
            "architecture has nothing but full feed-forward experts, instead of the dense network "
            "or beside it. `upcycling` on a Llama or Mistral model exports exactly."
        )
    router = edit.router
    if router is None:
        return "it has no router."
    if not isinstance(router.select, (TopK, Soft, Sample)):
        return (
            f"it selects experts by {router.select.kind!r}, and a standard router takes the k best."
        )
    odd = {
        f"select.first_soft={True!r}": router.select == Sample(first_soft=True),
        f"decides={router.decides.kind!r}": router.decides != Token(),
        f"reads={router.reads!r}": router.reads != "input",
        f"standardize={router.standardize!r}": router.standardize is not None,
        f"select.balance={router.select.balance!r}": router.select.balance is not None,
    }
    if found := next((words for words, differs in odd.items() if differs), None):
        return f"its router has {found}, which no standard router has."
    return None


def splits(recipe: Recipe) -> bool:
    """Whether the experts of a recipe are parts of dense networks."""
    return any(edit.experts.parts for edit in recipe.edits)


def imported(form: Form, title: str) -> Recipe:
    """The recipe of a mixture that was made elsewhere.

    Args:
        title: what it was called there.
    """
    other_width = form.shared and form.shared != form.width
    return Recipe(
        name="imported",
        title="A mixture that was made elsewhere",
        paper=f"Imported from {title}",
        variant="paper",
        exact_at_start=False,
        edits=(
            Edit(
                site="ffn",
                place="beside" if form.shared else "replace",
                experts=FFNSpec(
                    num_experts=form.num_experts, width=form.width if other_width else None
                ),
                router=RouterSpec(
                    scorer=Linear(start=Normal()),
                    select=TopK(form.top_k, renormalize=form.normalized),
                    gates_base=form.gated,
                ),
            ),
        ),
        # Of upcycling: a checkpoint does not record how its mixture was trained elsewhere.
        stages=(Stage(trains=("all",), losses={"switch": 0.01}, learning_rate=1e-4),),
    )
