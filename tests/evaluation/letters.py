"""Problem rows of known sets, and an engine that answers by a script."""

from __future__ import annotations

from polymath_fast.rollout.types import Completion

ROWS = {
    "aime": {"problem": "p", "solution": r"\boxed{1}", "answer": "204"},
    "amc": {"id": 0, "problem": "p", "question": "p", "answer": 27.0},
    "gsm8k": {"question": "p", "answer": "2 + 40 = <<2+40=42>>42\n#### 42"},
    "minerva": {"problem": "p", "solution": r"so \boxed{3} and \[x=\boxed{4.5e33} \text{erg}\]"},
    "olympiad": {"context": None, "question": "p", "solution": ["long"], "final_answer": ["$7$"]},
    "olympiad_2": {"question": "p", "final_answer": ["$69$", "$84$"]},
    "mmlu": {"question": "p", "type": "biology", "choices": ["a", "b", "c", "d"], "answer": 2},
    "sat": {"question": "p", "options": "A) $1$ B) $2$ C) $3$", "Answer": "B"},
    "by_text": {"question": "p", "choices": ["red", "blue"], "answer": "blue"},
    "by_table": {"question": "p", "choices": {"A": "x", "B": "y"}, "answer": "(B)"},
    "verl": {
        "data_source": "minerva_verl",
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
        "reward_model": {"ground_truth": "5", "style": "rule"},
    },
}


class Letters:
    """A tokenizer with one id a character; 0 ends a completion."""

    eos_token_id = 0
    chat_template = None
    added_tokens_decoder: dict = {}

    def encode(self, text, add_special_tokens=True, **_):
        return [ord(character) for character in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids if i)


class Scripted:
    """An engine that answers attempt j to a prompt with `script(prompt, j)`."""

    def __init__(self, script):
        self.script, self.calls, self.closed = script, [], False

    def generate_many(self, prompts, n, sampling):
        self.calls.append((len(prompts), n, sampling))
        return [[self._answer(ids, j) for j in range(n)] for ids in prompts]

    def _answer(self, ids, j):
        text = self.script("".join(map(chr, ids)), j)
        cut = text.endswith("...")
        ids = [ord(c) for c in text] + [0] * (not cut)
        return Completion(
            token_ids=ids,
            sampling_logprobs=[0.0] * len(ids),
            finish_reason="length" if cut else "stop",
            weight_version=0,
        )

    def close(self):
        self.closed = True
