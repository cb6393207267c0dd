"""What the named options of a policy loss may be, and what a loss type stands for."""

from __future__ import annotations

TOKEN_MEAN = "token-mean"
SEQUENCE_MEAN = "seq-mean-token-mean"
SEQUENCE_SUM = "seq-mean-token-sum"
SEQUENCE_SUM_NORM = "seq-mean-token-sum-norm"
TOKEN_SUM = "token-sum"
AGGREGATIONS = (TOKEN_MEAN, SEQUENCE_MEAN, SEQUENCE_SUM, SEQUENCE_SUM_NORM, TOKEN_SUM)

LOSS_TYPES: dict[str, tuple[str, str]] = {
    "grpo": ("clip", SEQUENCE_MEAN),
    "gspo": ("clip", SEQUENCE_MEAN),
    "bnpo": ("clip", TOKEN_MEAN),
    "dapo": ("clip", TOKEN_MEAN),
    "dr_grpo": ("clip", SEQUENCE_SUM_NORM),
    "luspo": ("clip", SEQUENCE_SUM),
    "cispo": ("cispo", TOKEN_MEAN),
    "cispo_two_sided": ("cispo_two_sided", TOKEN_MEAN),
    "sapo": ("sapo", SEQUENCE_MEAN),
    "vespo": ("vespo", TOKEN_MEAN),
    "geo_mean": ("geo_mean", SEQUENCE_MEAN),
    "reinforce": ("reinforce", TOKEN_MEAN),
    "gpg": ("reinforce", TOKEN_MEAN),
    "dro": ("dro", TOKEN_MEAN),
    "dppo_tv": ("dppo_tv", TOKEN_MEAN),
    "dppo_kl": ("dppo_kl", TOKEN_MEAN),
}
"""loss_type -> (formula, how tokens are summed up)"""

LEVELS = ("token", "sequence", "sequence_token")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
