"""Model folders with random weights: tiny ones for tests, true shapes for benchmarks.

All share one byte-level tokenizer of our own, filled up to the vocabulary of the architecture, so
that nothing has to be installed or downloaded and every id decodes to some text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath_fast.environment import no_progress_bars
from polymath_fast.errors import UserError
from polymath_fast.folders import cache
from polymath_fast.folders.permissions import share_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Part of the folder's name: raise it when the way of building changes.
_BUILD = 1
_SEED = 0
_PAD, _START, _END = _SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SMALLEST_VOCABULARY = len(_SPECIAL) + 256
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _shape(
    model_type: str,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    intermediate_size: int,
    vocab_size: int,
    tied: bool,
    **more: Any,
) -> dict[str, Any]:
    shape = dict(locals())
    return {**shape.pop("more"), **shape, "tie_word_embeddings": shape.pop("tied")}


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


# More heads than hidden / head_dim, and weights wide enough that logits differ by whole nats.
_TINY = {"head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.2}
_LLAMA_3_ROPE = _rope(
    5e5,
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, **_rope(1e6)}

FAMILIES: dict[str, dict[str, Any]] = {
    "tiny": _shape("llama", 64, 2, 4, 2, 128, 320, True, **_TINY),
    "tiny-qwen2": _shape("qwen2", 64, 2, 2, 1, 128, 320, True, **_TINY),
    "tiny-qwen3": _shape("qwen3", 64, 2, 4, 2, 128, 320, False, **_TINY),
    "tiny-gemma": _shape("gemma", 64, 2, 4, 1, 128, 320, True, **_TINY),
    "smollm2-135m": _shape(
        "llama", 576, 30, 9, 3, 1536, 49152, True, max_position_embeddings=8192, **_rope(1e5)
    ),
    "llama-3.2-1b": _shape(
        "llama", 2048, 16, 32, 8, 8192, 128256, True,
        head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5, **_LLAMA_3_ROPE,
    ),
    "qwen2.5-0.5b": _shape("qwen2", 896, 24, 14, 2, 4864, 151936, True, **_QWEN),
    "qwen2.5-1.5b": _shape("qwen2", 1536, 28, 12, 2, 8960, 151936, True, **_QWEN),
    "qwen2.5-7b": _shape("qwen2", 3584, 28, 28, 4, 18944, 152064, False, **_QWEN),
    "qwen3-0.6b": _shape("qwen3", 1024, 28, 16, 8, 3072, 151936, True, head_dim=128, **_QWEN),
}  # fmt: skip


def folder(what: str, notify: Callable[[str], None] = print) -> Path:
    """The folder of a random model: `what` is a family of FAMILIES or the path of a config.json.

    The same `what` gives the same weights everywhere: standard deviation `initializer_range`, and
    biases and norm weights moved off their usual 0 and 1 so that a path that forgets one shows.
    tiny families are stored in float32, others in bfloat16. Raises UserError.
    """
    shape = shape_of(what)
    key = hashlib.sha256(json.dumps([_BUILD, _SEED, shape], sort_keys=True).encode()).hexdigest()
    name = what if what in FAMILIES else shape["model_type"]
    return cache.build_once(
        f"random-{name}-{key[:12]}",
        lambda target: build(shape, target, "float32" if "tiny" in name else "bfloat16"),
        hashes=False,
        notify=notify,
    )


def build(shape: dict[str, Any], target: Path, dtype: str) -> None:
    """Write a model of `shape` (the keys of a config.json) and its tokenizer to `target`."""
    config = config_of(shape)
    tokenizer = _write_tokenizer(config.vocab_size, target)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    model = _model(config, dtype, "cpu")
    with no_progress_bars():
        model.save_pretrained(target, max_shard_size="4GB")
    share_weights(target)


def in_memory(family: str, dtype: str, device: str = "cpu") -> PreTrainedModel:
    """A model of a family of FAMILIES, made on `device`, without a folder or a tokenizer.

    Its weights are drawn as `folder` says, but by the device: on a GPU they are others than on a
    CPU, and the GPU's generator stays where they leave it.
    """
    config = config_of(FAMILIES[family])
    # as the tokenizer of a folder has them; the row of the padding is 0
    for name, token in (("bos", _START), ("eos", _END), ("pad", _PAD)):
        setattr(config, f"{name}_token_id", _SPECIAL.index(token))
    return _model(config, dtype, device)


def _model(config: PretrainedConfig, dtype: str, device: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device(device):
        torch.manual_seed(_SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def shape_of(what: str) -> dict[str, Any]:
    """The settings of a family of FAMILIES, or of the config.json at a path. Raises UserError."""
    if what in FAMILIES:
        return FAMILIES[what]
    path = Path(what).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        near = difflib.get_close_matches(what, FAMILIES, n=1)
        hint = f"perhaps you meant random:{near[0]}" if near else f"families: {', '.join(FAMILIES)}"
        raise UserError(f"random:{what}: neither a family nor a config.json; {hint}")
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
        shape["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not the config.json of a model ({error!r})") from None
    # Neither says anything about the weights that are built here.
    return {k: v for k, v in shape.items() if k not in ("quantization_config", "auto_map")}


def config_of(shape: dict[str, Any]) -> PretrainedConfig:
    """The settings object of a shape, checked. Raises UserError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**shape)
        vocabulary = int(config.vocab_size)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"transformers cannot build this architecture: {error}") from None
    if vocabulary < _SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size is {vocabulary}; the byte-level tokenizer needs at least "
            f"{_SMALLEST_VOCABULARY}; 320 works"
        )
    return config


def _write_tokenizer(vocabulary: int, target: Path) -> Any:
    """One token per byte, three special ones, and fillers that no text encodes to."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<{i}>" for i in range(_SMALLEST_VOCABULARY, vocabulary)]
    tokens = {token: i for i, token in enumerate([*_SPECIAL, *alphabet, *fillers])}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_CHAT_TEMPLATE,
        bos_token=_START,
        eos_token=_END,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(target)
    return wrapped
