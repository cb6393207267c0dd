"""A row that can be asked, and a data set that is loaded or refused."""

from __future__ import annotations

from typing import Any

import pytest

from polymath_fast.errors import UserError
from polymath_fast.samples import Sample, load_samples

GOOD = {"problem": "1 + 1?", "answer": "2"}


def load(tokenizer: Any, dataset: str, **given: Any) -> list[Sample]:
    settings = {
        "question": None,
        "answer": None,
        "dataset_split": "train",
        "max_samples": None,
        "template": "plain",
        "instruction": None,
        "max_completion_length": 8,
        "context_length": 2048,
    }
    return load_samples(tokenizer=tokenizer, dataset=dataset, **{**settings, **given})


def refused(tokenizer: Any, dataset: object, *parts: str, **given: Any) -> None:
    with pytest.raises(UserError) as error:
        load(tokenizer, str(dataset), **given)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
