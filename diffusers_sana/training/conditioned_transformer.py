"""Sana's denoiser together with the text encoder that trains with it."""

from typing import cast

from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffusers_sana.training.flow_matching import TRAIN_TIMESTEPS, timesteps_of
from diffusers_sana.training.prompt_conditioning import PromptTokens, drop_prompts, encode_tokens


class ConditionedTransformer(nn.Module):
    """One module for what trains, so that DDP and FSDP see one forward per step.

    Args:
        transformer: a SanaTransformer2DModel.
        text_encoder: a Gemma2Model that trains too; None when the vectors of a frozen encoder are given to `forward`.
        dense_timesteps: tell the transformer 1000 sigma rather than floor(1000 sigma). For the teacher of a
            distillation in continuous time (SANA-Sprint, arXiv 2503.09641), which is asked at all times in between.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        text_encoder: PreTrainedModel | None = None,
        dense_timesteps: bool = False,
    ):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.dense_timesteps = dense_timesteps

    def forward(
        self,
        noisy_latents: Tensor,
        sigmas: Tensor,
        prompt: PromptTokens | tuple[Tensor, Tensor],
        dropped: Tensor | None = None,
    ) -> Tensor:
        """The predicted velocity `[B, C, h, w]`.

        Args:
            noisy_latents: `[B, C, h, w]`.
            sigmas: noise levels `[B]`.
            prompt: tokens with a text encoder; without one vectors `[B, L, D]` and mask `[B, L]`.
            dropped: `[B]`, true where the prompt is to be replaced by the empty one.
        """
        if self.text_encoder is not None:
            embeds, mask = encode_tokens(self.text_encoder, cast(PromptTokens, prompt))
        else:
            embeds, mask = cast(tuple[Tensor, Tensor], prompt)
        if dropped is not None:
            mask = drop_prompts(mask, dropped)
        timesteps = sigmas * TRAIN_TIMESTEPS if self.dense_timesteps else timesteps_of(sigmas)
        timestep = timesteps * self.transformer.config.timestep_scale
        return self.transformer(noisy_latents, embeds, timestep, encoder_attention_mask=mask, return_dict=False)[0]
