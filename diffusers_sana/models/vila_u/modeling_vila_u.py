"""VILA-U (arXiv 2409.04429): one language model that reads and writes text, pictures and videos.

    pixels -> vision tower -> codes -> sum of their entries -> projector -> T positions of the language model
    hidden state -> text head -> next token;  hidden state -> depth transformer -> D codes of the next cell

Legend: B rows, L positions, H width of the language model, T cells of a picture, D codes a cell, K codebook entries, C
width of an entry, V cells that are targets.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

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


@dataclass
class VilaUImageFeatures(BaseModelOutputWithPooling):
    """What the language model gets to see of n pictures.

    Attributes:
        last_hidden_state: `[n, T, C]`, sums of codebook entries.
        pooler_output: `[n, T, H]`, the same after the projector; the name is the one transformers looks for.
        hidden_states, attentions: of the encoder, where they were asked for.
        codes: `[n, T, D]`.
    """

    codes: Tensor | None = None


@dataclass
class VilaUModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the language model, and `image_hidden_states` `[n, T, H]`, the n pictures as it saw them."""

    image_hidden_states: Tensor | None = None


@dataclass
class VilaUCausalLMOutputWithPast(ModelOutput):
    """Losses and predictions.

    Attributes:
        loss: `text_loss + config.visual_loss_weight * visual_loss`.
        text_loss, visual_loss: means over the supervised text positions, and over the codes of the target cells.
        logits: `[B, kept positions, vocabulary]`; None in training with labels.
        depth_logits: `[V, D, K]` of the target cells, in the order of the rows; None without labels and in training.
        past_key_values, hidden_states, attentions: of the language model.
        image_hidden_states: `[n, T, H]`, the pictures as the language model saw them.
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
    """What the two models share: what they can do, in the words of transformers."""

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


class VilaUModel(VilaUPreTrainedModel):
    """Vision tower, projector and language model, without heads.

    The tower is frozen here and stays in eval mode: its codebook must not move while codes are learned. To train it,
    use `VilaUVisionModel` alone.
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
        """As in any module, but the tower stays in eval mode, and frozen.

        Loading makes new parameters, which require gradients, and then calls this.
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> VilaUImageFeatures:
        """Images as the language model sees them.

        Args:
            pixel_values: `[n, 3, H, W]`, in [-1, 1].
            image_codes: `[n, T, D]`, if they are known already: then the encoder does not run.
            output_hidden_states, output_attentions: also return those of the encoder; None: as the configuration says.

        Raises:
            ValueError: both are given, or neither; or states of an encoder that does not run are wanted.
        """
        if (pixel_values is None) == (image_codes is None):
            raise ValueError("give exactly one of `pixel_values` and `image_codes`")
        tower: Any = self.vision_tower
        if pixel_values is None:
            if output_hidden_states or output_attentions:
                raise ValueError(
                    "`output_hidden_states` and `output_attentions` need `pixel_values`: for `image_codes` the encoder"
                    " does not run"
                )
            with torch.no_grad():  # nothing in the frozen tower could use a gradient
                seen = VilaUVisionModelOutput(codes=image_codes, quantized=tower.embed_codes(image_codes))
        else:
            states = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            wanted = {name: value for name, value in states.items() if value is not None}
            seen = tower.tokenize(pixel_values.to(tower.dtype), return_dict=True, **wanted)
        entries: Any = seen.quantized
        return VilaUImageFeatures(
            last_hidden_state=entries,
            pooler_output=self.project(entries),
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
            codes=seen.codes,
        )

    def is_placeholder(self, input_ids: Tensor) -> Tensor:
        """Where `input_ids` stand for cells of pictures: bool, of the same shape."""
        return input_ids == self.config.image_token_id

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Inputs of the language model, `[B, L, H]`, with the pictures in their places.

        Args:
            input_ids: `[B, L]`, with `config.image_token_id` at each cell of each picture.
            image_features: `[n, T, H]`, the pictures in the order of their placeholders.

        Raises:
            ValueError: the number of placeholders is not n * T.
        """
        is_placeholder = self.is_placeholder(input_ids)
        # The placeholder may have no row in the table.
        pad = self.config.text_config.pad_token_id or 0
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, pad))
        if image_features is None:
            image_features = self._no_image_features(embeddings)
        if image_features is None:
            return embeddings
        cells, given = is_placeholder.sum(), image_features.shape[0] * image_features.shape[1]
        torch_compilable_check(
            cells == given,
            lambda: (
                f"`input_ids` must hold `image_token_id` = {self.config.image_token_id} once for each cell of each "
                f"picture, that is {given} times for what was given, but holds it {int(cells)} times"
            ),
        )
        features = image_features.to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(is_placeholder[..., None], features)

    def _no_image_features(self, embeddings: Tensor) -> Tensor | None:
        """An empty `[0, T, H]` where there should be no placeholder; None in decoding steps, where nobody looks.

        In training it passes through the projector, so that all ranks use it whether or not they have pictures.
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
            input_ids: `[B, L]`; or `inputs_embeds`, `[B, L, H]`, which `embed` makes.
            attention_mask, position_ids, past_key_values, use_cache, kwargs: of the language model.
            pixel_values: `[n, 3, H, W]`, the pictures of all rows, in order.
            image_codes: `[n, T, D]`, in place of `pixel_values`.
            mm_encoder_outputs: in place of both, {"image": result of `get_image_features`}.

        Raises:
            ValueError: input ids and embeddings, or pictures, are given in two ways; or pictures with embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
        features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None or image_codes is not None:
            if features is not None:
                raise ValueError("give `pixel_values`, `image_codes` or `mm_encoder_outputs`, not two of them")
            features = self.get_image_features(pixel_values, image_codes, return_dict=True)
        seen = None if features is None else features.pooler_output
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, seen)
        elif seen is not None:
            raise ValueError("pictures need `input_ids`; with `inputs_embeds`, put them there with `embed`")
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return VilaUModelOutputWithPast(**outputs, image_hidden_states=seen)


class VilaUForConditionalGeneration(VilaUPreTrainedModel, VilaUGenerationMixin):
    """VILA-U with both heads: `generate` writes text, pictures and videos, `forward` gives the losses of training."""

    output_modalities = ("image", "text", "video")  # type: ignore[assignment]
    accepts_loss_kwargs = False  # the trainer's one count of items would mix text and codes
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # A decoding step sees few rows: 16-bit activations cost nothing there.
    _svdquant_modules = {"model.language_model.layers.*": "w4a16", "depth_transformer.layers.*": "w4a16"}

    def __init__(self, config: VilaUConfig) -> None:
        super().__init__(config)
        self.model = VilaUModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.depth_transformer = VilaUDepthTransformer._from_config(config.depth_config)
        self.add_model_tags(["vila-u", "diffusers_sana"])  # on the Hub, `push_to_hub` says whose model it is
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
        """Predicts, and with `labels` scores, the next token or the codes of the next cell of each position.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, pixel_values, image_codes,
                use_cache, mm_encoder_outputs, kwargs: see `VilaUModel.forward`. Packed samples: no mask, and
                `position_ids` that start at 0 in each.
            labels: `[B, L]`, not shifted: -100 where nothing is to be learned. A picture is a target where the labels
                at its placeholders are anything else; its codes are then learned. Needs `input_ids`.
            shift_labels: `[B, L]`, in place of `labels`: what is to be predicted *at* each position, as trainers that
                split sequences over processes give it. A part must not end before a cell of an image that is a
                target.
            logits_to_keep: of how many last positions, or of which, to make `logits`; 0 for all.
            return_logits: whether to make `logits` and `depth_logits`; None: unless training with labels, where the
                losses are computed in chunks and all the logits together would not fit.
            num_text_targets, num_code_targets: by what to divide the sum of each loss, where the batch is larger than
                this call (gradient accumulation, several ranks); codes count one by one, D a cell. None: the
                targets in this call.

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
            # A cache is of no use to a loss, and with one transformers does not look for packed samples.
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
            else:  # whoever shifted them has left out what is not to be learned
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
        # Made at once: a `ModelOutput` has its fields in the order in which they were set.
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
        """`[V, D]`: of all cells in order, those that are targets."""
        features = (mm_encoder_outputs or {}).get("image")
        if features is None:
            return torch.zeros(0, self.config.depth_config.num_codebooks, dtype=torch.long, device=is_visual.device)
        if features.codes is None:
            raise ValueError("`labels` of pictures need the codes in `mm_encoder_outputs`, or `image_codes`")
        return features.codes.flatten(0, 1)[is_visual[is_placeholder]]

    def _text_loss(self, states: Tensor, targets: Tensor, given_count: Tensor | int | None) -> Tensor:
        total = chunked_cross_entropy(*at_least_one(states, targets), self.lm_head)
        return mean_of(total, len(targets), given_count)

    def _visual_loss(
        self, states: Tensor, codes: Tensor, given_count: Tensor | int | None, return_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Mean cross-entropy of codes `[V, D]` after states `[V, H]`, and the logits `[V, D, K]`."""
        count = codes.numel()
        states, targets = at_least_one(states, codes)
        entries = self.model.vision_tower.embed_code(targets.clamp_min(0)).detach().to(states.dtype)
        slots = self.depth_transformer(states, entries, return_dict=True).last_hidden_state
        total = chunked_cross_entropy(slots.flatten(0, 1), targets.flatten(), self.depth_transformer.head)
        logits = self.depth_transformer.head(slots[: len(codes)]) if return_logits else None
        return mean_of(total, count, given_count), logits

    @torch.no_grad()
    def decode_image_tokens(self, codes: Tensor, chunk_size: int = 8) -> Tensor:
        """Pixels of codes.

        Args:
            codes: `[N, T, D]` or `[N, F, T, D]`; also `[N * T, D]`, as transformers' pipeline has them.
            chunk_size: so many pictures are decoded at a time.

        Returns:
            `[N, 3, H, W]` or `[N, F, 3, H, W]`, about -1 to 1 and not clamped.
        """
        vision = self.config.vision_config
        pictures = codes.reshape(-1, vision.num_image_tokens, vision.num_codebooks)
        decode = self.model.vision_tower.decode_codes
        pixels = torch.cat([decode(chunk) for chunk in pictures.split(chunk_size)])
        return pixels if codes.ndim == 2 else pixels.unflatten(0, codes.shape[:-2])


__all__ = ["VilaUForConditionalGeneration", "VilaUModel", "VilaUPreTrainedModel"]
