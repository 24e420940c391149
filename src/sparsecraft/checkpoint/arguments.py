"""What of `from_pretrained`'s arguments a checkpoint of ours takes.

Other programs pass nearly all of them, most with values that ask for nothing (`gguf_file=None`).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from sparsecraft.errors import CheckpointError

# They say where files come from or how they are read, and change nothing about the model.
OF_FILES = frozenset(
    "cache_dir code_revision commit_hash _commit_hash force_download _from_auto "
    "_from_pipeline ignore_mismatched_sizes local_files_only low_cpu_mem_usage mirror _fast_init "
    "offload_state_dict proxies resume_download revision subfolder token tqdm_class "
    "trust_remote_code use_safetensors weights_only".split()
)
# How the model runs and where it lies.
OF_THE_MODEL = frozenset(
    "attn_implementation disable_mmap experts_implementation max_memory offload_buffers "
    "offload_folder".split()
)
# Fields of a configuration that change what a call gives back, and not what is computed.
OF_CALLS = frozenset(
    "id2label label2id output_attentions output_hidden_states problem_type return_dict "
    "use_cache".split()
)
WHOLE = "a checkpoint is read from its own files, as they are"
LATER = "load the model, and apply it then"
REFUSED = {
    "quantization_config": "the recipe says how the base is quantized; convert with "
    "backbone='nf4' on a base that is loaded so",
    "gguf_file": WHOLE,
    "state_dict": WHOLE,
    "key_mapping": WHOLE,
    "variant": WHOLE,
    "from_tf": WHOLE,
    "from_flax": WHOLE,
    "load_in_4bit": "the recipe says how the base is quantized",
    "load_in_8bit": "the recipe says how the base is quantized",
    "distributed_config": LATER,
    "device_mesh": LATER,
    "tp_plan": LATER,
    "tp_size": LATER,
    "use_kernels": LATER,
    "kernel_config": LATER,
    "allow_all_kernels": LATER,
    "fusion_config": LATER,
}


def meant(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that ask for something which a checkpoint can give.

    Raises:
        CheckpointError: one asks for something else, or has a name that nothing knows.
    """
    found = {}
    for name, value in kwargs.items():
        if name in OF_THE_MODEL:
            found |= {} if value is None else {name: value}
        elif name in REFUSED:
            if value is not None and value is not False:
                raise CheckpointError(f"Loading takes no {name}={value!r:.80}: {REFUSED[name]}.")
        elif name not in OF_FILES:
            raise CheckpointError(
                f"Loading knows no argument {name!r}: it is none of from_pretrained's, and no "
                "field of the model's configuration."
            )
    return found


def is_another(config: PreTrainedConfig, given: dict[str, Any]) -> bool:
    """Whether arguments are fields of a configuration that make another model of it."""
    held = config.to_dict()
    settings = given.keys() & held.keys() - OF_CALLS
    return any(held[name] != given[name] for name in settings)
