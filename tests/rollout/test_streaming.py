"""Completions as they finish, on the embedded sampler and on the real vLLM."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from polymath_fast.errors import EngineError
from polymath_fast.learner.policy import Policy
from polymath_fast.rollout.transformers_engine import TransformersEngine
from polymath_fast.rollout.types import Completion, Request, SamplingOptions

PROMPTS = [[5, 9, 17, 33, 70], [8, 21], [100] * 11]
STOP = [2, *range(40, 60)]
SEQUENCES = 16
SAMPLING = SamplingOptions(max_completion_length=40, temperature=0.9, seed=4)


@pytest.fixture(scope="module")
def policy(tiny_model):
    return Policy(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture(
    scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]
)
def engine(request, policy, tiny_model):
    if request.param == "transformers":
        yield TransformersEngine(policy, stop_token_ids=STOP, max_num_seqs=SEQUENCES)
        return
    from polymath_fast.rollout.vllm_engine import VllmEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_CI_ENV", "1")  # vLLM's short warm-up
        made = VllmEngine(
            tiny_model,
            stop_token_ids=STOP,
            max_model_len=64,
            max_num_seqs=SEQUENCES,
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype="float32",
            kv_cache_gib=1,
        )
        yield made
        made.close()


def draw(engine, requests, sampling=SAMPLING):
    with closing(engine.stream(requests, sampling)) as stream:
        return list(stream)


def forward_logprobs(plain, prompt, token_ids, temperature):
    ids = torch.tensor([[*prompt, *token_ids]])
    with torch.no_grad():
        logits = plain(ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def assert_logprobs(plain, prompt, completion, temperature=SAMPLING.temperature):
    truth = forward_logprobs(plain, prompt, completion.token_ids, temperature)
    found = torch.tensor(completion.sampling_logprobs, dtype=torch.float64)
    torch.testing.assert_close(found, truth, atol=1e-3, rtol=0)


def test_every_completion_comes_once_the_shortest_first(engine, plain):
    requests = [Request(prompt_ids=PROMPTS[0], n=6), Request(prompt_ids=PROMPTS[1], n=3)]
    found = draw(engine, requests)
    assert sorted(each[:2] for each in found) == [(0, i) for i in range(6)] + [
        (1, i) for i in range(3)
    ]
    lengths = [len(each.completion.token_ids) for each in found]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2
    assert all(each.completion.finish_reason in ("stop", "length") for each in found)
    for request, _, completion in found:
        assert_logprobs(plain, PROMPTS[request], completion)


def test_generate_many_is_the_stream_in_order(engine):
    groups = engine.generate_many(PROMPTS[:2], 4, SAMPLING)
    found = draw(engine, [Request(prompt_ids=ids, n=4) for ids in PROMPTS[:2]])
    assert {each[:2]: each.completion for each in found} == {
        (p, i): groups[p][i] for p in range(2) for i in range(4)
    }


def test_the_rest_is_aborted_once_enough_have_finished(engine, plain):
    """More is asked for than fits together: the last ones are never begun."""
    requests = [
        Request(prompt_ids=PROMPTS[0], n=3 * SEQUENCES, needed=4),
        Request(prompt_ids=PROMPTS[1], n=5),
    ]
    found = draw(engine, requests)
    assert len(found) == 3 * SEQUENCES + 5
    assert draw(engine, requests) == found
    first = [each.completion for each in found if each.request == 0]
    finished = [c for c in first if c.finish_reason != "aborted"]
    left = [c for c in first if c.finish_reason == "aborted"]
    assert 4 <= len(finished) < SEQUENCES
    assert any(not c.token_ids for c in left) and any(c.token_ids for c in left)
    assert all(len(c.token_ids) < SAMPLING.max_completion_length for c in left)
    for completion in left:
        assert_logprobs(plain, PROMPTS[0], completion)
        assert not set(completion.token_ids) & set(STOP)
    others = [each.completion for each in found if each.request == 1]
    assert {c.finish_reason for c in others} <= {"stop", "length"}


def test_an_aborted_completion_goes_on_where_it_was(engine, plain):
    requests = [Request(prompt_ids=PROMPTS[0], n=10, needed=2)]
    left = [
        each.completion
        for each in draw(engine, requests)
        if each.completion.finish_reason == "aborted" and each.completion.token_ids
    ]
    old, seed = engine.weights.version, replace(SAMPLING, seed=5)
    engine.weights.version = old + 3
    try:
        more = draw(engine, [Request(prompt_ids=PROMPTS[0], n=len(left) + 2, begun=left)], seed)
    finally:
        engine.weights.version = old
    completions = {each.index: each.completion for each in more}
    for index, begun in enumerate(left):
        whole = completions[index]
        start = len(begun.token_ids)
        assert whole.token_ids[:start] == begun.token_ids
        assert whole.sampling_logprobs[:start] == begun.sampling_logprobs
        assert start < len(whole.token_ids) <= SAMPLING.max_completion_length
        assert whole.spans == ((old, 0), (old + 3, start)) and whole.weight_version == old + 3
        assert (whole.finish_reason == "length") == (whole.token_ids[-1] not in STOP)
        assert_logprobs(plain, PROMPTS[0], whole)
    assert all(completions[i].spans == ((old + 3, 0),) for i in (len(left), len(left) + 1))


@pytest.mark.vllm
def test_vllm_stops_between_two_steps_when_it_is_told_to(engine):
    """Not only between two completions: none of these ends before its 40th token."""
    if engine.name != "vllm":
        pytest.skip("in its own process there is nobody else to tell it")
    requests, asked = [Request(prompt_ids=PROMPTS[0], n=4)], []

    def stopped() -> bool:
        asked.append(len(asked))
        return len(asked) == 5

    endless = replace(SAMPLING, temperature=0)
    reference = draw(engine, requests, endless)
    assert all(len(each.completion.token_ids) > 8 for each in reference)
    assert list(engine.stream(requests, endless, stopped)) == [] and len(asked) == 5
    assert draw(engine, requests, endless) == reference


def test_a_completion_of_one_token_each(engine):
    everything = replace(SAMPLING, max_completion_length=1)
    found = draw(engine, [Request(prompt_ids=PROMPTS[2], n=SEQUENCES + 2, needed=3)], everything)
    finished = [each for each in found if each.completion.finish_reason != "aborted"]
    assert len(found) == SEQUENCES + 2 and len(finished) >= 3
    assert all(len(each.completion.token_ids) == 1 for each in finished)


def test_when_every_token_ends_a_completion_nothing_is_left_to_abort(engine, monkeypatch):
    monkeypatch.setattr(engine, "stop_token_ids", type(engine.stop_token_ids)(range(320)))
    found = draw(engine, [Request(prompt_ids=ids, n=5, needed=2) for ids in PROMPTS])
    completions = [each.completion for each in found]
    assert [each[:2] for each in found] == [(r, i) for r in range(3) for i in range(5)]
    assert all(len(c.token_ids) == 1 and c.finish_reason == "stop" for c in completions)


def has_loop(token_ids, times, period):
    """Whether the last tokens are `times` copies of one pattern."""
    return any(
        len(token_ids) >= p * times
        and list(token_ids[-p * times :]) == list(token_ids[-p:]) * times
        for p in range(1, period + 1)
    )


def test_a_completion_that_repeats_itself_is_ended(engine):
    """At a low temperature the random model soon goes round in circles."""
    cold = replace(SAMPLING, temperature=0.05, stop_repetition=3, repetition_period=4)
    found = draw(engine, [Request(prompt_ids=ids, n=4) for ids in PROMPTS], cold)
    reasons = {each.completion.finish_reason for each in found}
    assert "repetition" in reasons
    for _, _, completion in found:
        ids = completion.token_ids
        ended = len(ids) == cold.max_completion_length or ids[-1] in STOP
        assert (completion.finish_reason == "repetition") == (not ended)
        assert ended or has_loop(ids, 3, 4)
        assert not any(has_loop(ids[:end], 3, 4) for end in range(1, len(ids)))


def test_a_stream_that_is_closed_leaves_a_good_engine(engine):
    requests = [Request(prompt_ids=ids, n=6) for ids in PROMPTS]
    before = draw(engine, requests)
    with closing(engine.stream(requests, SAMPLING)) as stream:
        next(stream)
    assert draw(engine, requests) == before


def test_each_span_has_the_log_probs_of_the_weights_that_drew_it(engine, policy, plain, tiny_model):
    left = [
        each.completion
        for each in draw(engine, [Request(prompt_ids=PROMPTS[0], n=10, needed=2)])
        if each.completion.finish_reason == "aborted"
    ]
    changed = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    original = [weight.detach().clone() for weight in policy.model.parameters()]
    version = engine.weights.version
    with torch.no_grad():
        for model in (policy.model, changed):
            for weight in model.parameters():
                weight.mul_(1.3)
    try:
        engine.weights.push(policy.named_weights(), version + 1)
        seed = replace(SAMPLING, seed=6)
        more = draw(engine, [Request(prompt_ids=PROMPTS[0], n=len(left), begun=left)], seed)
    finally:
        with torch.no_grad():
            for weight, before in zip(policy.model.parameters(), original, strict=True):
                weight.copy_(before)
        engine.weights.push(policy.named_weights(), version)
    differences = []
    for _, _, completion in more:
        (_, _), (newest, start) = completion.spans
        assert newest == version + 1
        old, new = (
            forward_logprobs(model, PROMPTS[0], completion.token_ids, SAMPLING.temperature)
            for model in (plain, changed)
        )
        found = torch.tensor(completion.sampling_logprobs, dtype=torch.float64)
        torch.testing.assert_close(found[:start], old[:start], atol=1e-3, rtol=0)
        torch.testing.assert_close(found[start:], new[start:], atol=1e-3, rtol=0)
        differences.append((old - new).abs().max())
    assert min(differences) > 0.1


@pytest.mark.vllm
def test_an_engine_that_dies_in_between_is_an_engine_error(engine, monkeypatch):
    if engine.name != "vllm":
        pytest.skip("the embedded sampler runs in the learner")
    inner, steps = engine._llm.llm_engine, []

    def step():
        steps.append(1)
        if len(steps) > 3:
            raise RuntimeError("worker died")
        return []

    monkeypatch.setattr(inner, "step", step)
    with pytest.raises(EngineError, match="vLLM failed while sampling: worker died"):
        draw(engine, [Request(prompt_ids=PROMPTS[0], n=4)])


def test_spans_of_a_completion_that_was_continued():
    begun = Completion(
        token_ids=[1, 2], sampling_logprobs=[-1.0, -2.0], finish_reason="aborted", weight_version=3
    )
    none = replace(begun, token_ids=[], sampling_logprobs=[], weight_version=4)
    more = replace(begun, token_ids=[7], sampling_logprobs=[-0.5], weight_version=5)
    assert begun.extended(none).spans == ((3, 0),)
    assert begun.extended(none).weight_version == 3
    twice = begun.extended(more).extended(replace(more, weight_version=5, finish_reason="stop"))
    assert twice.spans == ((3, 0), (5, 2)) and twice.weight_version == 5
    assert (twice.token_ids, twice.finish_reason) == ([1, 2, 7, 7], "stop")
    assert twice.extended(replace(more, weight_version=8)).spans == ((3, 0), (5, 2), (8, 4))
