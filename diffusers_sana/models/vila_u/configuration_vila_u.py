"""Configurations of VILA-U (arXiv 2409.04429): the vision tower, the depth transformer, and the whole model.

The defaults are the released 256 pixel model, `mit-han-lab/vila-u-7b-256`.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from diffusers_sana._compat import SubConfigSpec


class NeverCopied:
    """A class whose code is never copied into saved folders, because it is in an installed package.

    Loading with `trust_remote_code=True` would otherwise create a second class of the same name.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing; `diffusers_sana.add_remote_code` makes a folder loadable that way."""


def _require_at_least(config: PreTrainedConfig, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {getattr(config, name)}")


def _require_whole_heads(config: PreTrainedConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"`hidden_size` must be a multiple of `num_attention_heads`, got {config.hidden_size} with "
            f"{config.num_attention_heads} heads"
        )


@strict
class VilaUVisionConfig(PreTrainedConfig):
    """The vision tower: SigLIP encoder, residual quantizer with one codebook for all depths, pixel decoder.

    Args:
        hidden_size: width of the encoder, which is also the width of a codebook entry.
        intermediate_size, num_attention_heads, hidden_act, layer_norm_eps, attention_dropout: of the encoder blocks.
        num_hidden_layers: blocks of the SigLIP encoder; the tower runs all but the last.
        num_channels, image_size, patch_size: of the image; pixels beyond the last whole patch are dropped.
        codebook_size: entries of the codebook.
        num_codebooks: depth D, the codes of one image token.
        codebook_decay: of the EMA that trains the codebook.
        commitment_loss_weight: for training code that adds up the losses of the tower.
        restart_unused_codes: whether training replaces unused entries by vectors of the batch.
        quantizer_dtype: dtype of the nearest-entry search. None: that of the tower, as in the official model.
        latent_channels, decoder_base_channels, decoder_channel_multipliers, decoder_num_res_blocks: of the pixel
            decoder; each multiplier after the first doubles the resolution.
        decoder_norm_groups: of the group norms of the pixel decoder; 32 in the released models. With one channel per
            group the norm removes the strength of each channel, and narrow decoders encode it in a bright spot.
        decoder_latent_size: side to which the grid is resized before decoding, if patch size and decoder do not match
            (384 pixel model: 24).
        use_semantic_head: also build the last encoder block and the attention pooling of SigLIP.
        use_text_tower: also build SigLIP's text tower, described by the fields `text_*`.
        initializer_range: standard deviation of newly initialized weights.

    Raises:
        StrictDataclassClassValidationError: naming the fields that are inconsistent.
    """

    model_type = "vila_u_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 256
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    codebook_size: int = 16384
    num_codebooks: int = 4
    codebook_decay: float = 0.99
    commitment_loss_weight: float = 0.25
    restart_unused_codes: bool = True
    quantizer_dtype: Literal["float32"] | None = None
    latent_channels: int = 256
    decoder_base_channels: int = 128
    decoder_channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_num_res_blocks: int = 2
    decoder_norm_groups: int = 32
    decoder_latent_size: int | None = None
    use_semantic_head: bool = False
    text_vocab_size: int = 32000
    text_hidden_size: int = 1024
    text_intermediate_size: int = 4096
    text_num_hidden_layers: int = 24
    text_num_attention_heads: int = 16
    text_max_position_embeddings: int = 64
    use_text_tower: bool = False
    initializer_range: float = 0.02

    @property
    def grid_size(self) -> int:
        """Side of the square grid of codes."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """T: tokens per image, each of which is one position in the language model."""
        return self.grid_size**2

    def validate_architecture(self) -> None:
        """Run by `@strict`: catches what would otherwise fail deep inside the model, or silently."""
        _require_whole_heads(self)
        _require_at_least(self, 2, "num_hidden_layers")  # the last one is not run
        _require_at_least(self, 1, "num_codebooks", "codebook_size", "grid_size")
        _require_at_least(self, 1, "decoder_num_res_blocks", "decoder_norm_groups")
        self._validate_decoder()

    def _validate_decoder(self) -> None:
        multipliers = self.decoder_channel_multipliers
        channels = [self.decoder_base_channels * multiplier for multiplier in multipliers]
        if not channels or any(width < 1 or width % self.decoder_norm_groups for width in channels):
            raise ValueError(
                f"`decoder_base_channels` times each of `decoder_channel_multipliers` must be a positive multiple of "
                f"`decoder_norm_groups` = {self.decoder_norm_groups}, got {channels}"
            )
        factor = 2 ** (len(multipliers) - 1)
        if self.decoder_latent_size is None:
            if factor != self.patch_size or self.image_size % self.patch_size:
                raise ValueError(
                    f"the decoder of {len(multipliers)} `decoder_channel_multipliers` enlarges {factor} times, so "
                    f"`patch_size` must be {factor} and divide `image_size`, got {self.patch_size} and "
                    f"{self.image_size}; give other multipliers or a `decoder_latent_size`"
                )
        elif self.decoder_latent_size * factor != self.image_size:
            raise ValueError(
                f"`decoder_latent_size` times {factor} (from `decoder_channel_multipliers`) must be `image_size` = "
                f"{self.image_size}, got a `decoder_latent_size` of {self.decoder_latent_size}"
            )


@strict
class VilaUDepthConfig(PreTrainedConfig):
    """The depth transformer, which generates the D codes of one image token one after the other.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act, layer_norm_eps: of its
            blocks.
        num_codebooks: depth D, rows of its position table.
        codebook_size: codes to choose from.
        codebook_dim: width of a codebook entry.
        backbone_hidden_size: width of the language model.
        dropout: after attention and feed-forward; in training only.
        initializer_range: standard deviation of newly initialized weights.

    Raises:
        StrictDataclassClassValidationError: naming the fields that are inconsistent.
    """

    model_type = "vila_u_depth"
    base_config_key = "depth_config"

    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 6
    num_attention_heads: int = 40
    num_codebooks: int = 4
    codebook_size: int = 16384
    codebook_dim: int = 1024
    backbone_hidden_size: int = 4096
    hidden_act: str = "gelu"
    dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Run by `@strict`."""
        _require_whole_heads(self)
        _require_at_least(self, 1, "num_codebooks", "codebook_size", "num_hidden_layers")


@strict
class VilaUConfig(NeverCopied, PreTrainedConfig):
    """VILA-U: vision tower, projector, language model, and the depth transformer as its head for images.

    Args:
        text_config: of the language model, any decoder that transformers knows; Llama by default.
        vision_config, depth_config: of the other two parts.
        image_token_id: placeholder in `input_ids` for one image token. It may lie outside the vocabulary: the official
            tables have no row for it.
        image_start_token_id, image_end_token_id: around a generated image.
        video_start_token_id, video_end_token_id: around a generated video.
        num_video_frames: frames of a video.
        projector_hidden_act: between the two layers of the projector.
        visual_loss_weight: weight of the loss on codes relative to the loss on text.
        tie_word_embeddings: whether the text head shares the weights of the input embeddings.

    Raises:
        StrictDataclassClassValidationError: naming the fields that are inconsistent.
    """

    model_type = "vila_u"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="llama",
            init_kwargs={"vocab_size": 32004, "max_position_embeddings": 4096, "pad_token_id": 0},
        ),
        "vision_config": SubConfigSpec(config_class=VilaUVisionConfig),
        "depth_config": SubConfigSpec(config_class=VilaUDepthConfig),
    }

    # Each is a config, a dictionary of its fields, or None for the default; after initialization, a config.
    text_config: Any = None
    vision_config: Any = None
    depth_config: Any = None
    image_token_id: int = 32004
    image_start_token_id: int = 32000
    image_end_token_id: int = 32001
    video_start_token_id: int = 32002
    video_end_token_id: int = 32003
    num_video_frames: int = 8
    projector_hidden_act: str = "gelu"
    visual_loss_weight: float | int = 1.0
    tie_word_embeddings: bool = False

    def validate_architecture(self) -> None:
        """Run by `@strict`: the parts must fit each other."""
        _require_at_least(self, 1, "num_video_frames")
        for name, source, value in (
            ("num_codebooks", "vision_config.num_codebooks", self.vision_config.num_codebooks),
            ("codebook_size", "vision_config.codebook_size", self.vision_config.codebook_size),
            ("codebook_dim", "vision_config.hidden_size", self.vision_config.hidden_size),
            ("backbone_hidden_size", "text_config.hidden_size", self.text_config.hidden_size),
        ):
            if getattr(self.depth_config, name) != value:
                raise ValueError(
                    f"`depth_config.{name}` must equal `{source}` = {value}, got {getattr(self.depth_config, name)}"
                )


class VilaUOfficialConfig(PreTrainedConfig):
    """The config of the official checkpoint: an error that says what to do with it.

    Raises:
        ValueError: always.
    """

    model_type = "vila_u_llama"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "VilaUOfficialConfig":
        """Raises a ValueError that explains how to convert the checkpoint."""
        raise ValueError(
            "this is a checkpoint in the official layout of VILA-U, with three folders of weights. Convert it once "
            "with `diffusers_sana.convert_vila_u(folder, target)` and load `target`."
        )


__all__ = ["VilaUConfig", "VilaUDepthConfig", "VilaUOfficialConfig", "VilaUVisionConfig"]
