"""A torchvision for another torch is never imported."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from polymath_fast import environment


@pytest.mark.parametrize(
    ("versions", "hidden"),
    [
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0"}, 2),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, 0),
        ({"torch": "2.13.0+cpu"}, 0),
        ({"torch": "2.13.0", "torchvision": "0.28.0"}, 0),  # a CUDA pair
    ],
)
def test_only_mismatched_packages_are_hidden(monkeypatch, versions, hidden):
    def version(name):
        if name not in versions:
            raise environment.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(environment, "version", version)
    for name in ("torchvision", "torchaudio", "torchcodec"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = environment.hide_mismatched_companions()
    try:
        assert len(found) == hidden
        for name in found:
            assert importlib.util.find_spec(name) is None
            with pytest.raises(ImportError):
                importlib.import_module(name)
    finally:
        for name in found:
            sys.modules.pop(name, None)
