"""One decoding step of a model, compiled whole and captured in a CUDA graph.

Shapes: B sequences, L positions of the cache, V words.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from sparsecraft.dense.tokens import CACHES
from sparsecraft.kernels.device import compiled_step, version
from sparsecraft.moe import operators
from sparsecraft.moe.decoding.graphs import backend

log = logging.getLogger("sparsecraft")

# Positions of a cache: one of few sizes, because each is compiled anew. A step reads all of them.
FIRST_LENGTH, GROWTH = 512, 4
WARM_UP = 3  # steps before a capture: kernels choose their shapes, and libraries their memory
MANY = 1024  # compiled forms of one function: of each model and size one


def cache_length(positions: int) -> int:
    """The size of a cache that has at least these positions."""
    length = FIRST_LENGTH
    while length < positions:
        length *= GROWTH
    return length


class Step:
    """The model's next logits for B sequences, from what its own tensors hold.

    Attributes:
        cache: keys and values of L positions in every layer, windowed layers too: their mask hides
            what is out of the window.
        positions: L.
        token_B1, position_B1: what the step reads. It counts its position up.
        mask_BL: which positions hold no padding; None where no sequence has any.
        logits_BV: float32, of the latest step.
        state, versions: see `state_of`; what the step was made for.
        compiled: whether one graph of the compiler is the step; None where that was not tried.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, padded: bool, compiles: bool):
        device = model.device
        operators.number(model)
        self.state, self.versions = state_of(model)
        self.positions = length
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(length) for _ in range(layers)])
        self.token_B1 = torch.zeros((batch, 1), dtype=torch.long, device=device)
        self.position_B1 = torch.zeros_like(self.token_B1)
        self.mask_BL: Tensor | None = None
        if padded:
            self.mask_BL = torch.ones((batch, length), dtype=torch.long, device=device)
        self.compiled: bool | None = None
        self._replay: Callable[[], Any] | None = None
        self._function: Callable[[nn.Module], Tensor] = self._forward
        self.logits_BV = self._forward(model)  # which gives the cache its memory
        if compiles:
            self._compile(model)
        if device.type == "cuda":
            self._capture(model)

    def fits(self, model: nn.Module) -> bool:
        """Whether the step is still the model's; with other values of its tensors it is made so."""
        state, versions = state_of(model)
        if state != self.state:
            return False
        if versions != self.versions and self._replay is not None:
            self._capture(model)
        self.versions = versions
        return True

    def __call__(self, model: nn.Module) -> None:
        """Read a token, and count one up.

        Args:
            model: the one that the step was made for, which it does not hold.
        """
        if self._replay is None:
            self.logits_BV = self._function(model)
        else:
            self._replay()

    def start(self, mask_BS: Tensor | None) -> None:
        """Forget all positions; the first S are those of prompts with this padding."""
        self.cache.reset()
        if self.mask_BL is not None:
            self.mask_BL.fill_(1)[:, : mask_BS.shape[1]] = mask_BS

    def _forward(self, model: nn.Module) -> Tensor:
        given = {cache_name(model): self.cache, "position_ids": self.position_B1}
        if self.mask_BL is not None:
            given["attention_mask"] = self.mask_BL
        output = model(input_ids=self.token_B1, use_cache=True, return_dict=True, **given)
        self.position_B1.add_(1)
        return output.logits[:, -1].float()

    def _compile(self, model: nn.Module) -> None:
        """Let one graph of the compiler be the step, if the model allows it."""
        start, (batch, length) = time.perf_counter(), (len(self.token_B1), self.positions)
        log.info(
            "Compiling a decoding step of batch %d and up to %d positions, which later calls use; "
            "model.generation_config.disable_compile = True leaves that out.", batch, length,
        )  # fmt: skip
        compiled = torch.compile(self._forward, fullgraph=True, dynamic=False, backend=backend)
        compiled = quiet()(compiled_step()(compiled))  # at every call: both are in its guards
        self.compiled = False
        try:
            self.logits_BV = compiled(model)
        except Exception as error:  # of the compiler's many kinds
            log.debug("A decoding step was not compiled: %s", error)
            return
        self._function, self.compiled = compiled, True
        log.info("Compiled in %.0f s.", time.perf_counter() - start)

    def _capture(self, model: nn.Module) -> None:
        """Keep the kernels of a step, which then run without Python."""
        self._replay = None  # the memory of an older graph
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.cache.reset()
                self._function(model)
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.reset()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile.
        with (
            _given_back(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self.logits_BV = self._function(model)
        self._replay = graph.replay


@contextmanager
def _given_back() -> Iterator[None]:
    """The current stream and the state of random numbers as they were, after a capture that fails:
    it leaves both within it."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    stream, state = torch.cuda.current_stream(), generator.clone_state()
    try:
        yield
    except Exception:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """The compiler without its warnings, and without its limit to how often it compiles a function
    that stands in many models."""
    with (
        warnings.catch_warnings(),
        torch._dynamo.config.patch(recompile_limit=MANY, accumulated_recompile_limit=MANY),
    ):
        warnings.simplefilter("ignore")
        yield


def cache_name(model: nn.Module) -> str | None:
    """What a model calls the cache that it is given; None where it takes none by name."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in parameters), None)


def state_of(model: nn.Module) -> tuple[list, list]:
    """What a captured step was made for and would not notice: other memory of a weight, another
    value of an option; and how often every tensor was written, on which depends what is computed
    once and kept. A model that trains, or has hooks of others, has no step."""
    config = model.config
    found: list[Any] = [config._attn_implementation, config.to_json_string(use_diff=False)]
    versions = []
    for module in model.modules():
        held = vars(module)
        found.append(held.get("forward", type(module).forward))
        found += [_seen(value) for name, value in held.items() if name not in OF_TORCH]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found += _memory(tensor)
                versions.append(version(tensor))
    return found, versions


OF_TORCH = frozenset(vars(nn.Module()))


def _seen(value: Any) -> Any:
    """What of a module's attribute tells that it is another: an option as it is, also in
    containers, such as the scales and active adapters of PEFT's layers; a tensor's memory."""
    if _is_option(type(value)):
        return value
    if isinstance(value, dict):
        return tuple((name, _seen(inner)) for name, inner in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_seen(inner) for inner in value)
    return _memory(value) if isinstance(value, Tensor) else None


def _memory(tensor: Tensor) -> tuple[int, torch.dtype]:
    try:
        return tensor.data_ptr(), tensor.dtype
    except RuntimeError:  # of a subclass that has none of its own
        return id(tensor), tensor.dtype


@functools.cache
def _is_option(kind: type) -> bool:
    frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    return kind in (bool, int, float, str, type(None)) or frozen
