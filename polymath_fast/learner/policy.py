"""The model being trained: an unmodified Hugging Face decoder, run on packed shared-prompt rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polymath_fast.environment import no_progress_bars
from polymath_fast.errors import UserError
from polymath_fast.kernels import prefix_attention_blocks
from polymath_fast.learner import fused_layers
from polymath_fast.learner.families import check_supported
from polymath_fast.learner.packing import PackedBatch, pack_prompt
from polymath_fast.learner.shared_prompt import SharedPrompt, SharedRows
from polymath_fast.precision import default_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "polymath_fast"
_OTHER_ATTENTION = ("sliding_window", "softcap", "s_aux", "position_bias")


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: PackedBatch | None = None,
    shared_prompt: SharedPrompt | None = None,
    decode: object | None = None,
    **more: object,
) -> tuple[Tensor, None]:
    """Attention of the packed learner pass (`packed=`) or of the embedded sampler (`decode=`).

    query (B, Hq, T, D), key and value (B, Hkv, T, D) -> (B, T, Hq, D), as transformers' attention
    registry wants it. With `shared_prompt` the rows are that prompt's or, once it is complete, its
    completions'. The keywords travel through the model's own forward, so no model is patched.
    """
    if decode is not None:
        return decode.attend(module.layer_idx, query, key, value, scaling), None
    if packed is None:
        raise RuntimeError(f"{ATTENTION!r} attention runs only inside Policy and its samplers")
    asked = {name: more[name] for name in _OTHER_ATTENTION if more.get(name) is not None}
    if asked:
        raise UserError(
            f"{type(module).__name__} asks for attention with {asked}, which the shared-prompt "
            "learner does not compute; use a model with plain causal attention"
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    if shared_prompt is not None and shared_prompt.complete:
        k, v = shared_prompt.extend(module.layer_idx, k, v)
    elif shared_prompt is not None:
        shared_prompt.keep(module.layer_idx, k, v)
    return prefix_attention_blocks(q, k, v, packed.blocks, scale=scaling).unsqueeze(0), None


def _register_attention() -> None:
    """Without a function for masks: transformers then makes none. With one it looks into the
    position ids before each pass, for which the host has to wait for a GPU."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, shared_prompt_attention)


class Policy:
    """Weights, forward pass and export of the trained model."""

    model_dir: Path | None
    """whose tokenizer `save` copies; None of a model that came from memory"""
    unfused: str | None
    """why its layers are transformers' own; None where they are fused"""

    def __init__(
        self,
        model_dir: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ):
        """`dtype`: of the weights; None is what `precision` says of the device. With
        `gradient_checkpointing` a backward pass keeps each layer's input and computes the
        rest again; the pass of a `share`d prompt, which is short, keeps everything."""
        from transformers import AutoConfig, AutoModelForCausalLM

        _register_attention()
        check_supported(AutoConfig.from_pretrained(model_dir))
        dtype = dtype or default_dtype(device)
        try:
            with no_progress_bars():
                model = AutoModelForCausalLM.from_pretrained(
                    model_dir, dtype=dtype, attn_implementation=ATTENTION, use_safetensors=True
                )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise UserError(
                f"{model_dir}: its weights have other shapes than its config.json says; both must "
                "be of one model, as save_pretrained writes them"
            ) from error
        self._take(model.to(device), torch.device(device), gradient_checkpointing)
        self.model_dir = Path(model_dir)

    @classmethod
    def of(cls, model: PreTrainedModel, *, gradient_checkpointing: bool = False) -> Policy:
        """Of a model in memory, where it lies and in its dtype; its attention becomes the packed
        one. It has no folder, so it cannot be `save`d. Raises UserError as from a folder."""
        check_supported(model.config)
        _register_attention()
        model.set_attn_implementation(ATTENTION)
        policy = cls.__new__(cls)
        policy._take(model, model.device, gradient_checkpointing)
        policy.model_dir = None
        return policy

    def _take(
        self, model: PreTrainedModel, device: torch.device, gradient_checkpointing: bool
    ) -> None:
        self.model = model.eval()  # no dropout, so ratio == 1 on policy
        self.config = model.config
        self.unfused = fused_layers.fuse(model, shared_prompt_attention)
        self.device = device
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def head(self) -> nn.Linear:
        """The LM head; its weight is (V, H) and may be the embedding itself."""
        return self.model.get_output_embeddings()

    @property
    def head_dim(self) -> int:
        """Entries of one head of attention."""
        given = getattr(self.config, "head_dim", None)
        return given or self.config.hidden_size // self.config.num_attention_heads

    def hidden(self, batch: PackedBatch, prompt: SharedPrompt | None = None) -> Tensor:
        """(N, H) hidden states; row i predicts `batch.targets[i]`.

        With `prompt`, from `share`, the batch must have been packed with `prompt_apart`.
        """
        states = self._states(batch, prompt)
        if prompt is not None:
            return prompt.predicting(states, batch.hidden_rows)
        return SharedRows.apply(states, batch.hidden_rows)

    def share(self, prompt_ids: Sequence[int]) -> SharedPrompt:
        """Compute a prompt for several calls of `hidden`; its `backward` must follow theirs."""
        prompt = SharedPrompt(len(prompt_ids))
        states = self._states(pack_prompt(prompt_ids, self.device), prompt)
        prompt.finish(states[-1:])
        return prompt

    def _states(self, batch: PackedBatch, prompt: SharedPrompt | None) -> Tensor:
        """(T, H) states of every row after the last norm."""
        if not batch.input_ids.numel():
            return prompt.last[:0]
        recording = prompt is not None and not prompt.complete
        with checkpointed(self.model, self.gradient_checkpointing and not recording):
            return self.model.get_decoder()(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                packed=batch,
                shared_prompt=prompt,
            ).last_hidden_state[0]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, live weight) of every parameter, a tied head under both its names.

        Engines may hold a repacked copy of a tied head, which they refresh only when it is named.
        """
        return self.model.named_parameters(remove_duplicate=False)

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder: weights (safetensors), config, tokenizer.

        Raises:
            ValueError: the policy is `of` a model in memory, which has no tokenizer.
        """
        from transformers import AutoTokenizer

        if self.model_dir is None:
            raise ValueError(
                "a Policy.of a model in memory has no tokenizer to save; Policy(folder) has one"
            )
        with no_progress_bars():
            self.model.save_pretrained(folder, safe_serialization=True)
            AutoTokenizer.from_pretrained(self.model_dir).save_pretrained(folder)


@contextmanager
def checkpointed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Forward passes inside keep the inputs of `model`'s layers alone, where a gradient is asked.

    transformers' layers checkpoint themselves, but in training mode only, which the learner never
    is in, for dropout must stay off; and in 5.24 not where their forward is another one.
    """
    layers = model.get_decoder().layers if enabled and torch.is_grad_enabled() else ()
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_recomputed(layer))
        yield


@contextmanager
def _recomputed(layer: nn.Module) -> Iterator[None]:
    forward, own = layer.forward, "forward" in vars(layer)
    layer.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        if own:
            layer.forward = forward
        else:
            del layer.forward
