"""How much memory a run will need, from the shape of its model and its settings alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polymath_fast.config import Config
from polymath_fast.precision import BYTES

if TYPE_CHECKING:
    from polymath_fast.kernels.triton.budget import Gpu

GIB = 2**30
FULL_LENGTH_SEQUENCES = 256  # completions that the sampler's memory holds at their full length
GRADIENT = "gradient (fp32)"
_KV_BLOCK = 16  # tokens that vLLM allocates at a time on a GPU
_MICROBATCH = (16384, 2048)  # tokens, on a GPU and on a CPU
TAPED_ROWS = 4
"""rows of a pass over the tape for each row of one whose activations are kept by autograd"""
_TAPED_LAYERS = 3  # of which such a pass holds what the tape has of one, and its gradients
_LIBRARIES = {"vllm": 1.0 * GIB, "transformers": 0.7 * GIB}  # resident after imports, on a CPU


def microbatch_tokens(config: Config, device: str) -> int:
    """`--tokens-per-microbatch`, or what is left to `device` ("cpu", "cuda"); a completion that is
    longer goes alone."""
    return config.tokens_per_microbatch or _MICROBATCH[device == "cpu"]


def parameters(shape: dict[str, Any]) -> int:
    """Number of weights of a Llama, Qwen2 or Qwen3 model with these config.json keys."""
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    q, kv, head = widths(shape)
    qwen2, qwen3 = (shape["model_type"] == name for name in ("qwen2", "qwen3"))
    attention = 2 * hidden * q + 2 * hidden * kv
    biases = (q + 2 * kv) * qwen2 + 2 * head * qwen3
    mlp = 3 * hidden * shape["intermediate_size"]
    layer = attention + biases + mlp + 2 * hidden
    embeddings = vocabulary * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    return embeddings + shape["num_hidden_layers"] * layer + hidden


def activation_bytes(
    shape: dict[str, Any], *, dtype: str = "bfloat16", gradient_checkpointing: bool = False
) -> int:
    """What autograd keeps of one token's forward pass below the LM head, in bytes.

    Counted from the layers. The fused ones keep neither norms nor activations. Gemma's are
    transformers' own: both norms keep a float32 copy of their input and of what they give, the gate
    keeps four vectors of the MLP's width, attention its inputs and output. With
    `gradient_checkpointing` all but the input of a layer is kept of one layer at a time.
    """
    size = BYTES[dtype]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    q, kv, head = widths(shape)
    heads, layers = shape["num_attention_heads"], shape["num_hidden_layers"]
    if shape["model_type"] == "gemma":
        layer = 2 * (8 + size) * hidden + size * (4 * inner + 2 * q + 2 * kv) + 4 * heads + 8
        rest = 8 * hidden + 2 * size * head
    else:
        qwen3 = shape["model_type"] == "qwen3"
        layer = size * (2 * (hidden + inner + q + kv) + (q + 2 * kv) * qwen3) + 4 * heads
        rest = size * hidden + 16
    if gradient_checkpointing:
        return layers * size * hidden + layer + rest
    return layers * layer + rest


def kv_cache_bytes(shape: dict[str, Any], dtype: str = "bfloat16") -> int:
    """Keys and values of one token, in bytes."""
    return shape["num_hidden_layers"] * 2 * BYTES[dtype] * widths(shape)[1]


def optimizer_bytes(config: Config, dtype: str = "bfloat16") -> dict[str, float]:
    """Bytes a parameter that learning needs on the device of each process, beside the weights
    themselves."""
    state = {"AdamW moments (fp32)": 8}
    if config.master_weights == "remainder":
        state["remainder of master weights (int16)"] = 2
    elif dtype != "float32":
        state["master weights (fp32)"] = 4
    if config.shard_optimizer:
        state = {name: size / config.num_processes for name, size in state.items()}
    return {GRADIENT: 4} | ({} if config.offload_optimizer else state)


def cpu_kv_cache_gib(asked: float | None) -> int:
    """GiB of vLLM's KV cache on a CPU: it counts whole ones; 1 where nothing is asked for."""
    return math.ceil(asked or 1)


def vllm_kv_cache_gib(
    shape: dict[str, Any],
    config: Config,
    prompt_tokens: int,
    *,
    device: str,
    dtype: str = "bfloat16",
) -> float:
    """GiB for vLLM's KV cache: `--kv-cache-gib`; on a CPU as `cpu_kv_cache_gib` has it.

    Left out on a GPU, where vLLM would take the learner's share too, it is what up to 256
    completions fill at their full length. More of them decode together while they are shorter; when
    the cache is full, vLLM puts the last ones off.
    """
    if device == "cpu":
        return cpu_kv_cache_gib(config.kv_cache_gib)
    if config.kv_cache_gib is not None:
        return config.kv_cache_gib
    sequences = min(FULL_LENGTH_SEQUENCES, config.asked_generations * config.groups_per_step)
    tokens = sequences * (config.max_completion_length + 2 * _KV_BLOCK)
    tokens += config.groups_per_step * prompt_tokens + 64 * _KV_BLOCK
    return kv_cache_bytes(shape, dtype) * tokens / GIB


def estimate(
    shape: dict[str, Any],
    config: Config,
    *,
    engine: str,
    prompt_tokens: int,
    device: str,
    dtype: str = "bfloat16",
    kv_storages: int = 1,
    gpu: Gpu | None = None,
) -> dict[str, float]:
    """GiB for each part of each process of a run at its largest moment.

    With vLLM it is that of learning, beside an engine that keeps what it has. The embedded sampler
    keeps nothing but its tape, so its parts are there instead of the learner's where they are
    larger.

    `shape` holds the keys of the model's config.json, `engine` is "vllm" or "transformers",
    `prompt_tokens` is the length of the longest prompt, `kv_storages` the number of allocations
    that make up vLLM's KV cache, `gpu` is what "cuda" means where there is none, or another one.
    An estimate: allocators round up.
    """
    taped, tape = _tape(shape, config, engine, prompt_tokens, device, dtype)
    weights = parameters(shape)
    held = {name: each * weights for name, each in optimizer_bytes(config, dtype).items()}
    config = config.of_one_process()
    rollouts = config.num_generations * config.groups_per_step
    rows = prompt_tokens + rollouts * config.max_completion_length
    alone = prompt_tokens + config.max_completion_length
    limit = microbatch_tokens(config, device)
    tokens = min(max(limit, alone, prompt_tokens + limit // 2), rows)
    sequences = min(FULL_LENGTH_SEQUENCES, config.asked_generations * config.groups_per_step)
    longest = prompt_tokens + sequences * config.max_completion_length
    cached = kv_cache_bytes(shape, dtype) * longest
    if engine == "vllm":
        cached = vllm_kv_cache_gib(shape, config, prompt_tokens, device=device, dtype=dtype) * GIB
    kept = activation_bytes(
        shape, dtype=dtype, gradient_checkpointing=config.gradient_checkpointing
    )
    size, kind = BYTES[dtype], {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    # on a GPU they are the learner's; CPU builds of vLLM multiply with a packed copy all the same
    shared = engine != "vllm" or (device != "cpu" and config.weight_sync in ("auto", "alias"))
    if 0 < rollouts * config.max_completion_length <= taped:  # nothing is learned elsewhere
        tokens = min(TAPED_ROWS * limit, rows)
        kept = _TAPED_LAYERS * _layer_bytes(shape, dtype)
    lends = config.reuse_kv_cache and engine == "vllm"
    room = [cached / kv_storages] * kv_storages if lends else []
    head = _head_bytes(shape, config, tokens, device, dtype, gpu, room)
    sampling = {"KV cache": cached}
    learning = {f"activations of {tokens} tokens": kept * tokens, "LM head": head}
    if engine == "vllm":
        largest = sampling | learning
    else:  # on a CPU the sampler packs its weights where the gradient will be
        largest = max(sampling, learning, key=lambda parts: sum(parts.values()))
    parts = {
        f"weights ({kind})": size * weights,
        **held,
        f"tape of {taped} tokens": tape,
        f"reference model ({kind})": size * weights if config.beta else 0,
        f"sampler's weights ({kind})": 0 if shared else size * weights,
        **largest,
        "libraries": _LIBRARIES[engine] if device == "cpu" else 0,
    }
    return {name: size / GIB for name, size in parts.items() if size}


def _tape(
    shape: dict[str, Any], config: Config, engine: str, prompt_tokens: int, device: str, dtype: str
) -> tuple[int, int]:
    """Rows of the embedded sampler's tape, and bytes."""
    from polymath_fast.precision import torch_dtype
    from polymath_fast.rollout.tape_room import row_bytes, tape_rows

    rows = tape_rows(
        shape, config, engine=engine, prompt_tokens=prompt_tokens, device=device, dtype=dtype
    )
    return rows, rows * row_bytes(shape, config, torch_dtype(dtype)) if rows else 0


def _layer_bytes(shape: dict[str, Any], dtype: str) -> int:
    """Of the tape, for one token and one layer."""
    from polymath_fast.precision import torch_dtype
    from polymath_fast.rollout.tape_room import DecoderSizes

    sizes = DecoderSizes.of(shape, torch_dtype(dtype))
    return sizes.layer_bytes // sizes.layers


def _head_bytes(
    shape: dict[str, Any],
    config: Config,
    tokens: int,
    device: str,
    dtype: str,
    gpu: Gpu | None,
    room: list[float],
) -> int:
    """What the LM head holds while it learns from `tokens` tokens at once, outside of storages with
    `room` bytes that are lent to it."""
    import torch

    from polymath_fast.kernels.linear_grpo_loss.footprint import head_bytes, lendable_bytes
    from polymath_fast.kernels.triton.budget import gpu_of
    from polymath_fast.precision import torch_dtype

    if device == "cpu":
        gpu = None
    elif gpu is None:
        if not torch.cuda.is_available():
            raise ValueError("device 'cuda': torch sees none here; say which with gpu=Gpu(...)")
        gpu = gpu_of(torch.device(device))
    sizes = (tokens, shape["vocab_size"], shape["hidden_size"], torch_dtype(dtype), gpu)
    held = head_bytes(*sizes, some_columns=config.active_vocabulary == "auto")
    return held - (_fitting(lendable_bytes(*sizes), room) if room else 0)


def _fitting(buffers: list[int], room: list[float]) -> int:
    """Bytes of the buffers that find room in these storages, each in the first that has any."""
    left, held = list(room), 0
    for size in buffers:
        number = next((i for i, free in enumerate(left) if size <= free), None)
        if number is not None:
            left[number] -= size
            held += size
    return held


def widths(shape: dict[str, Any]) -> tuple[int, int, int]:
    """Width of all queries, of all keys, and of one head."""
    heads = shape["num_attention_heads"]
    head = shape.get("head_dim") or shape["hidden_size"] // heads
    return heads * head, (shape.get("num_key_value_heads") or heads) * head, head
