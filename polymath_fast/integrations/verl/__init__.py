"""verl 0.9: our policy losses in its registry, our LM head behind its fused kernels.

`import verl` happens inside the functions, so that the losses can be used and tested without it.
In verl's workers, name the plugin:

    VERL_USE_EXTERNAL_MODULES=polymath_fast.integrations.verl.plugin
"""

from __future__ import annotations

from polymath_fast.integrations import require
from polymath_fast.integrations.rebinding import Patch, check_replaceable, ours
from polymath_fast.integrations.verl.head import FusedLinearForPPO, linear_cross_entropy
from polymath_fast.integrations.verl.losses import LOSS_MODES, PREFIX, policy_loss_fn

__all__ = [
    "LOSS_MODES",
    "FusedLinearForPPO",
    "linear_cross_entropy",
    "patch_verl",
    "policy_loss_fn",
    "register_losses",
]


def register_losses() -> list[str]:
    """Add "polymath_fast_<mode>" for every mode of `LOSS_MODES` to verl's policy losses.

    Returns:
        The names, to be used as `actor_rollout_ref.actor.policy_loss.loss_mode`.

    Raises:
        ImportError: no verl, or another version than 0.9.
    """
    version = _version()
    from verl.trainer.ppo.core_algos import register_policy_loss

    names = [PREFIX + mode for mode in LOSS_MODES]
    for mode, name in zip(LOSS_MODES, names, strict=True):
        register_policy_loss(name)(policy_loss_fn(mode, version))
    return names


def patch_verl() -> Patch:
    """Put our LM head in the place of both of verl's fused ones.

    They run where `actor_rollout_ref.model.use_fused_kernels=True`, with either `impl_backend`.

    Returns:
        A handle: `handle.undo()`, or `with patch_verl(): ...`.

    Raises:
        ImportError: no verl, or another version than 0.9.
        UserError: patched already, or a verl whose functions take other arguments.
    """
    _version()
    import verl.utils.experimental.torch_functional as in_torch
    import verl.utils.kernel.linear_cross_entropy as in_triton

    module = check_replaceable(
        in_torch,
        "FusedLinearForPPO",
        ["self", "hidden_states", "vocab_weights", "input_ids", "temperature"],
        lambda cls: cls.forward,
    )
    check_replaceable(
        in_triton,
        "LinearCrossEntropy",
        ["ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"],
        lambda cls: cls.forward,
    )
    function = in_triton.linear_cross_entropy
    pairs = {module: ours(FusedLinearForPPO), function: ours(linear_cross_entropy)}
    return Patch("verl", pairs)


def _version() -> str:
    return require("verl", tested="0.9.1", accepted=("0.9.",), install="pip install verl==0.9.1")
