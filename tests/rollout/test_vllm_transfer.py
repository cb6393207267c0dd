"""vLLM's own weight-transfer API, driven on the real engine with our backend."""

from __future__ import annotations

import pytest
import torch

from polymath_fast.errors import EngineError, UserError
from polymath_fast.learner.policy import Policy
from polymath_fast.precision import choose_dtype

pytestmark = pytest.mark.vllm

PROMPT = [5, 9, 17, 33, 70]


@pytest.fixture(scope="module")
def llm(tiny_model):
    from polymath_fast.rollout import vllm_process

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vllm_process.prepare(device, kv_cache_gib=1, threads=1)
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    from polymath_fast.rollout import vllm_transfer

    vllm_transfer.register()
    vllm_transfer.register()  # a second import must not fail
    made = LLM(
        str(tiny_model),
        dtype=choose_dtype("auto", "cpu")[0],
        load_format=vllm_transfer.BACKEND,
        weight_transfer_config=WeightTransferConfig(backend=vllm_transfer.BACKEND),
        skip_tokenizer_init=True,
        max_model_len=128,
        enforce_eager=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    made.init_weight_transfer_engine({"init_info": {}})
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.fixture
def policy(tiny_model):
    return Policy(tiny_model)


def greedy(llm):
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    return list(done[0].outputs[0].token_ids)


def update(llm, *parts):
    llm.start_weight_update()
    for part in parts:
        llm.update_weights({"update_info": {"named_weights": part}})
    llm.finish_weight_update()


def test_an_update_in_parts_changes_what_is_sampled_and_back(llm, policy):
    before = greedy(llm)
    weights = [(n, p.detach().clone()) for n, p in policy.model.named_parameters()]
    changed = [(n, (-0.5 * w).float()) for n, w in weights]
    update(llm, changed[:7], iter(changed[7:]))
    truth = Policy(policy.model_dir)
    with torch.no_grad():
        for parameter in truth.model.parameters():
            parameter.mul_(-0.5)
    after = greedy(llm)
    assert after != before
    assert after == embedded_greedy(truth)
    update(llm, [*weights, ("lm_head.weight", weights[0][1])])
    assert greedy(llm) == before


def embedded_greedy(policy):
    from polymath_fast.rollout.transformers_engine import TransformersEngine
    from polymath_fast.rollout.types import SamplingOptions

    engine = TransformersEngine(policy, stop_token_ids=[])
    sampling = SamplingOptions(max_completion_length=8, temperature=0)
    return list(engine.generate(PROMPT, 1, sampling)[0].token_ids)


def test_what_does_not_fit_is_named(llm, policy):
    weights = dict(policy.model.named_parameters())
    with pytest.raises(UserError, match=r"norm.weight is \(63,\), but \(64,\)"):
        update(llm, [("model.norm.weight", weights["model.norm.weight"][1:])])
    with pytest.raises(UserError, match="no tensor model.nrom.weight"):
        update(llm, [("model.nrom.weight", weights["model.norm.weight"])])
    with pytest.raises(EngineError, match="1 of 20 tensors were not in the update.*norm.weight"):
        update(llm, [(n, w) for n, w in weights.items() if n != "model.norm.weight"])
