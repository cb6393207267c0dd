"""The random number generators of the process as JSON, so that a resumed run draws what the
uninterrupted one would have drawn."""

from __future__ import annotations

import base64
import random
from typing import Any


def capture() -> dict[str, Any]:
    """The states of python, numpy, torch and every CUDA device, JSON-ready (bytes as base64)."""
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {**state, "state": {"pos": state["state"]["pos"], "key": _key(state)}},
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(device) for device in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def restore(states: dict[str, Any]) -> None:
    """Put back what `capture` returned. CUDA states are skipped on a machine with other devices:
    there the sampler's draws differ whatever the state."""
    import numpy as np
    import torch

    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    saved = states["numpy"]
    key = np.frombuffer(base64.b64decode(saved["state"]["key"]), dtype=np.uint32)
    np.random.set_state({**saved, "state": {"pos": saved["state"]["pos"], "key": key}})
    torch.set_rng_state(_decode(states["torch"]))
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(device) for device in states["cuda"]])


def _key(state: dict[str, Any]) -> str:
    return base64.b64encode(state["state"]["key"].tobytes()).decode("ascii")


def _encode(tensor: Any) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Any:
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
