"""What `vocab_tol="auto"` may leave out of the LM head's gradient, on every device."""

from __future__ import annotations

ROUNDING = 2.6e-3
"""relative error that rounding a gradient to bf16 makes anyway"""
MARGIN = 0.8
"""part of it that may be planned for, because the gradient's length is an estimate"""
SAMPLED_ROWS = 64
"""rows on which that length is looked up"""
SOME_COLUMNS = 0.5
"""with more of the vocabulary's columns than this alive, gathering them costs more than it saves"""

CPU_BUDGETS = (ROUNDING / 2, ROUNDING / 8, ROUNDING / 32, ROUNDING / 128)
"""shares of the gradient's mass to leave out, greediest first. One is tried after the other, so a
long list costs nothing where an early one fits"""
GPU_BUDGETS = (ROUNDING / 2, ROUNDING / 4, ROUNDING / 8)
"""the same where nothing waits for an answer: all are weighed, whichever fits"""
