"""The losses' arithmetic never makes the host wait for a GPU, whatever the options."""

from __future__ import annotations

import pytest
import torch
from no_sync import NoSync
from policy_cases import make_case

from polymath_fast.kernels.policy_loss import PolicyLossSpec, policy_terms, prepare, summarize
from polymath_fast.kernels.policy_loss.spec import LOSS_TYPES

SPECS = {
    name: PolicyLossSpec(
        loss_type=name,
        max_completion_length=64 if name == "dr_grpo" else None,
        dro_beta=0.1 if name == "dro" else None,
        epsilon_high=5.0 if name == "cispo" else None,
    )
    for name in LOSS_TYPES
}
SPECS |= {
    "kl": PolicyLossSpec(beta=0.1, kl_estimator="k3", use_bias_correction_kl=True),
    "top entropy": PolicyLossSpec(top_entropy_quantile=0.3, entropy_coef=0.1),
    "sequence weights": PolicyLossSpec(importance_sampling_mode="sequence_mask"),
    "off-policy mask": PolicyLossSpec(off_policy_mask_threshold=0.5),
    "dual clip": PolicyLossSpec(clip_ratio_c=3.0, delta=4.0),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_nothing_is_fetched(spec: PolicyLossSpec) -> None:
    case = make_case()
    logprobs, entropy = (case.pack(t).detach() for t in (case.logprobs, case.entropy))
    # the offsets are looked at on CPU tensors only
    offsets = case.cu_seqlens
    batch = prepare(spec, len(logprobs), torch.float64, logprobs.device, **case.inputs())
    with NoSync():
        terms = policy_terms(batch, logprobs, entropy, spec)
        metrics = summarize(batch, terms, logprobs, entropy)
    assert metrics["tokens"] == case.trained.sum() and offsets[-1] == len(logprobs)


def test_the_mode_notices() -> None:
    values = torch.ones(3)
    waits = (
        lambda: values.sum().item(),
        lambda: bool(values[0] > 0),
        lambda: values[values > 0],
        lambda: values.nonzero(),
        lambda: values.tolist(),
        lambda: torch.tensor([1, 2]),
        lambda: values[torch.zeros((), dtype=torch.long)],
        lambda: values.unique(),
    )
    for wait in waits:
        with pytest.raises(AssertionError, match="wait"), NoSync():
            wait()
