"""VILA-U (arXiv 2409.04429): one language model that reads and writes text, images and videos.

    pixels -> vision tower -> codes -> sum of their codebook entries -> projector -> T positions of the language model
    hidden state -> text head -> next token;  hidden state -> depth transformer -> D codes of the next image token

Legend: B rows, L positions, H width of the language model, T tokens per image, D codes per image token, K codebook
entries, C width of an entry, V image tokens that are targets.
"""

import os
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from diffusers_sana._compat import slice_logits_to_keep, torch_compilable_check
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig
from diffusers_sana.models.vila_u.depth_vila_u import VilaUDepthTransformer
from diffusers_sana.models.vila_u.generation_vila_u import VilaUGenerationMixin
from diffusers_sana.models.vila_u.loss_vila_u import (
    at_least_one,
    chunked_cross_entropy,
    find_targets,
    mean_of,
    states_before,
    unshift,
)
from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModel, VilaUVisionModelOutput
from diffusers_sana.saving import check_saveable


logger = logging.get_logger(__name__)

# What the language model does something with, what a processor may return beside inputs, and what other models return
# for the next step. transformers passes all else on to the function that computes attention, where most ignore it.
KNOWN_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {"cache_position", "mm_token_type_ids"}


@dataclass
class VilaUImageFeatures(BaseModelOutputWithPooling):
    """Features of n images for the language model.

    Attributes:
        last_hidden_state: `[n, T, C]`, sums of codebook entries.
        pooler_output: `[n, T, H]`, the same after the projector; transformers looks for this name.
        hidden_states, attentions: of the encoder, if requested.
        codes: `[n, T, D]`.
    """

    codes: Tensor | None = None


@dataclass
class VilaUModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the language model, and `image_hidden_states` `[n, T, H]`, the projected features of the n images."""

    image_hidden_states: Tensor | None = None


@dataclass
class VilaUCausalLMOutputWithPast(ModelOutput):
    """Losses and predictions.

    Attributes:
        loss: `text_loss + config.visual_loss_weight * visual_loss`.
        text_loss, visual_loss: means over the supervised text positions and over the codes of the target tokens.
        logits: `[B, kept positions, vocabulary]`; None in training with labels.
        depth_logits: `[V, D, K]` of the target tokens, in row order; None without labels and in training.
        past_key_values, hidden_states, attentions: of the language model.
        image_hidden_states: `[n, T, H]`, the projected features of the images.
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    visual_loss: Tensor | None = None
    logits: Tensor | None = None
    depth_logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class VilaUPreTrainedModel(PreTrainedModel):
    """What the two models share: their capabilities, as transformers states them."""

    config: VilaUConfig
    config_class = VilaUConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes a folder; the arguments are those of transformers.

        Adapters of `add_adapter` and `load_adapter` are written alone, as transformers does.

        Raises:
            ValueError: other adapters are beside the layers. Nothing is written then.
        """
        if not getattr(self, "_hf_peft_config_loaded", False):
            check_saveable(self, type(self).__name__)
        super().save_pretrained(save_directory, *args, **kwargs)


class VilaUModel(VilaUPreTrainedModel):
    """Vision tower, projector and language model, without heads.

    The tower is frozen and stays in eval mode: its codebook must not change while its codes are targets. To train the
    tower, use `VilaUVisionModel` alone.
    """

    def __init__(self, config: VilaUConfig) -> None:
        super().__init__(config)
        width, inner = config.text_config.hidden_size, config.vision_config.hidden_size
        self.vision_tower = VilaUVisionModel._from_config(config.vision_config)
        self.projector = nn.Sequential(
            nn.Linear(inner, width), ACT2FN[config.projector_hidden_act], nn.Linear(width, width)
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.gradient_checkpointing = False
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> "VilaUModel":
        """Like `nn.Module.train`, but the tower stays in eval mode and frozen.

        Loading creates new parameters, which require gradients, and then calls this.
        """
        super().train(mode)
        self.vision_tower.eval().requires_grad_(False)
        return self

    def project(self, entries: Tensor) -> Tensor:
        """Sums of codebook entries `[..., C]` to inputs of the language model `[..., H]`."""
        dtype: Any = self.get_input_embeddings().weight.dtype
        return self.projector(entries.to(dtype))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VilaUImageFeatures:
        """Images as inputs of the language model.

        Args:
            pixel_values: `[n, 3, H, W]`, in [-1, 1].
            image_codes: `[n, T, D]`, if already known: the encoder then does not run.
            kwargs: `output_hidden_states`, `output_attentions`: also return those of the encoder; None: as in the
                config.

        Raises:
            ValueError: both are given, or neither; or states are requested of an encoder that does not run.
            TypeError: another argument.
        """
        if (pixel_values is None) == (image_codes is None):
            raise ValueError("exactly one of `pixel_values` and `image_codes` must be given")
        tower: Any = self.vision_tower
        requested: dict[str, Any] = {name: value for name, value in kwargs.items() if value is not None}
        if pixel_values is None:
            if any(requested.values()):
                raise ValueError(
                    "`output_hidden_states` and `output_attentions` need `pixel_values`: for `image_codes` the encoder"
                    " does not run"
                )
            with torch.no_grad():  # nothing in the frozen tower could use a gradient
                tokens = VilaUVisionModelOutput(codes=image_codes, quantized=tower.embed_codes(image_codes))
        else:
            tokens = tower.tokenize(pixel_values.to(tower.dtype), return_dict=True, **requested)
        entries: Any = tokens.quantized
        return VilaUImageFeatures(
            last_hidden_state=entries,
            pooler_output=self.project(entries),
            hidden_states=tokens.hidden_states,
            attentions=tokens.attentions,
            codes=tokens.codes,
        )

    def is_placeholder(self, input_ids: Tensor) -> Tensor:
        """Which of `input_ids` are placeholders of image tokens: bool, of the same shape."""
        return input_ids == self.config.image_token_id

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Inputs of the language model, `[B, L, H]`, with image features at the placeholders.

        Args:
            input_ids: `[B, L]`, with `config.image_token_id` at each token of each image.
            image_features: `[n, T, H]`, in the order of the placeholders.

        Raises:
            ValueError: the number of placeholders is not n * T.
        """
        is_placeholder = self.is_placeholder(input_ids)
        # The placeholder may lie outside the embedding table.
        pad = self.config.text_config.pad_token_id or 0
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, pad))
        if image_features is None:
            image_features = self._no_image_features(embeddings)
        if image_features is None:
            return embeddings
        num_placeholders, num_features = is_placeholder.sum(), image_features.shape[0] * image_features.shape[1]
        torch_compilable_check(
            num_placeholders == num_features,
            lambda: (
                f"`input_ids` must contain `image_token_id` = {self.config.image_token_id} once per token of each "
                f"image, {num_features} times for the given images, got {int(num_placeholders)}"
            ),
        )
        features = image_features.to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(is_placeholder[..., None], features)

    def _no_image_features(self, embeddings: Tensor) -> Tensor | None:
        """An empty `[0, T, H]`, with which any placeholder is an error; None in decoding steps, which are not checked.

        In training it passes through the projector, so that all ranks use it whether or not they have images.
        """
        if embeddings.shape[1] == 1:
            return None
        inner = self.config.vision_config.hidden_size
        if self.training and torch.is_grad_enabled():
            return self.project(embeddings.new_zeros(0, 1, inner))
        return embeddings.new_zeros(0, 1, embeddings.shape[-1])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, VilaUImageFeatures] | None = None,
        **kwargs: Any,
    ) -> VilaUModelOutputWithPast:
        """Runs the language model.

        Args:
            input_ids: `[B, L]`; or `inputs_embeds`, `[B, L, H]`, as returned by `embed`.
            attention_mask, position_ids, past_key_values, use_cache, kwargs: of the language model.
            pixel_values: `[n, 3, H, W]`, the images of all rows, in order.
            image_codes: `[n, T, D]`, instead of `pixel_values`.
            mm_encoder_outputs: instead of both, {"image": result of `get_image_features`}.

        Raises:
            ValueError: input ids and embeddings, or images, are given in two ways; or images with embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given")
        if kwargs.keys() - KNOWN_ARGUMENTS and not torch.compiler.is_compiling():
            logger.warning_once(
                f"`{'`, `'.join(sorted(kwargs.keys() - KNOWN_ARGUMENTS))}`: no argument of {type(self).__name__}, and"
                " ignored except by custom attention functions. Leave it out, or correct its name."
            )
        features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None or image_codes is not None:
            if features is not None:
                raise ValueError("only one of `pixel_values`, `image_codes` and `mm_encoder_outputs` may be given")
            features = self.get_image_features(pixel_values, image_codes, return_dict=True)
        image_hidden_states = None if features is None else features.pooler_output
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, image_hidden_states)
        elif image_hidden_states is not None:
            raise ValueError("images need `input_ids`; with `inputs_embeds`, insert them with `embed`")
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return VilaUModelOutputWithPast(**outputs, image_hidden_states=image_hidden_states)


class VilaUForConditionalGeneration(VilaUPreTrainedModel, VilaUGenerationMixin):
    """VILA-U with both heads: `generate` writes text, images and videos, `forward` gives the losses of training."""

    output_modalities = ("image", "text", "video")  # type: ignore[assignment]
    accepts_loss_kwargs = False  # the trainer's single count of items would mix text and codes
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # A decoding step has few rows, so 16-bit activations cost nothing.
    _svdquant_modules = {"model.language_model.layers.*": "w4a16", "depth_transformer.layers.*": "w4a16"}

    def __init__(self, config: VilaUConfig) -> None:
        super().__init__(config)
        self.model = VilaUModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.depth_transformer = VilaUDepthTransformer._from_config(config.depth_config)
        self.add_model_tags(["vila-u", "diffusers_sana"])  # which `push_to_hub` writes
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> VilaUImageFeatures:
        """See `VilaUModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, VilaUImageFeatures] | None = None,
        return_logits: bool | None = None,
        num_text_targets: Tensor | int | None = None,
        num_code_targets: Tensor | int | None = None,
        **kwargs: Any,
    ) -> VilaUCausalLMOutputWithPast:
        """Predicts the next token or the codes of the next image token at each position; with `labels` also the loss.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, pixel_values, image_codes,
                use_cache, mm_encoder_outputs, kwargs: see `VilaUModel.forward`. Packed samples: no mask, and
                `position_ids` that start at 0 in each.
            labels: `[B, L]`, not shifted, -100 where ignored. An image whose placeholders have any other label is a
                target: the loss then covers its codes. Needs `input_ids`.
            shift_labels: `[B, L]`, instead of `labels`: the target *at* each position, as passed by trainers that
                split sequences over processes. A part must not end before an image token that is a target.
            logits_to_keep: the number of last positions, or the positions, of `logits`; 0 for all.
            return_logits: whether to return `logits` and `depth_logits`. None: yes, except in training with labels,
                where the losses are computed in chunks because all logits together would not fit.
            num_text_targets, num_code_targets: divisors of the summed losses where the batch is larger than this call
                (gradient accumulation, several ranks); an image token counts as D codes. None: the targets in this
                call.

        Raises:
            ValueError: see `VilaUModel.forward`.
        """
        targets = labels if shift_labels is None else shift_labels
        if targets is not None and (pixel_values is not None or image_codes is not None):
            features = self.get_image_features(pixel_values, image_codes, return_dict=True)
            mm_encoder_outputs, pixel_values, image_codes = {"image": features}, None, None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_codes=image_codes,
            # A loss needs no cache, and with a cache transformers does not detect packed samples.
            use_cache=False if use_cache is None and targets is not None else use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        if return_logits is None:
            return_logits = targets is None or not self.training
        states, result = outputs.last_hidden_state, {}
        if return_logits:
            result["logits"] = self.lm_head(slice_logits_to_keep(states, logits_to_keep))
        if targets is not None:
            is_placeholder = targets.new_zeros(states.shape[:2], dtype=torch.bool)
            if input_ids is not None:
                is_placeholder = self.model.is_placeholder(input_ids)
            if shift_labels is None:
                is_text, is_visual = find_targets(targets, is_placeholder, attention_mask, position_ids)
            else:  # already set to -100 where ignored
                targets, is_text, is_visual = unshift(shift_labels, is_placeholder, self.config.image_token_id)
            codes = self._target_codes(is_visual[:, : states.shape[1]], is_placeholder, mm_encoder_outputs)
            text_loss = self._text_loss(states_before(states, is_text), targets[is_text], num_text_targets)
            visual_loss, depth_logits = self._visual_loss(
                states_before(states, is_visual), codes, num_code_targets, return_logits
            )
            result |= {
                "loss": text_loss + self.config.visual_loss_weight * visual_loss,
                "text_loss": text_loss,
                "visual_loss": visual_loss,
                "depth_logits": depth_logits,
            }
        # Created in one call: a `ModelOutput` keeps its fields in the order in which they were set.
        return VilaUCausalLMOutputWithPast(
            **result,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _target_codes(
        self, is_visual: Tensor, is_placeholder: Tensor, mm_encoder_outputs: dict[str, VilaUImageFeatures] | None
    ) -> Tensor:
        """Codes `[V, D]` of the image tokens that are targets, in order."""
        features = (mm_encoder_outputs or {}).get("image")
        if features is None:
            return torch.zeros(0, self.config.depth_config.num_codebooks, dtype=torch.long, device=is_visual.device)
        if features.codes is None:
            raise ValueError("`labels` of images need their codes, in `mm_encoder_outputs` or as `image_codes`")
        return features.codes.flatten(0, 1)[is_visual[is_placeholder]]

    def _text_loss(self, states: Tensor, targets: Tensor, total_count: Tensor | int | None) -> Tensor:
        total = chunked_cross_entropy(*at_least_one(states, targets), self.lm_head)
        return mean_of(total, len(targets), total_count)

    def _visual_loss(
        self, states: Tensor, codes: Tensor, total_count: Tensor | int | None, return_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Mean cross-entropy of codes `[V, D]` after states `[V, H]`, and the logits `[V, D, K]`."""
        count = codes.numel()
        states, targets = at_least_one(states, codes)
        entries = self.model.vision_tower.embed_code(targets.clamp_min(0)).detach().to(states.dtype)
        slots = self.depth_transformer(states, entries, return_dict=True).last_hidden_state
        total = chunked_cross_entropy(slots.flatten(0, 1), targets.flatten(), self.depth_transformer.head)
        logits = self.depth_transformer.head(slots[: len(codes)]) if return_logits else None
        return mean_of(total, count, total_count), logits

    @torch.no_grad()
    def decode_image_tokens(self, codes: Tensor, chunk_size: int = 8) -> Tensor:
        """Decodes codes to pixels.

        Args:
            codes: `[N, T, D]` or `[N, F, T, D]`; also `[N * T, D]`, as transformers' pipeline passes them.
            chunk_size: images per call of the decoder.

        Returns:
            `[N, 3, H, W]` or `[N, F, 3, H, W]`, about -1 to 1 and not clamped.
        """
        vision = self.config.vision_config
        images = codes.reshape(-1, vision.num_image_tokens, vision.num_codebooks)
        decode = self.model.vision_tower.decode_codes
        pixels = torch.cat([decode(chunk) for chunk in images.split(chunk_size)])
        return pixels if codes.ndim == 2 else pixels.unflatten(0, codes.shape[:-2])


__all__ = ["VilaUForConditionalGeneration", "VilaUModel", "VilaUPreTrainedModel"]
