"""Requests and completions as JSON can carry them. Log-probs keep all their bits; what comes is
checked."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping
from typing import Any

from polymath_fast.errors import EngineError
from polymath_fast.rollout.types import Completion, Drawn, Request


def encode(completion: Completion) -> list[Any]:
    """A completion as JSON can carry it."""
    numbers = (array("i", completion.token_ids), array("d", completion.sampling_logprobs))
    packed = [base64.b64encode(a.tobytes()).decode() for a in numbers]
    spans = [list(span) for span in completion.spans]
    return [*packed, completion.finish_reason, spans]


def decode(data: list[Any]) -> Completion:
    """The completion that `encode` was given. Raises EngineError for anything else."""
    try:
        token_ids, logprobs = array("i"), array("d")
        token_ids.frombytes(base64.b64decode(data[0], validate=True))
        logprobs.frombytes(base64.b64decode(data[1], validate=True))
        spans = tuple((int(version), int(start)) for version, start in data[3])
        return Completion(
            token_ids=token_ids.tolist(),
            sampling_logprobs=logprobs.tolist(),
            finish_reason=str(data[2]),
            weight_version=spans[-1][0],
            version_spans=spans if len(spans) > 1 else (),
        )
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise EngineError(f"the engine's process sent no completion: {error!r}") from None


def encode_request(request: Request) -> dict[str, Any]:
    """A request as JSON can carry it."""
    return {
        "prompt_ids": list(request.prompt_ids),
        "n": request.n,
        "needed": request.needed,
        "begun": [encode(completion) for completion in request.begun],
    }


def decode_request(data: Mapping[str, Any]) -> Request:
    """The request that `encode_request` was given."""
    return Request(**{**data, "begun": [decode(each) for each in data["begun"]]})


def decode_drawn(message: Mapping[str, Any]) -> Drawn:
    """What the engine's process sent of one completion. Raises EngineError for anything else."""
    try:
        place = int(message["request"]), int(message["index"])
        data = message["completion"]
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError(f"the engine's process sent no completion: {error!r}") from None
    return Drawn(*place, decode(data))
