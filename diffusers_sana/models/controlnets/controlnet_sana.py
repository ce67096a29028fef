"""ControlNet for Sana: a trainable copy of the first blocks that takes an image as condition (arXiv 2302.05543).

Legend: B batch, C latent channels, H W latent height and width, p patch size, h w token grid (H/p, W/p), N = h*w image
tokens, L text tokens, D inner width.
"""

import inspect
import json
from collections.abc import Callable
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.controlnets.controlnet_sana import SanaControlNetOutput
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from diffusers_sana.models.layers import Linear, scaled_adapters, split_scale
from diffusers_sana.models.loading import SingleFileMixin, StrictModelMixin
from diffusers_sana.models.transformers.attention_sana import SanaRMSNorm
from diffusers_sana.models.transformers.config_sana import check_transformer_config
from diffusers_sana.models.transformers.text_sana import SanaTextContext, SanaTextMixin
from diffusers_sana.models.transformers.transformer_sana import (
    SanaPatchEmbed,
    check_conditions,
    make_sana_blocks,
)


WIRINGS = ("diffusers", "nvlabs")
# Config fields that diffusers does not have, and the values for which diffusers builds the same model.
EXTENSIONS = {"qk_norm": None, "wiring": "diffusers", "timestep_scale": 1.0}


class SanaControlNetModel(
    SanaTextMixin, StrictModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, SingleFileMixin
):
    """The ControlNet of Sana: its outputs are added to the residual stream of a `SanaTransformer2DModel`.

    State-dict keys, `forward` and outputs are those of the diffusers class of the same name, and so is the
    configuration except for `qk_norm`, `wiring` and `timestep_scale`, which are saved only if they differ from
    diffusers' behavior.

    The same weights can be connected in two ways (architecture variants). With `wiring="diffusers"` the ControlNet
    starts from the latents, and its output i is added after block i + 1 of the transformer. With `wiring="nvlabs"`, as
    in the original code (github.com/NVlabs/Sana), it starts from the output of the transformer's first block, and its
    output i is added after block i. Weights work best in the variant they were trained with.

    Args:
        in_channels: latent channels.
        out_channels: not used; as in the transformer's configuration.
        num_layers: blocks, and outputs; fewer than the transformer has.
        qk_norm: None, or "rms_norm_across_heads" for transformers that have it (SANA-1.5).
        wiring: "diffusers" or "nvlabs".
        timestep_scale: applied by the pipelines to the timesteps 0 to 1000 that it gets; that of the transformer with
            which it was trained.
        the others: as in `SanaTransformer2DModel`.

    Raises:
        TypeError, ValueError: an invalid field, inconsistent widths, or an unknown `qk_norm` or `wiring`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SanaTransformerBlock", "SanaPatchEmbed"]  # type: ignore[assignment]
    _repeated_blocks = ["SanaTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]  # type: ignore[assignment]
    # `encode_text` calls these outside of `forward`, so each must load its own weights onto the device.
    _group_offload_block_modules = ["caption_projection", "caption_norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = 32,
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_layers: int = 7,
        num_cross_attention_heads: int | None = 20,
        cross_attention_head_dim: int | None = 112,
        cross_attention_dim: int | None = 2240,
        caption_channels: int = 2304,
        mlp_ratio: float = 2.5,
        dropout: float = 0.0,
        attention_bias: bool = False,
        sample_size: int = 32,
        patch_size: int = 1,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        qk_norm: str | None = None,
        wiring: str = "diffusers",
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_transformer_config(self.config)
        dim = num_attention_heads * attention_head_dim
        if wiring not in WIRINGS:
            raise ValueError(f"`wiring` must be one of {WIRINGS}, got {wiring!r}. Use the one of the training.")

        self.patch_embed = SanaPatchEmbed(sample_size, patch_size, in_channels, dim, interpolation_scale)
        self.time_embed = AdaLayerNormSingle(dim)
        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=dim)
        self.caption_norm = SanaRMSNorm(dim)
        self.transformer_blocks = make_sana_blocks(self.config)
        # Zero-initialized: a new ControlNet has no effect.
        self.input_block = _zero_linear(dim)
        self.controlnet_blocks = nn.ModuleList(_zero_linear(dim) for _ in range(num_layers))
        self.gradient_checkpointing = False

    @classmethod
    def from_transformer(
        cls,
        transformer: ModelMixin,
        num_layers: int = 7,
        load_weights_from_transformer: bool = True,
        wiring: str = "diffusers",
    ) -> Self:
        """A new ControlNet to be trained for `transformer`: a copy of its first blocks with zero-initialized outputs.

        Args:
            transformer: a SanaTransformer2DModel, of diffusers or ours.
            num_layers: number of copied blocks; fewer than the transformer has.
            load_weights_from_transformer: also copy the weights, not only the sizes.
            wiring: "diffusers" or "nvlabs".

        Returns:
            A ControlNet in fp32 on the CPU, without any effect until it is trained.

        Raises:
            ValueError: an unsuitable transformer, for example with quantized weights.
        """
        config: Any = transformer.config
        if not 1 <= num_layers < config["num_layers"]:
            raise ValueError(
                f"`num_layers` must be between 1 and {config['num_layers'] - 1}, one below the layers of `transformer`"
                f", got {num_layers}."
            )
        if config["guidance_embeds"]:
            raise ValueError(
                "`transformer` must not have `guidance_embeds`: a ControlNet has no guidance input. Take the teacher,"
                " a Sana or SANA-1.5 transformer. SanaSprintControlNetPipeline runs its ControlNet with the student."
            )
        shared = [name for name in inspect.signature(cls.__init__).parameters if name in config]
        model = cls(**{name: config[name] for name in shared} | {"num_layers": num_layers, "wiring": wiring})
        if load_weights_from_transformer:
            weights = transformer.state_dict()
            wanted = [key for key in model.state_dict() if not key.startswith(("input_block", "controlnet_blocks"))]
            if missing := [key for key in wanted if key not in weights]:
                raise ValueError(
                    f"`transformer` must have plain weights, but lacks {missing[0]!r} and {len(missing) - 1} others. "
                    "Load it unquantized and remove its adapters, or set `load_weights_from_transformer=False`."
                )
            model.load_state_dict({key: weights[key] for key in wanted}, strict=False)
        return model

    def to_json_string(self) -> str:
        """The config, without fields of our own that have their default value, because diffusers warns about them."""
        config = json.loads(super().to_json_string())
        config = {k: v for k, v in config.items() if k not in EXTENSIONS or v != EXTENSIONS[k]}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        timestep: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        text_context: SanaTextContext | None = None,
    ) -> SanaControlNetOutput | tuple[tuple[Tensor, ...]]:
        """Computes the residuals for the transformer.

        Args:
            hidden_states: noisy latents `[B, C, H, W]`; with `wiring="nvlabs"` the output of the transformer's first
                block `[B, N, D]`.
            encoder_hidden_states: text encoder output `[B, L, caption_channels]`; None with `text_context`.
            timestep: `[B]`, or `[1]` for the whole batch.
            controlnet_cond: latents of the control image `[B or 1, C, H, W]`, scaled like the noisy latents.
            conditioning_scale: factor of the outputs.
            encoder_attention_mask: `[B, L]`, 1 for tokens to attend to and 0 for others, or additive `[B, 1 or N, L]`.
            attention_mask: must be None: linear self-attention has no mask.
            attention_kwargs: may contain `scale`, the weight of the loaded LoRAs.
            return_dict: return a `SanaControlNetOutput` instead of a tuple.
            text_context: from `encode_text`, instead of `encoder_hidden_states` and `encoder_attention_mask`.

        Returns:
            `controlnet_block_samples`, `num_layers` tensors `[B, N, D]`.

        Raises:
            ValueError: shapes that do not match the config, or arguments that this model does not use.
        """
        scale, attention_kwargs = split_scale(attention_kwargs)
        if scale is not None:
            inputs = hidden_states, encoder_hidden_states, timestep, controlnet_cond, conditioning_scale
            options = encoder_attention_mask, attention_mask, attention_kwargs, return_dict
            with scaled_adapters(self, scale):
                return SanaControlNetModel.forward(self, *inputs, *options, text_context)
        p = self.config["patch_size"]
        height, width = controlnet_cond.shape[-2] // p, controlnet_cond.shape[-1] // p
        self._check_inputs(hidden_states, timestep, controlnet_cond, attention_mask)
        text_context = self._resolve_text(
            hidden_states.shape[0], encoder_hidden_states, encoder_attention_mask, attention_kwargs, text_context
        )
        if self.config["wiring"] == "diffusers":
            hidden_states = self.patch_embed(hidden_states)  # [B, N, D]
        hidden_states = hidden_states + self.input_block(self.patch_embed(controlnet_cond.to(hidden_states.dtype)))
        modulation, _ = self.time_embed(timestep, hidden_dtype=hidden_states.dtype)

        samples = []
        layers = zip(self.transformer_blocks, self.controlnet_blocks, text_context.states, strict=True)
        for block, head, text in layers:
            arguments = (hidden_states, text, text_context.attention_mask, modulation, height, width)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states = block(*arguments)
            samples.append(head(hidden_states) * conditioning_scale)
        outputs = tuple(samples)
        return SanaControlNetOutput(controlnet_block_samples=outputs) if return_dict else (outputs,)

    def _check_inputs(
        self, hidden_states: Tensor, timestep: Tensor, controlnet_cond: Tensor, attention_mask: Tensor | None
    ) -> None:
        channels, p = self.config["in_channels"], self.config["patch_size"]
        shape, cond_shape = tuple(hidden_states.shape), tuple(controlnet_cond.shape)
        if len(cond_shape) != 4 or cond_shape[1] != channels or cond_shape[2] % p or cond_shape[3] % p:
            raise ValueError(
                f"`controlnet_cond` must be latents [batch, {channels}, height, width] with sides divisible by "
                f"`patch_size` {p}, got {cond_shape}. Encode the control image with the VAE."
            )
        expected: tuple[int, ...]
        if self.config["wiring"] == "diffusers":
            what, expected = "latents", cond_shape[1:]
        else:
            dim = self.config["num_attention_heads"] * self.config["attention_head_dim"]
            what, expected = (
                "the output of the transformer's first block",
                (cond_shape[2] * cond_shape[3] // p**2, dim),
            )
        if shape[1:] != expected:
            raise ValueError(
                f'`hidden_states` must be {what} [batch, {", ".join(map(str, expected))}] for `wiring="'
                f'{self.config["wiring"]}"` and `controlnet_cond` {cond_shape}, got {shape}.'
            )
        if cond_shape[0] not in (1, shape[0]):
            raise ValueError(
                f"`controlnet_cond` must have batch size {shape[0]}, that of `hidden_states`, or 1, got "
                f"{cond_shape[0]}. Repeat the control latents."
            )
        check_conditions(shape[0], attention_mask, timestep=timestep)


def control(
    controlnet: Any, hidden_states: Tensor, dtype: torch.dtype, **arguments: Any
) -> tuple[Tensor, ...] | Callable[[Tensor], tuple[Tensor, ...]]:
    """The argument `controlnet_block_samples` of the transformer, for either variant.

    Args:
        controlnet: a SanaControlNetModel, of diffusers or ours; may be compiled.
        hidden_states: noisy latents `[B, C, H, W]`, of any dtype.
        dtype: of the transformer.
        arguments: the other arguments of `SanaControlNetModel.forward`, except `return_dict`.

    Returns:
        The outputs; with `wiring="nvlabs"` a function that computes them from the output of the first block, which
        only the transformer of this package accepts.
    """

    def samples(stream: Tensor) -> tuple[Tensor, ...]:
        outputs = controlnet(stream.to(controlnet.dtype), **arguments, return_dict=False)[0]
        return tuple(output.to(dtype) for output in outputs)

    return samples if wiring_of(controlnet) == "nvlabs" else samples(hidden_states)


def wiring_of(controlnet: Any) -> str:
    """The variant of a ControlNet of diffusers or ours: "diffusers" or "nvlabs"."""
    return controlnet.config.get("wiring", "diffusers")


def _zero_linear(dim: int) -> Linear:
    layer = Linear(dim, dim)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
