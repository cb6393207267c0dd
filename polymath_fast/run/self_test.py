"""A training step in miniature on this machine: each part against something that must hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from polymath_fast.rollout.types import Completion

_PROMPT = tuple(b"What is 6 * 7?")
_TEMPERATURE = 0.7


def run() -> Iterator[tuple[str, str]]:
    """(what, result) of each test; `what` begins with FAILED when it did not hold."""
    tests: dict[str, Callable[[], str]] = {
        "operators": operators,
        "sampler and learner agree": sampler_and_learner_agree,
        "an update raises what was rewarded": update_raises_what_was_rewarded,
        "reward": reward,
    }
    for name, test in tests.items():
        start = time.perf_counter()
        try:
            result = f"ok: {test()}"
        # What is broken here is the answer: shown, and the next test still runs.
        except Exception as error:
            name, result = f"FAILED {name}", f"{type(error).__name__}: {error}"
        yield name, f"{result} ({time.perf_counter() - start:.1f} s)"


def operators() -> str:
    """The loss and gradients of the implementation chosen here equal those of the reference."""
    import torch

    from polymath_fast.kernels import linear_grpo_loss

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (24, 300))
    targets = torch.randint(300, (24,), generator=generator)
    results = []
    for impl in ("auto", "reference"):
        leaves = [x.to(_device()).clone().requires_grad_() for x in (hidden, weight)]
        loss = linear_grpo_loss(
            *leaves,
            targets.to(_device()),
            torch.tensor([1.0, -1.0], device=_device()),
            torch.tensor([0, 10, 24], dtype=torch.int32, device=_device()),
            impl=impl,
        ).loss
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    error = max(_distance(ours, truth) for ours, truth in zip(*results, strict=True))
    _require(error < 1e-3, f"loss or gradient differs by {error:.1e} from the reference")
    return f"largest relative difference from the reference {error:.0e}"


def sampler_and_learner_agree() -> str:
    """Log-probs that the sampler reports are those that the learner computes."""
    policy, completions = _sample()
    error = 0.0
    for completion in completions:
        truth = _logprobs(policy.model, completion)
        ours = truth.new_tensor(completion.sampling_logprobs)
        error = max(error, float((truth - ours).abs().max()))
    _require(error < 1e-3, f"log-probs differ by {error:.1e} nat")
    return f"largest difference {error:.0e} nat"


def update_raises_what_was_rewarded() -> str:
    """One step makes the completion with a positive advantage likelier, the other less likely."""
    from polymath_fast.config import Config
    from polymath_fast.learner.packing import TrainingRow
    from polymath_fast.learner.step import Learner

    policy, completions = _sample()
    config = Config(learning_rate=1e-3, temperature=_TEMPERATURE, max_completion_length=12)
    rows = [
        TrainingRow(
            prompt_ids=_PROMPT,
            token_ids=completion.token_ids,
            sampling_logprobs=completion.sampling_logprobs,
            advantage=advantage,
        )
        for completion, advantage in zip(completions, (1.0, -1.0), strict=True)
    ]
    before = [float(_logprobs(policy.model, completion).sum()) for completion in completions]
    Learner(policy, config).update(rows, 1)
    after = [float(_logprobs(policy.model, completion).sum()) for completion in completions]
    moved = after[0] - before[0], after[1] - before[1]
    _require(moved[0] > 0 > moved[1], f"log-probs moved by {moved[0]:+.2g} and {moved[1]:+.2g}")
    return f"log-probs moved by {moved[0]:+.2f} and {moved[1]:+.2f} nat"


def reward() -> str:
    """The maths reward knows a right answer, also in another form, from a wrong one."""
    from polymath_fast import rewards

    texts = [r"\boxed{\frac{1}{2}}", "The answer is 0.5.", "The answer is 2."]
    columns = {"answer": ["1/2"] * 3}
    with rewards.build(("math",)) as built:
        total = built.score(["?"] * 3, texts, [[1]] * 3, columns).total
    _require(total == [1.0, 1.0, 0.0], f"scores are {total} instead of [1.0, 1.0, 0.0]")
    return "right, right in another form, wrong"


def _sample():
    """A tiny random model in float32, and two completions drawn from it."""
    import torch

    from polymath_fast.learner.policy import Policy
    from polymath_fast.models import resolve_model
    from polymath_fast.rollout.transformers_engine import TransformersEngine
    from polymath_fast.rollout.types import SamplingOptions

    policy = Policy(resolve_model("random:tiny"), device=_device(), dtype=torch.float32)
    engine = TransformersEngine(policy, stop_token_ids=[2])
    sampling = SamplingOptions(max_completion_length=12, temperature=_TEMPERATURE, seed=3)
    return policy, engine.generate(_PROMPT, 2, sampling)


def _logprobs(model: torch.nn.Module, completion: Completion) -> torch.Tensor:
    """(length,) log-probs of a completion by a plain forward pass with transformers' attention."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([[*_PROMPT, *completion.token_ids]])
    with torch.no_grad():
        logits = plain.float()(ids).logits[0, len(_PROMPT) - 1 : -1] / _TEMPERATURE
    targets = ids[0, len(_PROMPT) :, None]
    return logits.log_softmax(-1).gather(-1, targets)[:, 0]


def _distance(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).norm() / truth.norm().clamp_min(1e-12))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)
