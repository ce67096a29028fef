"""The vision tower of VILA-U (arXiv 2409.04429): images to codes and codes to images.

    pixels [B, 3, H, W] in [-1, 1] -> SigLIP encoder without its last block -> features [B, h, w, C]
      -> residual quantizer -> codes [B, T, D], zq [B, T, C] -> 1x1 convolution -> pixel decoder -> pixels

Optional, for training the tower and for zero-shot classification: the rest of SigLIP, which maps zq to one vector, and
SigLIP's text tower. The released code does not contain this path; it is the one that fits the official weights.

Legend: C encoder width, h x w grid, T = h w image tokens, D codes per image token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from diffusers_sana._compat import capture_outputs
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUVisionConfig
from diffusers_sana.models.vila_u.decoder_vila_u import VilaUPixelDecoder, resize_latents
from diffusers_sana.models.vila_u.quantizer_vila_u import VilaUResidualQuantizer
from diffusers_sana.models.vila_u.siglip_vila_u import (
    LOGIT_BIAS,
    LOGIT_SCALE,
    VilaUAttentionPooling,
    VilaUSemanticHead,
    VilaUTextTower,
    VilaUVisionAttention,
    VilaUVisionBlock,
    VilaUVisionEmbeddings,
    sigmoid_contrastive_loss,
    vision_block,
)


@dataclass
class VilaUVisionModelOutput(ModelOutput):
    """What `VilaUVisionModel.forward` returns.

    Args:
        codes: `[B, T, D]`, int64.
        quantized: zq, `[B, T, C]`: the sum of the codebook entries; its gradient passes to `features` unchanged.
        reconstruction: `[B, 3, H, W]`, about -1 to 1 and not clamped.
        commitment_loss: scalar; weight it by `config.commitment_loss_weight`.
        features: `[B, h, w, C]`, before quantization.
        image_embeds: `[B, C]`, with `config.use_semantic_head`.
        hidden_states, attentions: of the encoder, if requested.
    """

    codes: Tensor | None = None
    quantized: Tensor | None = None
    reconstruction: Tensor | None = None
    commitment_loss: Tensor | None = None
    features: Tensor | None = None
    image_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class VilaUVisionModel(PreTrainedModel):
    """Image tokenizer: `encode_to_codes` and `decode_codes`. Works alone or as the vision tower of VILA-U.

    To train it, call `quantizer.start_ema()` and use `forward` in training mode. Images must have the size in the
    config; the image processor resizes them and maps them to [-1, 1].
    """

    config: VilaUVisionConfig
    config_class = VilaUVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _input_embed_layer = "patch_embedding"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = [
        "VilaUVisionEmbeddings",
        "VilaUVisionBlock",
        "VilaUAttentionPooling",
        "VilaUResidualQuantizer",
        "VilaUDecoderResBlock",
        "VilaUDecoderAttention",
    ]
    _keys_to_ignore_on_save = ["quantizer.embed_ema", "quantizer.cluster_size_ema"]
    _can_record_outputs = {"hidden_states": VilaUVisionBlock, "attentions": VilaUVisionAttention}

    def __init__(self, config: VilaUVisionConfig):
        super().__init__(config)
        self.embeddings = VilaUVisionEmbeddings(config)
        self.layers = nn.ModuleList(vision_block(config) for _ in range(config.num_hidden_layers - 1))
        self.quantizer = VilaUResidualQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.hidden_size, config.latent_channels, 1)
        self.decoder = VilaUPixelDecoder(config)
        self.semantic_head = VilaUSemanticHead(config) if config.use_semantic_head else None
        self.text_model = VilaUTextTower(config) if config.use_text_tower else None
        if config.use_text_tower:
            self.logit_scale = nn.Parameter(torch.empty(1))
            self.logit_bias = nn.Parameter(torch.empty(1))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif module is self.quantizer.embedding:
            init.normal_(module.weight)
        elif isinstance(module, VilaUAttentionPooling):
            init.normal_(module.probe, std=self.config.initializer_range)
        elif module is self and self.config.use_text_tower:
            init.constant_(self.logit_scale, LOGIT_SCALE)
            init.constant_(self.logit_bias, LOGIT_BIAS)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> VilaUVisionModelOutput:
        """Encodes, quantizes and decodes `[B, 3, H, W]`: everything that a training step of the tower needs.

        Args:
            pixel_values: in [-1, 1].
            output_hidden_states, output_attentions: also return those of the encoder; None: as in the config.
        """
        features = self.encode(pixel_values, output_attentions)
        quantized, codes, commitment_loss = self.quantizer(features.flatten(1, 2))
        return VilaUVisionModelOutput(
            codes=codes,
            quantized=quantized,
            reconstruction=self.decode(quantized),
            commitment_loss=commitment_loss,
            features=features,
            image_embeds=None if self.semantic_head is None else self.semantic_head(quantized),
        )

    def encode(self, pixel_values: Tensor, output_attentions: bool | None = None) -> Tensor:
        """`[B, 3, H, W]` to features `[B, h, w, C]`: the output of the second-to-last block, which is quantized.

        With `output_attentions`, an attention implementation that cannot return its weights raises.
        """
        size = [self.config.num_channels, self.config.image_size, self.config.image_size]
        if pixel_values.ndim != 4 or list(pixel_values.shape[1:]) != size:
            raise ValueError(
                f"`pixel_values` must be [batch, {', '.join(map(str, size))}], got {list(pixel_values.shape)}; "
                "resize the images (the image processor does)"
            )
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, output_attentions=output_attentions)
        return hidden_states.unflatten(1, (self.config.grid_size, self.config.grid_size))

    @torch.no_grad()
    @capture_outputs(tie_last_hidden_states=False)
    def tokenize(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> VilaUVisionModelOutput:
        """`forward` without the decoder and the losses: `codes`, `quantized` and `features` of `[B, 3, H, W]`."""
        features = self.encode(pixel_values, output_attentions)
        codes = self.quantizer.encode(features.flatten(1, 2))
        return VilaUVisionModelOutput(codes=codes, quantized=self.quantizer.decode(codes), features=features)

    @torch.no_grad()
    def encode_to_codes(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, H, W]` to codes `[B, T, D]`, int64, image tokens in raster order."""
        return self.quantizer.encode(self.encode(pixel_values).flatten(1, 2))

    def embed_code(self, codes: Tensor) -> Tensor:
        """Codes of a single depth, `[...]`, to their entries `[..., C]`. Unchecked, for use in loops."""
        return self.quantizer.embedding(codes)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """`[B, T, D]` to zq `[B, T, C]`, for any number of image tokens."""
        self._check_codes(codes, num_tokens=None)
        return self.quantizer.decode(codes)

    def decode(self, quantized: Tensor) -> Tensor:
        """zq `[B, T, C]` to pixels `[B, 3, H, W]`, about -1 to 1 and not clamped."""
        side = self.config.grid_size
        latents = quantized.mT.unflatten(2, (side, side)).to(self.post_quant_conv.weight.dtype)
        if self.config.decoder_latent_size is not None:
            latents = resize_latents(latents, self.config.decoder_latent_size)
        latents = self.post_quant_conv(latents)
        if latents.device.type == "cpu":  # otherwise the convolutions of a single bf16 image take many times as long
            latents = latents.contiguous(memory_format=torch.channels_last)
        return self.decoder(latents)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """`[B, T, D]` to pixels `[B, 3, H, W]`, about -1 to 1 and not clamped."""
        self._check_codes(codes, num_tokens=self.config.num_image_tokens)
        return self.decode(self.quantizer.decode(codes))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, H, W]` to one vector per image, `[B, C]`, computed from its codes. Does not train the codebook."""
        if self.semantic_head is None:
            raise ValueError("this tower has no semantic head; build it with `use_semantic_head=True`")
        return self.semantic_head(self.quantizer.decode(self.encode_to_codes(pixel_values)))

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        """`[B, S]`, padded to `config.text_max_position_embeddings`, to one vector per text, `[B, C]`."""
        return self._require_text_model()(input_ids)

    def contrastive_loss(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """`sigmoid_contrastive_loss` of `[N, C]` and `[N, C]` with this model's scale and bias."""
        self._require_text_model()
        return sigmoid_contrastive_loss(image_embeds, text_embeds, self.logit_scale, self.logit_bias)

    def _require_text_model(self) -> VilaUTextTower:
        if self.text_model is None:
            raise ValueError("this tower has no text tower; build it with `use_text_tower=True`")
        return self.text_model

    def _check_codes(self, codes: Tensor, num_tokens: int | None) -> None:
        """Raises for codes of a wrong shape (`num_tokens=None`: any number), dtype or range.

        The range is checked on a CPU and before decoding; elsewhere the check would synchronize with the device.
        """
        depth, entries = self.config.num_codebooks, self.config.codebook_size
        if codes.ndim != 3 or codes.shape[2] != depth or num_tokens not in (None, codes.shape[1]):
            raise ValueError(f"`codes` must be [batch, {num_tokens or 'tokens'}, {depth}], got {list(codes.shape)}")
        if codes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"`codes` must be int32 or int64, got {codes.dtype}")
        readable = codes.device.type == "cpu" or (num_tokens is not None and codes.device.type != "meta")
        if readable and codes.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in codes.aminmax())
            if low < 0 or high >= entries:
                raise ValueError(f"`codes` must be in 0 to {entries - 1}, got {low} to {high}")
