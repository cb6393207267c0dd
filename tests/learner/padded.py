"""The truth the learner is held to: transformers' own forward on padded rows, in float32."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from polymath_fast.kernels.policy_loss import policy_loss
from polymath_fast.learner.loss import Divisors, loss_spec
from polymath_fast.learner.step import Learner


def load(folder):
    """The model as anybody would load it."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def token_logprobs(model, rows, temperature):
    """(N,) log-probs of the completions' tokens and (N,) entropies, one padded row each."""
    texts = [torch.tensor([*row.prompt_ids, *row.token_ids]) for row in rows]
    ids = pad_sequence(texts, batch_first=True)
    attend = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    logits = model(ids, attention_mask=attend).logits.float() / temperature
    parts = [
        logits[i, len(row.prompt_ids) - 1 : len(row.prompt_ids) + len(row.token_ids) - 1]
        for i, row in enumerate(rows)
    ]
    every = torch.cat(parts).log_softmax(-1)
    targets = torch.cat([torch.tensor(list(row.token_ids)) for row in rows])
    return every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)


def update(folder, rows, config):
    """Loss and flat gradients by name of one update on all `rows`, and the loss's metrics."""
    model = load(folder)
    logprobs, entropy = token_logprobs(model, rows, config.temperature)
    lengths = torch.tensor([0, *(len(row.token_ids) for row in rows)])
    flat = {
        name: torch.tensor([x for row in rows for x in getattr(row, name)])
        for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs")
        if getattr(rows[0], name) is not None
    }
    trained = sum(len(row.token_ids) for row in rows if row.trained)
    mask = torch.cat([torch.full((len(row.token_ids),), row.trained) for row in rows])
    out = policy_loss(
        logprobs,
        torch.tensor([row.advantage for row in rows]),
        lengths.cumsum(0).int(),
        entropy=entropy,
        mask=mask,
        spec=loss_spec(config, Divisors(trained, len(rows))),
        **flat,
    )
    out.loss.backward()
    return float(out.loss.detach()), dict(model.named_parameters()), out.metrics


def assert_gradient(learner: Learner, found: torch.Tensor, truth: dict, tolerance=1e-5):
    """`found`, laid out as the optimizer's flat gradient, against parameters with gradients.

    Relative to each parameter; what is exactly zero in theory, such as the gradient of queries that
    see one key, may be rounding of the whole.
    """
    whole = torch.stack([p.grad.norm() for p in truth.values()]).norm()
    for name, (start, stop) in learner.optimizer.storage.spans().items():
        expected = truth[name].grad.reshape(-1)
        error = (found[start:stop] - expected).norm()
        allowed = torch.maximum(tolerance * expected.norm(), 2e-7 * whole)
        assert error < allowed, f"{name}: {error:.1e} of {expected.norm():.1e}"
