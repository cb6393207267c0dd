"""The process of a sampler that shares the learner's weights: `remote_engine` starts it.

It answers one request after the other on the socket that it inherits, and ends with its parent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from polymath_fast.errors import EngineError, UserError
from polymath_fast.processes.channel import Channel
from polymath_fast.processes.child import inherited
from polymath_fast.rollout.ipc import Driver, WeightReceiver
from polymath_fast.rollout.types import SamplingOptions
from polymath_fast.rollout.wire import decode_request, encode

_REQUESTS = ("stream", "abort", "sleep", "wake", "attach", "push", "verify", "close")


def serve(
    channel: Channel,
    make_engine: Callable[[dict[str, Any]], Any],
    make_driver: Callable[[str], Driver],
) -> None:
    """Start the engine that the parent describes and answer until it says "close"."""
    engine: Any = None
    try:
        settings = channel.receive("start")["settings"]
        engine = make_engine(settings)
        channel.send("ready")
        _answer(channel, engine, make_driver(settings["device"]))
    except (UserError, EngineError) as error:
        channel.fail(error)
    finally:
        if engine is not None:
            engine.close()


def _answer(channel: Channel, engine: Any, driver: Driver) -> None:
    receiver: WeightReceiver | None = None
    while True:
        request = channel.receive(*_REQUESTS)
        kind = request["kind"]
        if kind == "close":
            return
        if kind == "stream":
            sampling = SamplingOptions(**request["sampling"])
            asked = [decode_request(each) for each in request["requests"]]
            # All that can come now is "abort", or the end of the parent.
            for drawn in engine.stream(asked, sampling, stopped=channel.waiting):
                place = {"request": drawn.request, "index": drawn.index}
                channel.send("drawn", **place, completion=encode(drawn.completion))
            channel.send("end")
        elif kind == "abort":
            pass  # of the stream that has just ended
        elif kind in ("sleep", "wake"):
            getattr(engine, kind)()
            channel.send("done")
        elif kind == "attach":
            receiver = WeightReceiver(channel, driver)
        elif receiver is None:
            raise EngineError(f"{kind!r} before any weights were attached")
        elif kind == "push":
            version = receiver.wait()
            engine.weights.push(receiver.tensors.items(), version)
            receiver.taken()
        else:
            engine.weights.verify(receiver.tensors.items())
            channel.send("verified")


def _make_vllm(settings: dict[str, Any]) -> Any:
    from pathlib import Path

    from polymath_fast.rollout.vllm_engine import VllmEngine

    return VllmEngine(Path(settings.pop("model_dir")), weight_sync="copy", **settings)


def make_driver(device: str) -> Driver:
    """What memory of `device` ("cpu" or "cuda") is shared through."""
    if device == "cpu":
        from polymath_fast.rollout.host_memory import HostMemory

        return HostMemory()
    from polymath_fast.rollout.cuda_driver import CudaDriver

    return CudaDriver()


def main(descriptor: int) -> None:
    """Serve on an inherited socket."""
    serve(inherited(descriptor), _make_vllm, make_driver)


if __name__ == "__main__":
    main(int(sys.argv[1]))
