"""The operators inside other trainers: TRL, verl, OpenRLHF. Thin adapters; the maths is in kernels.

Each submodule needs its trainer installed and says so if it is not. Importing this package loads
nothing, and nothing is patched by an import.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def require(package: str, tested: str, accepted: tuple[str, ...], install: str) -> str:
    """The installed version of `package`.

    Args:
        tested: version the adapter was tested with.
        accepted: beginnings of versions that the adapter takes, for example ("1.16.",).
        install: command that installs a version that works.

    Raises:
        ImportError: not installed, or a version whose interfaces were not looked at.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(
            f"{package} is not installed; tested with {package} {tested}: {install}"
        ) from None
    if not found.startswith(accepted):
        raise ImportError(
            f"{package} {found} is installed, this adapter knows {' '.join(accepted)}x and was "
            f"tested with {package} {tested}: {install}"
        )
    return found


def check_labels(labels: Tensor, states: Tensor, name: str) -> None:
    """Raise ValueError unless labels (...) are one for each row of `states` (..., n)."""
    if labels.shape != states.shape[:-1]:
        raise ValueError(
            f"labels are {tuple(labels.shape)}, {name} {tuple(states.shape)}: want one label a "
            f"row, {tuple(states.shape[:-1])}"
        )
