"""polymath_fast: reinforcement learning with verifiable reward from one sample, fast.

Importing the package loads neither torch nor triton; public names arrive on first use.
"""

from __future__ import annotations

__version__ = "0.1.0"
