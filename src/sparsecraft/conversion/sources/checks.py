"""Several dense models of one ancestor: refuse what cannot be one mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from sparsecraft.conversion.sources.source import Source
from sparsecraft.dense.door import MOST_TEXT
from sparsecraft.dense.jsonfile import read_bytes
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.errors import SourceError
from sparsecraft.surgery.record import origin_of

# Fields of a configuration that do not change what the tensors mean.
FREE = set(
    "_name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype "
    "eos_token_id id2label initializer_range label2id max_position_embeddings output_attentions "
    "output_hidden_states pad_token_id pretraining_tp problem_type return_dict torch_dtype "
    "transformers_version use_cache".split()
)

# Cosine of the same matrix in two models: about 0 of models that were trained apart from the start,
# above 0.9 of fine-tuned ones.
KIN = 0.5
# Rows of the matrix that are compared, at most.
ROWS = 1024


def check_sources(
    model: nn.Module,
    sources: Sequence[Source],
    tensors: Mapping[str, Tensor],
    *,
    unrelated: bool = False,
    tokenizer: Path | None = None,
) -> None:
    """Refuse sources that do not fit the base, naming the first thing that differs.

    Args:
        tensors: the base's, by their dense names, of those that will be read; the first matrix
            among them shows whether two models have one ancestor.
        unrelated: let models without a common ancestor pass.
        tokenizer: folder of the base's; None takes the folder that the model was loaded from. A
            model without one has no tokenizer that could differ.

    Raises:
        SourceError: configuration, tokenizer, shapes or ancestry differ.
    """
    origin = origin_of(model)
    base = tokenizer or (origin and origin.folder)
    for source in sources:
        _check_config(model.config, source)
        if base is not None:
            _check_tokenizer(base, source)
        for name, tensor in tensors.items():
            source.check_shape(name, tensor.shape)
        if not unrelated:
            name, ours = next((n, t) for n, t in tensors.items() if t.ndim == 2)
            _check_kin(origin.tensor(model, name) if ours.is_meta else ours, source, name)


def _check_config(base: PreTrainedConfig, source: Source) -> None:
    ours, theirs = base.to_dict(), source.config.to_dict()
    for key in sorted(ours.keys() | theirs.keys() - FREE, key=lambda k: (k != "model_type", k)):
        if key not in FREE and ours.get(key) != theirs.get(key):
            raise SourceError(
                f"{source.name!r} has {key}={theirs.get(key)!r} and the base {ours.get(key)!r}; "
                "experts of one mixture must be models of one architecture."
            )


def _check_tokenizer(base: Path, source: Source) -> None:
    files = _tokenizer_files(base)
    if "tokenizer.json" not in files or files == _tokenizer_files(source.folder):
        return  # the same to a byte: loading both would cost a second
    other = source.tokenizer()
    if other is None:
        return
    ours, theirs = load_tokenizer(base).get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    for token in sorted(ours.keys() | theirs.keys(), key=lambda t: (ours.get(t, theirs.get(t)), t)):
        if ours.get(token) != theirs.get(token):
            raise SourceError(
                f"The token {token!r} is number {theirs.get(token)} in the tokenizer of "
                f"{source.name!r} and {ours.get(token)} in the base's; experts of one mixture must "
                "read the same tokens."
            )


def _tokenizer_files(folder: Path | None) -> dict[str, bytes]:
    paths = folder.glob("*token*.json") if folder else ()
    return {path.name: read_bytes(path, SourceError, MOST_TEXT) for path in paths}


def _check_kin(ours: Tensor, source: Source, name: str) -> None:
    pair = (t[:ROWS].detach().cpu().float().flatten() for t in (ours, source.find(name)))
    cosine = F.cosine_similarity(*pair, dim=0).item()
    if not cosine >= KIN:
        raise SourceError(
            f"{source.name!r} and the base have no common ancestor: the cosine of their "
            f"{name!r} is {cosine:.3f}, and of fine-tuned models it is above 0.9. A mixture of "
            "unrelated networks computes nothing; pass unrelated=True to join them all the same."
        )
