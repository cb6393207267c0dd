"""The dtype of the weights that are sampled from and learnt: what the device multiplies fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BYTES = {"bfloat16": 2, "float32": 4}


def choose_dtype(asked: str, device: str, *, fast_bfloat16: bool | None = None) -> tuple[str, str]:
    """The dtype that `--dtype asked` means on `device` ("cpu" or "cuda"), and why.

    Args:
        asked: "auto", "bfloat16" or "float32".
        fast_bfloat16: whether this processor multiplies bfloat16 in hardware; None looks.
    """
    if fast_bfloat16 is None:
        fast_bfloat16 = device != "cpu" or cpu_multiplies_bfloat16()
    if asked == "auto":
        if fast_bfloat16:
            return "bfloat16", "this device multiplies it in hardware"
        return "float32", "this processor has no bfloat16 instructions"
    if asked == "bfloat16" and not fast_bfloat16:
        return asked, "asked for by --dtype; slow here, for want of bfloat16 instructions"
    return asked, f"asked for by --dtype {asked}"


def torch_dtype(name: str) -> torch.dtype:
    """The torch.dtype called `name`."""
    import torch

    return getattr(torch, name)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """What `--dtype auto` means on `device`."""
    import torch

    return torch_dtype(choose_dtype("auto", torch.device(device).type)[0])


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it: AVX512-BF16 or AMX on x86, BF16 on ARM.

    x86 processors with plain AVX512 emulate it and are quicker in float32; with AVX2 alone torch
    is a hundred times slower than in float32, and vLLM's products do not exist.
    """
    import torch

    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
