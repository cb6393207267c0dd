"""vLLM's own model classes in this process, as one rank of any tensor-parallel size has them.

No engine, no process group: layers only ask the group for its size and their rank.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from polymath_fast.models import random_models

SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 330,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
"""330 is padded to 384; four ranks have two key heads between them"""


def make_folder(folder: Path, shape: dict[str, object]) -> Path:
    """A folder that describes a model of `shape` without holding its weights."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = random_models.config_of(shape)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    return folder


def build(
    folder: Path, size: int, rank: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> nn.Module:
    """The model of rank `rank` of `size`, bf16, memory uninitialised; "meta" has no memory."""
    from polymath_fast.rollout.vllm_process import quiet_llvmlite

    quiet_llvmlite()
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    monkeypatch.setattr(parallel_state, "_TP", _group(size, rank))
    monkeypatch.setattr(parallel_state, "_PP", _group(1, 0))
    settings = {"dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 64}
    config = VllmConfig(
        model_config=ModelConfig(model=str(folder), **settings), device_config=DeviceConfig("cpu")
    )
    with set_default_torch_dtype(torch.bfloat16), torch.device(device):
        return initialize_model(config)


def weights_of(shape: dict[str, object], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Hugging Face name -> weight of transformers' model of that shape."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(random_models.config_of(shape), dtype=dtype)
    for parameter in model.parameters():
        if device != "meta":
            parameter.data.normal_()
    return dict(model.named_parameters(remove_duplicate=False))


def _group(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(
        world_size=size, rank_in_group=rank, rank=rank, is_first_rank=True, is_last_rank=True
    )
