"""Names that the system refuses to look for, whatever would be found there."""

from __future__ import annotations

from pathlib import Path

from polymath_fast.errors import UserError


def require(flag: str, name: str) -> None:
    """Raise UserError, naming `flag`, where the system does not say whether `name` exists: it is
    too long, a loop of links, or in a folder that may not be entered. One that is not there is
    fine."""
    try:
        Path(name).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    # ValueError: a zero byte; RuntimeError: the home of a user who does not exist
    except (OSError, ValueError, RuntimeError) as error:
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{flag} {shown!r} cannot be looked for ({reason}); name something that you may read"
        ) from error
