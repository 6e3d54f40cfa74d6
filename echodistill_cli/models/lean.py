"""UNets in training with fewer operations: layers that read the same input are computed as one.

A step of small batches does not wait for arithmetic but for operations to be dispatched. Here the queries, keys and
values of a self-attention are one product, and so are the keys and values of all cross-attentions and the time shifts
of all ResNet blocks. A LoRA adds two products to each of them, however many layers it covers.

Names, weights and LoRA tensors stay those of diffusers and peft. Wherever a pass is not the usual one (gradient
checkpointing, merged or other adapters), their own code runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.models.adapters import ADAPTER, convolve, is_distilled, product_dtype
from echodistill_cli.models.joined import (
    GatedGelu,
    Projections,
    Stack,
    TextProjections,
    block_diagonal,
    fold_factors,
    joined,
    share_inputs,
)


class _Attention:
    """An attention with one product for queries, keys and values.

    Those of a cross-attention have been computed with all others.
    """

    def __init__(self, unet: LeanUNet, attention: Any) -> None:
        self.unet, self.attention = unet, attention
        readers = () if attention.is_cross_attention else (attention.to_k, attention.to_v)
        self.inputs = Projections([attention.to_q, *readers])
        self.output = Projections([attention.to_out[0]])

    def __call__(self, x: Tensor) -> Tensor:
        """Return the attention's output, [B, N, D], of its normalized input."""
        attention = self.attention
        text, inputs = self.unet.text.outputs, self.inputs(x)
        is_cross = attention.is_cross_attention
        parts = (inputs, text[attention.to_k], text[attention.to_v]) if is_cross else inputs.chunk(3, dim=-1)
        query, key, value = (part.view(*part.shape[:2], attention.heads, -1).transpose(1, 2) for part in parts)
        return self.output(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _LeanBlock(BasicTransformerBlock):  # type: ignore[misc]
    """A transformer block with such attentions, and without diffusers' many branches."""

    unet: LeanUNet
    attentions: tuple[_Attention, _Attention]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [B, N, D]; arguments are diffusers'."""
        if not self.unet.is_active:
            return torch.as_tensor(super().forward(hidden_states, *args, **kwargs))
        of_itself, of_text = self.attentions
        hidden_states = hidden_states + of_itself(self.norm1(hidden_states))
        hidden_states = hidden_states + of_text(self.norm2(hidden_states))
        gated, _, last = self.ff.net
        inner: Tensor = GatedGelu.apply(gated.proj(self.norm3(hidden_states)))  # type: ignore[no-untyped-call]
        return hidden_states + torch.as_tensor(last(inner))


class _LeanTransformer(Transformer2DModel):  # type: ignore[misc]
    """Transformer blocks on a feature map, which is read as tokens and added to without a copy."""

    unet: LeanUNet

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the map [B, C, h, w] in a tuple; arguments are diffusers'."""
        if not self.unet.is_active:
            return super().forward(hidden_states, *args, **kwargs)
        is_linear, size = self.use_linear_projection, hidden_states.shape[2:]
        x = self.norm(hidden_states) if is_linear else self.proj_in(self.norm(hidden_states))
        tokens = x.flatten(2).transpose(1, 2)
        if is_linear:
            tokens = self.proj_in(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        for block in self.transformer_blocks:
            tokens = block(tokens)
        if is_linear:
            tokens = self.proj_out(tokens)
        x = tokens.transpose(1, 2).unflatten(2, size)
        return (hidden_states + (x if is_linear else self.proj_out(x)),)


class _LeanResnet(ResnetBlock2D):  # type: ignore[misc]
    """A ResNet block without a division by 1, whose time shift is computed with all others.

    The shift has the bias of the first convolution in it. A single image takes it as this bias.
    """

    unet: LeanUNet

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [B, C, h, w]; arguments are diffusers'."""
        if not self.unet.is_active:
            return torch.as_tensor(super().forward(input_tensor, temb, *args, **kwargs))
        shift, hidden = self.unet.time_shift(self, temb), F.silu(self.norm1(input_tensor))
        if len(shift) == 1:
            hidden = convolve(self.conv1, hidden, shift[0])
        else:
            hidden = convolve(self.conv1, hidden, None) + shift[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return torch.as_tensor(input_tensor + hidden)


class _LeanTimesteps(Timesteps):  # type: ignore[misc]
    """Sines and cosines of timesteps, with frequencies that are computed once."""

    unet: LeanUNet

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return [B, D] of timesteps [B]."""
        if not self.unet.is_active or not self.flip_sin_to_cos or self.scale != 1 or self.num_channels % 2:
            return torch.as_tensor(super().forward(timesteps))
        angles = timesteps[:, None] * self.unet.frequencies(self, timesteps.device)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


_LEAN: dict[type[nn.Module], Any] = {
    Timesteps: _LeanTimesteps,
    BasicTransformerBlock: _LeanBlock,
    Transformer2DModel: _LeanTransformer,
    ResnetBlock2D: _LeanResnet,
}


class LeanUNet:
    """What a UNet's passes compute for many layers at once.

    Args:
        unet: of SD's or SDXL's kind (`suits`), with frozen weights.

    Attributes:
        is_active: a pass is running in the usual state.
    """

    def __init__(self, unet: Any) -> None:
        self.is_active = False
        self._all = list(unet.modules())
        blocks = self._of(BasicTransformerBlock)
        readers = [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
        self.text = TextProjections(sorted(readers, key=lambda layer: int(layer.out_features)))
        for block in blocks:
            block.attentions = _Attention(self, block.attn1), _Attention(self, block.attn2)
        attentions = [attention for block in blocks for attention in block.attentions]
        self.projections = [each for attention in attentions for each in (attention.inputs, attention.output)]
        self.resnets = self._of(ResnetBlock2D)
        self.time_weight = joined([resnet.time_emb_proj.weight for resnet in self.resnets])
        biases = [resnet.time_emb_proj.bias + resnet.conv1.bias for resnet in self.resnets]
        self.time_bias = torch.cat(biases).detach()
        self._shifts: dict[Any, Tensor] = {}
        self._frequencies: dict[Any, Tensor] = {}
        self._checkpointed = [module for module in self._all if hasattr(module, "gradient_checkpointing")]
        for plain, lean in _LEAN.items():
            for module in self._of(plain):
                module.__class__, module.unet = lean, self
        self._hooks = (
            unet.register_forward_pre_hook(self._begin, with_kwargs=True),
            unet.register_forward_hook(self._end, always_call=True),
        )

    def remove(self) -> None:
        """Give diffusers' own code back to the UNet."""
        for hook in self._hooks:
            hook.remove()
        for plain, lean in _LEAN.items():
            for module in self._of(lean):
                module.__class__ = plain
                del module.unet
        for block in self._of(BasicTransformerBlock):
            del block.attentions

    def _of(self, kind: type[nn.Module]) -> list[Any]:
        return [module for module in self._all if isinstance(module, kind)]

    def time_shift(self, resnet: Any, embedding: Tensor) -> Tensor:
        """Return a ResNet block's time shift plus its first bias, [B, C], from the time embedding [B, D]."""
        if not self._shifts:
            widths = [len(block.time_emb_proj.weight) for block in self.resnets]
            every = F.linear(F.silu(embedding), self.time_weight, self.time_bias)
            self._shifts = dict(zip(self.resnets, every.split(widths, dim=1), strict=True))  # type: ignore[no-untyped-call]
        return self._shifts[resnet]

    def frequencies(self, embedding: Any, device: torch.device) -> Tensor:
        """Return the frequencies of a sinusoidal embedding, float32 [D / 2], by diffusers' formula."""
        if embedding not in self._frequencies:
            half = embedding.num_channels // 2
            powers = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=device)
            self._frequencies[embedding] = torch.exp(powers / (half - embedding.downscale_freq_shift))
        return self._frequencies[embedding]

    @contextmanager
    def folding(self) -> Iterator[None]:
        """Context in which passes without gradient use weights with the LoRA added to them."""
        with torch.no_grad():
            text = self._gather()
            for each in self.projections:
                each.folded = None if each.lora is None else torch.addmm(each.frozen, each.lora[1], each.lora[0])
                each.lora = None
            self.text.all.folded = None if text is None else self.text.fold(*text)
        try:
            yield
        finally:
            for each in (*self.projections, self.text.all):
                each.folded = None

    def _begin(self, _unet: Any, _inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Before a pass: compute what all blocks need, unless the pass is not a usual one."""
        text, is_on = options.get("encoder_hidden_states"), self._lora_is_on()
        # Checkpointing runs the blocks again in the backward pass, when this is forgotten.
        if text is None or is_on is None or self._is_checkpointing():
            return
        is_folded = is_on and not torch.is_grad_enabled() and self.text.all.folded is not None
        lora = self._gather() if is_on and not is_folded else None
        for each in (*self.projections, self.text.all):
            each.weight = each.folded if is_folded and each.folded is not None else each.frozen
        self.text.compute(text, lora)
        self.is_active = True

    def _end(self, *_: Any) -> None:
        """After a pass: let everything go."""
        self.is_active = False
        self._shifts.clear()
        self.text.outputs.clear()
        for each in self.projections:
            each.lora = None

    def _is_checkpointing(self) -> bool:
        return any(module.gradient_checkpointing for module in self._checkpointed)

    def _lora_is_on(self) -> bool | None:
        """Whether passes use the LoRA; None if other adapters are active or it has been merged."""
        layer = next((each.layers[0] for each in (*self.projections, self.text.all) if each.is_adapted), None)
        if layer is None or layer.disable_adapters:
            return False
        return True if not layer.merged and list(layer.active_adapters) == [ADAPTER] else None

    def _gather(self) -> tuple[Tensor, list[Tensor]] | None:
        """Set A and B of all projections, with one conversion per shape; return those of the text projections."""
        adapted = [each for each in self.projections if each.is_adapted]
        by_input: dict[int, list[Projections]] = {}
        by_output: dict[tuple[int, int], list[Projections]] = {}
        for each in adapted:
            by_input.setdefault(each.frozen.shape[1], []).append(each)
            by_output.setdefault((len(each.layers), len(each.frozen)), []).append(each)
        downs: dict[Projections, Tensor] = {}
        ups: dict[Projections, Tensor] = {}
        for group in by_input.values():
            layers = [layer for each in group for layer in each.layers]
            ranks = [len(each.layers) * each.layers[0].r[ADAPTER] for each in group]
            downs |= dict(zip(group, self._downs(layers).split(ranks), strict=True))  # type: ignore[no-untyped-call]
        for (count, _), group in by_output.items():
            stacked = self._ups([layer for each in group for layer in each.layers])
            ups |= dict(zip(group, block_diagonal(stacked, count).unbind(), strict=True))
        for each in adapted:
            each.lora = downs[each], ups[each]
        if not self.text.all.is_adapted:
            return None
        return self._downs(self.text.all.layers), [self._ups(layers) for layers in self.text.widths.values()]

    def _downs(self, layers: Sequence[Any]) -> Tensor:
        """Return A of several layers, [layers · r, in]."""
        whole = torch.cat([layer.lora_A[ADAPTER].weight for layer in layers])
        return whole.to(product_dtype(layers[0].base_layer.weight.dtype))

    def _ups(self, layers: Sequence[Any]) -> Tensor:
        """Return B of several layers times the LoRA's scale, [layers, out, r]."""
        dtype = product_dtype(layers[0].base_layer.weight.dtype)
        weights = [layer.lora_B[ADAPTER].weight for layer in layers]
        whole: Tensor = Stack.apply(dtype, *weights)  # type: ignore[no-untyped-call]
        scale = layers[0].scaling[ADAPTER]
        return whole if scale == 1.0 else whole * scale


def run_lean(pair: ModelPair, encoders: Iterable[nn.Module]) -> None:
    """Let frozen models compute at once what several of their layers share.

    Args:
        pair: with its LoRA. Its UNets stay as they are with `model.offload`, where weights move, and with a
            distillation LoRA, where both share the layers of one base model.
        encoders: of images.
    """
    denoisers = [denoiser for denoiser in (pair.student, pair.loaded_teacher) if denoiser is not None]
    if not pair.alternating and not any(is_distilled(denoiser.unet) for denoiser in denoisers):
        for denoiser in denoisers:
            make_lean(denoiser.unet)
    images = list(encoders)
    for encoder in images:
        fold_factors(encoder)
    for encoder in (*pair.encoder.encoders, *images):
        share_inputs(encoder)


def make_lean(unet: Any) -> None:
    """Let a UNet compute what several layers share at once, if it is of SD's or SDXL's kind.

    Args:
        unet: with frozen weights, which stay on their device, and a LoRA or none.
    """
    if _suits(unet) and not unet.is_gradient_checkpointing:
        unet.lean = LeanUNet(unet)


def run_plain(module: Any) -> None:
    """Give a UNet its own code back; inside a compiled block that costs nothing."""
    if getattr(module, "lean", None) is not None:
        module.lean.remove()
        module.lean = None


def _suits(unet: Any) -> bool:
    """Return whether a UNet's attentions and ResNet blocks are all of the kind that this module computes."""
    config = unet.config
    if "encoder_hid_dim" not in config:  # a transformer
        return False
    if config.encoder_hid_dim or config.cross_attention_norm or unet.training:
        return False
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    resnets = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    return bool(blocks) and all(map(_suits_attention, blocks)) and all(map(_suits_resnet, resnets))


def _suits_attention(block: Any) -> bool:
    if block.norm_type != "layer_norm" or block.only_cross_attention or block.attn2 is None:
        return False
    if len(block.ff.net) != 3 or not isinstance(block.ff.net[0], GEGLU):
        return False
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj", "residual_connection")
    for attention in (block.attn1, block.attn2):
        if any(getattr(attention, name, None) for name in extras) or attention.rescale_output_factor != 1.0:
            return False
        if attention.to_q.bias is not None or attention.is_cross_attention is not (attention is block.attn2):
            return False
    return True


def _suits_resnet(resnet: Any) -> bool:
    plain = resnet.upsample is resnet.downsample is None and resnet.time_emb_proj is not None
    kind = (resnet.time_embedding_norm, resnet.output_scale_factor, resnet.skip_time_act)
    return plain and kind == ("default", 1.0, False) and isinstance(resnet.nonlinearity, nn.SiLU)
