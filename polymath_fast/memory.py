"""How much memory a run will need, from the shape of its model and its settings alone."""

from __future__ import annotations

from typing import Any

from polymath_fast.config import Config

GIB = 2**30
_KV_BLOCK = 16  # tokens that vLLM allocates at a time on a GPU
_HEAD_CHUNK = 2**25  # logits that the LM head holds at once, in float32
_LIBRARIES = {"vllm": 1.6 * GIB, "transformers": 0.7 * GIB}  # resident after imports, on a CPU


def parameters(shape: dict[str, Any]) -> int:
    """Number of weights of a Llama, Qwen2 or Qwen3 model with these config.json keys."""
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    q, kv, head = _widths(shape)
    qwen2, qwen3 = (shape["model_type"] == name for name in ("qwen2", "qwen3"))
    attention = 2 * hidden * q + 2 * hidden * kv
    biases = (q + 2 * kv) * qwen2 + 2 * head * qwen3
    mlp = 3 * hidden * shape["intermediate_size"]
    layer = attention + biases + mlp + 2 * hidden
    embeddings = vocabulary * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    return embeddings + shape["num_hidden_layers"] * layer + hidden


def activation_bytes(
    shape: dict[str, Any], *, device: str, gradient_checkpointing: bool = False
) -> int:
    """What autograd keeps of one token's forward pass below the LM head, in bytes (bfloat16).

    Counted from the layers. transformers' own: both norms keep a float32 and a bfloat16 copy
    (Gemma's two float32 ones), the gate keeps four vectors of the MLP's width, attention its inputs
    and output. The fused ones of a CPU keep neither norms nor activations. With
    `gradient_checkpointing` all but the input of a layer is kept of one layer at a time.
    """
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    q, kv, head = _widths(shape)
    heads, layers = shape["num_attention_heads"], shape["num_hidden_layers"]
    qwen3, gemma = (shape["model_type"] == name for name in ("qwen3", "gemma"))
    if device == "cpu" and not gemma:
        layer = 4 * hidden + 4 * inner + 4 * q + 4 * kv + 4 * heads + 2 * (q + 2 * kv) * qwen3
        rest = 2 * hidden + 16
    else:
        layer = (20 if gemma else 16) * hidden + 8 * inner + 4 * q + 4 * kv + 4 * heads + 8
        layer += (6 * (q + kv) + 4 * (q + kv) // head) * qwen3
        rest = (8 if gemma else 6) * hidden + 4 * head
    if gradient_checkpointing:
        return layers * 2 * hidden + layer + rest
    return layers * layer + rest


def kv_cache_bytes(shape: dict[str, Any]) -> int:
    """Keys and values of one token, in bytes (bfloat16)."""
    return shape["num_hidden_layers"] * 4 * _widths(shape)[1]


def optimizer_bytes(config: Config) -> dict[str, int]:
    """Bytes a parameter that learning needs on the device, beside the weights themselves."""
    remainder = config.master_weights == "remainder"
    state = {
        "remainder of master weights (int16)" if remainder else "master weights (fp32)": 4
        - 2 * remainder,
        "AdamW moments (fp32)": 8,
    }
    return {"gradient (fp32)": 4} | ({} if config.offload_optimizer else state)


def vllm_kv_cache_gib(
    shape: dict[str, Any], config: Config, prompt_tokens: int, device: str
) -> float:
    """GiB for vLLM's KV cache: `--kv-cache-gib`, else 1 on a CPU.

    On a GPU, where vLLM would take the learner's share too, it is what the completions that decode
    together fill at their full length.
    """
    if config.kv_cache_gib is not None:
        return config.kv_cache_gib
    if device == "cpu":
        return 1.0
    sequences = min(256, config.num_generations * config.groups_per_step)
    tokens = sequences * (config.max_completion_length + 2 * _KV_BLOCK)
    tokens += config.groups_per_step * prompt_tokens + 64 * _KV_BLOCK
    return kv_cache_bytes(shape) * tokens / GIB


def estimate(
    shape: dict[str, Any], config: Config, *, engine: str, prompt_tokens: int, device: str
) -> dict[str, float]:
    """GiB for each part of a run, largest moments of all phases added up.

    `shape` holds the keys of the model's config.json, `engine` is "vllm" or "transformers",
    `prompt_tokens` is the length of the longest prompt. An estimate: allocators round up.
    """
    weights = parameters(shape)
    rollouts = config.num_generations * config.groups_per_step
    rows = prompt_tokens + rollouts * config.max_completion_length
    tokens = min(config.tokens_per_microbatch, rows)
    vocabulary = shape["vocab_size"]
    sequences = min(256, rollouts)
    cached = kv_cache_bytes(shape) * (prompt_tokens + sequences * config.max_completion_length)
    if engine == "vllm":
        cached = vllm_kv_cache_gib(shape, config, prompt_tokens, device) * GIB
    kept = activation_bytes(
        shape, device=device, gradient_checkpointing=config.gradient_checkpointing
    )
    # on a GPU they are the learner's; CPU builds of vLLM multiply with a packed copy all the same
    shared = engine != "vllm" or (device != "cpu" and config.weight_sync in ("auto", "alias"))
    parts = {
        "weights (bf16)": 2 * weights,
        **{name: size * weights for name, size in optimizer_bytes(config).items()},
        "reference model (bf16)": 2 * weights if config.beta else 0,
        "sampler's weights (bf16)": 0 if shared else 2 * weights,
        "KV cache": cached,
        f"activations of {tokens} tokens": kept * tokens,
        "LM head": 12 * min(_HEAD_CHUNK, tokens * vocabulary)
        + 8 * vocabulary * shape["hidden_size"],
        "libraries": _LIBRARIES[engine] if device == "cpu" else 0,
    }
    return {name: size / GIB for name, size in parts.items() if size}


def _widths(shape: dict[str, Any]) -> tuple[int, int, int]:
    """Width of all queries, of all keys, and of one head."""
    heads = shape["num_attention_heads"]
    head = shape.get("head_dim") or shape["hidden_size"] // heads
    return heads * head, (shape.get("num_key_value_heads") or heads) * head, head
