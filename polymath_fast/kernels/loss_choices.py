"""What the named options of a policy loss may be, and which of them a loss type reads.

Spec and settings both take their rules from here, so it loads nothing: settings are read, and
refused, before torch is imported.
"""

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
    "clip_cov": ("clip_cov", TOKEN_MEAN),
    "kl_cov": ("kl_cov", TOKEN_MEAN),
}
"""loss_type -> (formula, how tokens are summed up)"""

LEVELS = ("token", "sequence", "sequence_token")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

READERS: dict[str, tuple[str, ...]] = {
    "epsilon": ("clip", "cispo_two_sided", "geo_mean", "dppo_tv", "dppo_kl", "clip_cov"),
    "epsilon_high": (
        "clip",
        "cispo",
        "cispo_two_sided",
        "geo_mean",
        "dppo_tv",
        "dppo_kl",
        "clip_cov",
    ),
    "delta": ("clip",),
    "clip_ratio_c": ("clip", "dppo_tv", "dppo_kl"),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
    "dro_beta": ("dro",),
    "clip_cov_ratio": ("clip_cov",),
    "clip_cov_lb": ("clip_cov",),
    "clip_cov_ub": ("clip_cov",),
    "kl_cov_ratio": ("kl_cov",),
    "ppo_kl_coef": ("kl_cov",),
}
"""option -> formulas that read it"""

BY_COVARIANCE = ("clip_cov", "kl_cov")
"""formulas that choose among all tokens of a call"""

NEEDED = {"cispo": "epsilon_high", "dro": "dro_beta"}
"""formula -> option that it cannot do without"""

DEPENDENT = {
    "importance_sampling_clip_max": "importance_sampling_mode",
    "importance_sampling_clip_min": "importance_sampling_mode",
    "kl_estimator": "beta",
    "use_bias_correction_kl": "beta",
    "kl_max": "beta",
    "entropy_aggregation": "entropy_coef",
}
"""option -> option without which it means nothing"""


def formula(loss_type: str) -> str:
    """Name of its token loss in the table."""
    return LOSS_TYPES[loss_type][0]


def reads(loss_type: str, option: str) -> bool:
    """Whether one of `READERS` has any effect on it."""
    return formula(loss_type) in READERS[option]


def takes(loss_type: str, correction: str) -> bool:
    """Whether one of `CORRECTIONS` works with it: vespo has weights of tokens only."""
    return formula(loss_type) != "vespo" or not correction.startswith("sequence")
