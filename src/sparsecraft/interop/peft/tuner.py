"""The PEFT tuner: puts the layers of a recipe into a model, and its tensors into a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from sparsecraft.checkpoint.adapter_names import PREFIX, WRAPPED, check_complete, standings
from sparsecraft.dense.donors import Linear
from sparsecraft.dense.sites import Site
from sparsecraft.errors import CheckpointError, SparsecraftError, SurgeryError
from sparsecraft.interop.peft.layer import ExpertsTunerLayer, layers_of, saved_names, taken_out
from sparsecraft.interop.peft.merged import fold_adapters
from sparsecraft.moe.batches import Batches, attach, batches_of
from sparsecraft.moe.context import asks_for_batch
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.own_loss import OwnLoss
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.build import build_layer
from sparsecraft.surgery.plan import PlannedEdit, plan
from sparsecraft.surgery.record import is_converted

Planned = list[tuple[PlannedEdit, MoELayer]]


class RecipeTuner(BaseTuner):
    """Adapters that are recipes: each is planned on the dense model, whatever else is in it."""

    prefix = PREFIX
    tuner_layer_cls = ExpertsTunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _hooks: list | tuple = ()
    own_loss: OwnLoss | None = None

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter; `state_dict`, from which PEFT guesses targets, is not needed.

        Raises:
            SurgeryError, DonorError, RecipeError: the plan is impossible, as in `sc.convert`.
        """
        if is_converted(model):
            raise SurgeryError(
                "This model is converted already; give PEFT the dense one (sc.revert), or write "
                'the converted one with sc.export(model, "peft", dir).'
            )
        config = self.peft_config[adapter_name]
        before = layers_of(model)
        if before and isinstance(model, PeftModel):
            raise SurgeryError(
                "This PeftModel has adapters of ours already, and another one around it would not "
                "see what they stand on. Call its add_adapter(name, config), or its unload() first."
            )
        required = {p: p.requires_grad for m in before for p in m.sparsecraft_moe.parameters()}
        device = "meta" if low_cpu_mem_usage else None
        with taken_out(model):
            items = plan(model, config.checked_recipe())
            planned = [(item, build_layer(model, item, device=device)) for item in items]
            for item, layer in planned:
                layer.train(model.get_submodule(item.site.path).training)
        if getattr(model, "_hf_peft_config_loaded", False):
            _check_names([item.site for item, _ in planned], before)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        trains = adapter_name in self.active_adapters and not config.inference_mode
        for _, layer in planned:
            layer.requires_grad_(trains)
        with taken_out(model) as layers:
            self._add(adapter_name, planned, layers)
        self._give_batch(model, [layer for item, layer in planned if asks_for_batch(item.edit)])
        if self.own_loss is None:  # behind the batch's hooks
            self.own_loss = OwnLoss(self._stage)
            self.own_loss.attach(model)
        for parameter, value in required.items():
            parameter.requires_grad_(value)

    def _add(self, adapter_name: str, planned: Planned, layers: list[ExpertsTunerLayer]) -> None:
        """Let the layer at each site hold its part of the adapter; extend `layers` by new ones."""
        standing = {layer.standing: layer for layer in layers}
        disabled = any(layer.disable_adapters for layer in layers)
        places = standings([item.site for item, _ in planned])
        for place, (item, moe) in zip(places, planned, strict=True):
            if place not in standing:
                layer = ExpertsTunerLayer(item.site, place[1], *_widths(item))
                layer._active_adapter = list(self.active_adapters)
                layer._disable_adapters, layer.training = disabled, moe.training
                standing[place] = layer
                layers.append(layer)
                self.targeted_module_names.append(item.site.path)
            standing[place].sparsecraft_moe[adapter_name] = moe

    def _give_batch(self, model: nn.Module, asking: list[MoELayer]) -> None:
        """Give the layers that read it what the batch knows of its tokens."""
        known = batches_of(model)
        batches = known or Batches()
        if asking and not known:
            self._hooks = attach(model, batches)
        for layer in asking:
            layer.batches = batches

    def _stage(self) -> Stage | None:
        """Whose losses the model's own loss holds: the first stage of the active adapters'
        recipes that has any."""
        recipes = [self.peft_config[name].checked_recipe() for name in self.active_adapters]
        stages = [stage for recipe in recipes for stage in recipe.stages]
        return next((s for s in stages if isinstance(s, Stage) and s.losses), None)

    def _create_and_replace(self, *args, **kwargs) -> None:
        raise NotImplementedError("inject_adapter puts all layers in at once.")

    def merge_adapter(self, *args, **kwargs) -> None:
        """Refused: merged weights belong to all adapters of a module, and this keeps them apart."""
        raise SparsecraftError(
            "merge_adapter keeps the adapters beside the merged weights, for unmerge_adapter to "
            "take them out again, and a recipe's layers change weights that others share; "
            "merge_and_unload merges for good."
        )

    def unmerge_adapter(self) -> None:
        """Refused: nothing is ever merged that still has its adapter."""
        raise SparsecraftError(
            "There is nothing to unmerge: merge_and_unload leaves no adapter, and merge_adapter "
            "is refused; load the base again."
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        with taken_out(self.model) as layers:
            if merge:  # whatever safe_merge says, a merge is checked
                names = self.active_adapters if adapter_names is None else adapter_names
                fold_adapters(self.model, self.peft_config, names, layers)
            layers.clear()
        for hook in self._hooks:
            hook.remove()
        self.own_loss.remove()
        return super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names=adapter_names
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SparsecraftError(
                "These adapters cannot be mixed in one batch (adapter_names); call set_adapter "
                "and run one batch for each."
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls, model, config, adapter_name, state_dict, unwanted_adapter_names
    ) -> dict[str, Tensor]:
        names = saved_names(model, adapter_name)
        # PEFT has dropped what has another adapter's name, such as "0", anywhere in its path.
        dropped = model.state_dict() if not names.keys() <= state_dict.keys() else {}
        tensors = {}
        for name, saved in names.items():
            tensors[saved] = state_dict[name] if name in state_dict else dropped[name]
            if tensors[saved].numel() == 0:
                raise CheckpointError(
                    f"{name!r} is empty in this process. Gather it before saving, and give the "
                    f"adapters names that are no part of a module's: {unwanted_adapter_names}."
                )
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # saved_names has done it; as text the name may be part of a module's path

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model, config, adapter_name, state_dict
    ) -> dict[str, Tensor]:
        names = {
            WRAPPED + saved.removeprefix(WRAPPED): name
            for name, saved in saved_names(model, adapter_name).items()
        }
        found = {WRAPPED + key.removeprefix(WRAPPED): value for key, value in state_dict.items()}
        check_complete(found, names, f"The file of adapter {adapter_name!r}")
        return {names.get(key, key): value for key, value in found.items()}


def _widths(item: PlannedEdit) -> tuple[int, int]:
    """Input and output features of the whole module that an edit acts on, or on some rows of."""
    donor = item.donor
    whole = replace(donor, rows=None) if isinstance(donor, Linear) else donor
    return whole.in_features, whole.out_features


def _check_names(sites: list[Site], before: list[ExpertsTunerLayer]) -> None:
    """Refuse what transformers' own `load_adapter` would leave at random values, and only log.

    It reads a file by the names that its tensors have in a model with this adapter alone.
    """
    own = Counter(site.members for site in sites)
    for layer in before:
        members, level = layer.site.members, layer.level
        around = members in own or any(layer.site.contains(site) for site in sites)
        if around and level >= own[members]:
            raise SurgeryError(
                f"Another adapter stands around parts of this one, at {layer.site.path!r}, and "
                "the load_adapter of a transformers model would not find its tensors there; load "
                "both through peft.PeftModel."
            )
