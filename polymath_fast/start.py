"""How `python -m` begins a command: before the command's imports, which take seconds."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import NoReturn


def run(module: str) -> NoReturn:
    """Import `module` and end with what its main() returns; Ctrl-C meanwhile is one line and 130.

    What main() makes of Ctrl-C itself comes first.
    """
    try:
        code = importlib.import_module(module).main()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # a closed terminal is one of the reasons to end
            os.write(2, b"stopped\n")
        code = 130
    sys.exit(code)
