"""How functions are compiled that work on arrays of others and allocate none.

numba counts references to every slice, with an atomic instruction each time one is made and each
time one is dropped: for a row of a head that takes several times as long as the arithmetic. What is
compiled with these options counts nothing; its caller holds the arrays.
"""

from __future__ import annotations

BORROWED = {"nogil": True, "cache": True, "_nrt": False}
INLINED = BORROWED | {"forceinline": True}
