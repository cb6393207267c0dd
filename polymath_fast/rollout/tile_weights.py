"""The weights of a policy as `tile_decoder.TileDecoder` reads them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polymath_fast.kernels.cpu import tiles
from polymath_fast.kernels.cpu.operands import bits, pack_layers
from polymath_fast.kernels.cpu.products import TileLogits
from polymath_fast.kernels.dense import stacked_or_copied
from polymath_fast.kernels.layer_rows._cpu import norms_by_head
from polymath_fast.learner.layer_passes import Projections
from polymath_fast.learner.policy import Policy
from polymath_fast.rollout.tape_room import DecoderSizes


def fits(policy: Policy) -> bool:
    """Whether `policy` can decode this way on this machine."""
    weight = policy.head.weight
    on_cpu = weight.device.type == "cpu"
    if policy.unfused is not None or not on_cpu or not tiles.available(weight.dtype):
        return False
    even = weight.shape[1] % 2 == 0 and policy.model.config.intermediate_size % 2 == 0
    size = policy.model.get_decoder().layers[0].self_attn.head_dim
    return size % tiles.LANES == 0 and (even or weight.dtype == torch.float32)


class TileWeights:
    """A policy's weights as they are now, packed for the decoders of one round of sampling."""

    def __init__(self, policy: Policy):
        decoder = policy.model.get_decoder()
        blocks = [(layer.self_attn, layer.mlp) for layer in decoder.layers]
        attention = blocks[0][0]
        size, weight = attention.head_dim, blocks[0][1].down_proj.weight
        self.sizes = DecoderSizes(
            layers=len(blocks),
            hidden=weight.shape[0],
            heads=attention.q_proj.weight.shape[0] // size,
            key_heads=attention.k_proj.weight.shape[0] // size,
            head_dim=size,
            inner=weight.shape[1],
            vocab=len(policy.head.weight),
            dtype=weight.dtype,
        )
        self.scale = np.float32(attention.scaling)
        self.eps = np.float32(decoder.norm.variance_epsilon)
        self.norms = bits(torch.stack(_norms(decoder)))
        fronts = [Projections.of(layer) for layer in decoder.layers]
        self.head_norms = np.stack(
            [norms_by_head(front.head_norms, front.counts(size)) for front in fronts]
        )
        self.biases = np.stack([_biases(each) for each, _ in blocks])
        qkv = [[a.q_proj.weight, a.k_proj.weight, a.v_proj.weight] for a, _ in blocks]
        self.qkv = pack_layers("qkv", [stacked_or_copied(weights) for weights in qkv])
        self.output = pack_layers("output", [a.o_proj.weight for a, _ in blocks])
        gates = [mlp.gate_proj.weight for _, mlp in blocks]
        self.gate_up = pack_layers("gate_up", gates, [mlp.up_proj.weight for _, mlp in blocks])
        self.down = pack_layers("down", [mlp.down_proj.weight for _, mlp in blocks])
        self.embedding = decoder.embed_tokens
        self.rotary = decoder.rotary_emb
        self.head = TileLogits(policy.head.weight.detach())
        self.bias = policy.head.bias


def _norms(decoder: nn.Module) -> list[Tensor]:
    """Of attention and MLP, layer by layer, and the last."""
    found = []
    for layer in decoder.layers:
        found += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    return [weight.detach() for weight in (*found, decoder.norm.weight)]


def _biases(attention: nn.Module) -> np.ndarray:
    """(Hq D + 2 Hkv D,) fp32, or (0,) where projections have no bias."""
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    if linears[0].bias is None:
        return np.empty(0, np.float32)
    return torch.cat([linear.bias.detach().float() for linear in linears]).numpy()
