"""What each router of a model reads on given data, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.tokens import is_encoder_decoder, is_sequence_first, reads
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.masks import of_frames, of_rows
from sparsecraft.moe.outputs import evaluation_mode
from sparsecraft.surgery.plan import PlannedEdit


def read_inputs(
    model: nn.Module,
    items: Sequence[PlannedEdit],
    batches: Iterable[dict[str, Any]],
    take: Callable[[list[Tensor]], None],
) -> None:
    """Give `take`, for every batch, what the router of each item reads of its real tokens, (T, D),
    and the last hidden states of the real tokens."""
    seen: dict[int, Tensor] = {}
    paths = [item.site.path for item in items]
    whose = [(reads(model, path), is_sequence_first(model, path)) for path in paths]

    def keep(n: int) -> Callable:
        return lambda module, args, kwargs: seen.update(
            {n: args[0] if args else kwargs["hidden_states"]}
        )

    handles = [
        model.get_submodule(item.site.path).register_forward_pre_hook(keep(n), with_kwargs=True)
        for n, item in enumerate(items)
    ]
    try:
        with evaluation_mode(model), torch.no_grad():
            for batch in batches:
                inputs, masks = _inputs(model, batch)
                output = model.base_model(**inputs)
                last = getattr(output, "encoder_last_hidden_state", None)
                last = output.last_hidden_state if last is None else last
                read = [
                    _real(seen[n], masks.get(tokens), turned)
                    for n, (tokens, turned) in enumerate(whose)
                ]
                take([*read, _real(last, masks["input"])])
    finally:
        for handle in handles:
            handle.remove()


def _inputs(
    model: nn.Module, batch: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """The batch as the model takes it, and of whose tokens which are real."""
    inputs = {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in batch.items()
        if isinstance(value, Tensor) and key not in ("labels", "token_mask")
    }
    mask = inputs.get("attention_mask")
    masks = {"input": None if mask is None else of_frames(model, mask)}
    if is_encoder_decoder(model):
        masks["decoder"] = inputs.get("decoder_attention_mask")
        if "decoder_input_ids" not in inputs:  # the decoder reads the same text
            inputs["decoder_input_ids"], masks["decoder"] = inputs["input_ids"], masks["input"]
    return inputs, masks


def _real(x: Tensor, mask_BS: Tensor | None, sequence_first: bool = False) -> Tensor:
    x_TD = x.reshape(-1, x.shape[-1])
    if mask_BS is None:
        return x_TD
    real_T = of_rows(mask_BS, x.shape[:-1], sequence_first)
    if real_T is None:
        raise SparsecraftError(
            f"The batch has a mask of shape {tuple(mask_BS.shape)}, and a router will read tokens "
            f"of shape {tuple(x.shape[:-1])}; give paths of layers that read the masked tokens, "
            "or data without a mask."
        )
    return x_TD[real_T.to(x.device, torch.bool)]
