"""The packed shared-prompt pass against the plain padded one of transformers, in float32."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from closeness import relative_error
from transformers import AutoModelForCausalLM

from polymath_fast.errors import UserError
from polymath_fast.learner.packing import TrainingRow, pack
from polymath_fast.learner.policy import Policy, shared_prompt_attention
from polymath_fast.models import random_models, resolve_model

PROMPTS = [(5, 9, 17, 33, 70), (8, 21)]
COMPLETIONS = [[40, 41, 42, 43, 44, 45], [50], [60, 61, 62]]


def rows(prompts=PROMPTS):
    return [
        TrainingRow(
            prompt_ids=prompt,
            token_ids=tokens,
            sampling_logprobs=[0.0] * len(tokens),
            advantage=1.0 + i,
        )
        for prompt in prompts
        for i, tokens in enumerate(COMPLETIONS)
    ]


def padded_loss(model, all_rows, device="cpu"):
    """sum of advantage * log-prob with one padded row per completion: the truth."""
    longest = max(len(r.prompt_ids) + len(r.token_ids) for r in all_rows)
    ids = torch.zeros(len(all_rows), longest, dtype=torch.int64, device=device)
    attend = torch.zeros_like(ids)
    for i, r in enumerate(all_rows):
        text = [*r.prompt_ids, *r.token_ids]
        ids[i, : len(text)] = torch.tensor(text, device=device)
        attend[i, : len(text)] = 1
    logprobs = model(ids, attention_mask=attend).logits[:, :-1].float().log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    tokens, total = [], 0.0
    for i, r in enumerate(all_rows):
        start = len(r.prompt_ids) - 1
        own = chosen[i, start : start + len(r.token_ids)]
        tokens.append(own.detach())
        total = total + r.advantage * own.sum()
    return total, torch.cat(tokens)


def packed_loss(policy, all_rows):
    batch = pack(all_rows, policy.device)
    logits = policy.head(policy.hidden(batch)).float()
    chosen = logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    lengths = batch.cu_seqlens.diff().long()
    return (chosen * batch.advantages.repeat_interleave(lengths)).sum(), chosen.detach()


@pytest.mark.parametrize("family", ["tiny", "tiny-qwen2", "tiny-qwen3", "tiny-gemma"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one prompt", "two prompts"])
def test_logprobs_and_gradients_equal_the_padded_pass(family, prompts):
    folder = resolve_model(f"random:{family}", notify=lambda text: None)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    policy = Policy(folder, dtype=torch.float32)
    expected, expected_tokens = padded_loss(plain, rows(prompts))
    found, found_tokens = packed_loss(policy, rows(prompts))
    torch.testing.assert_close(found_tokens, expected_tokens, rtol=1e-5, atol=2e-5)
    expected.backward()
    found.backward()
    truth = dict(plain.named_parameters())
    for name, parameter in policy.model.named_parameters():
        error = relative_error(parameter.grad, truth[name].grad)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["tiny", "tiny-qwen2", "tiny-qwen3", "tiny-gemma"])
def test_a_gpu_says_the_same(family):
    """Through the Triton kernels, whose float32 products are three of TF32."""
    folder = resolve_model(f"random:{family}", notify=lambda text: None)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).cuda()
    policy = Policy(folder, dtype=torch.float32, device="cuda")
    expected, expected_tokens = padded_loss(plain, rows(), "cuda")
    found, found_tokens = packed_loss(policy, rows())
    torch.testing.assert_close(found_tokens, expected_tokens, rtol=1e-5, atol=5e-5)
    expected.backward()
    found.backward()
    truth = dict(plain.named_parameters())
    for name, parameter in policy.model.named_parameters():
        error = relative_error(parameter.grad, truth[name].grad)
        assert error < 3e-5, f"{name}: {error:.1e}"


@pytest.mark.gpu
def test_two_passes_on_a_gpu_are_equal_bit_for_bit(tiny_model):
    """Also where many targets read one row: duplicates, and the first tokens of all."""
    many = [row for row in rows(PROMPTS[:1]) for _ in range(50)]
    found = []
    for _ in range(2):
        policy = Policy(tiny_model, dtype=torch.bfloat16, device="cuda")
        packed_loss(policy, many)[0].backward()
        found.append([p.grad for p in policy.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_saved_folder_loads_in_plain_transformers(tmp_path, tiny_model):
    policy = Policy(tiny_model, dtype=torch.bfloat16)
    policy.save(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.config._attn_implementation != "polymath_fast"
    saved = dict(plain.named_parameters(remove_duplicate=False))
    for name, parameter in policy.named_weights():
        assert torch.equal(saved[name].bfloat16(), parameter)
    assert not list((tmp_path / "model").glob("*.bin"))


def test_a_model_in_memory_is_as_good_as_its_folder(tiny_model, tmp_path):
    made = Policy.of(random_models.in_memory("tiny", "float32"), gradient_checkpointing=True)
    read = Policy(tiny_model, dtype=torch.float32)
    assert made.gradient_checkpointing and made.unfused == read.unfused
    truth = dict(read.named_weights())
    for name, weight in made.named_weights():
        assert torch.equal(weight, truth[name]), name
    assert torch.equal(made.hidden(pack(rows())), read.hidden(pack(rows())))
    with pytest.raises(ValueError, match="no tokenizer to save"):
        made.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_in_memory_is_checked_as_well():
    model = random_models.in_memory("tiny-qwen2", "float32")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(UserError, match="sliding-window attention"):
        Policy.of(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "llama, qwen2, qwen3, gemma"),
        (
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
            "sliding-window attention",
        ),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "no causal language model"),
        ({"model_type": "gemma2"}, "model family 'gemma2' is not supported"),
    ],
)
def test_unsupported_attention_is_refused(tmp_path, change, message):
    folder = resolve_model("random:tiny-qwen2", notify=lambda text: None)
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config.pop("layer_types", None)
    (tmp_path / "m/config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        Policy(tmp_path / "m")


@pytest.mark.parametrize("asked", [{"sliding_window": 16}, {"softcap": 50.0}, {"s_aux": [0.1]}])
def test_other_attention_is_refused_where_it_is_asked_for(asked):
    """Whatever a configuration says: what a model's own code passes on is not ignored."""
    batch = pack(rows(PROMPTS[:1]))
    q, k, v = (torch.randn(1, heads, batch.input_ids.shape[1], 16) for heads in (4, 2, 2))
    plain = dict.fromkeys(asked)
    out, _ = shared_prompt_attention(torch.nn.Identity(), q, k, v, None, scaling=0.25, packed=batch,
                                     **plain)  # fmt: skip
    assert out.shape == (1, q.shape[2], 4, 16)
    with pytest.raises(UserError, match=f"Identity asks for attention with.*{[*asked][0]}"):
        shared_prompt_attention(torch.nn.Identity(), q, k, v, None, scaling=0.25, packed=batch,
                                **asked)  # fmt: skip
