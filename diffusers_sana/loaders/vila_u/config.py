"""The config of VILA-U from the JSON files and tensor shapes of the official checkpoint; unknown values are errors."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from diffusers_sana.loaders.single_file import required_shape
from diffusers_sana.loaders.vila_u.names import LLM, PROJECTOR, SIGLIP, TOWER
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig, VilaUDepthConfig, VilaUVisionConfig


VOCABULARY = 32004
VISION, TEXT = f"{SIGLIP}.vision_model", f"{SIGLIP}.text_model"
# Shapes do not determine the number of attention heads, and the checkpoint only names the SigLIP it started from.
ENCODER_HEADS = {"google/siglip-large-patch16-256": 16, "google/siglip-so400m-patch14-384": 16}
NOT_MODEL = ("_name_or_path", "architectures", "torch_dtype", "transformers_version", "model_type")

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


class JsonReader:
    """A JSON object whose errors name the field and the file."""

    def __init__(self, content: Mapping[str, Any], origin: str):
        self.content, self.origin = content, origin

    def get(self, path: str, kind: type | tuple[type, ...] = object) -> Any:
        """The field at a dotted path.

        Raises:
            ValueError: it is missing or has another type.
        """
        value: Any = self.content
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None or not isinstance(value, kind):
            raise ValueError(
                f"{self.origin} must have {path!r} with a value as in the official checkpoint, got {value!r}."
            )
        return value

    def expect(self, path: str, wanted: Any) -> None:
        """Checks a field, if it exists.

        Raises:
            ValueError: it has another value.
        """
        value: Any = self.content
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None and value != wanted:
            raise ValueError(
                f"{self.origin}: {path!r} must be {wanted!r}, got {value!r}. The checkpoint is for a different "
                "architecture."
            )


def model_config(
    jsons: Mapping[str, Mapping[str, Any]],
    shapes: Shapes,
    token_ids: Mapping[str, int],
    encoder_heads: int | None = None,
    any_vocabulary: bool = False,
) -> VilaUConfig:
    """The config of the model, with semantic head and text tower.

    Args:
        jsons: contents of the files `config.json`, `llm/config.json`, ... by their path.
        shapes: of the tensors, by part and key.
        token_ids: ids of `<im_start>`, `<im_end>`, `<vi_start>`, `<vi_end>`, `<image>`.
        encoder_heads: attention heads of the image encoder, for an unknown SigLIP. Heads of the text tower have the
            same width.
        any_vocabulary: accept a vocabulary other than 32004.

    Raises:
        ValueError: a file, field or tensor is missing or contradicts another.
    """
    root, llm, projector, tower = (
        JsonReader(jsons[name], name)
        for name in ("config.json", f"{LLM}/config.json", f"{PROJECTOR}/config.json", f"{TOWER}/config.json")
    )
    projector.expect("mm_projector_type", "mlp2x_gelu")
    try:
        return _combined(root, llm, tower, shapes, token_ids, encoder_heads, any_vocabulary)
    except StrictDataclassError as error:
        raise ValueError(f"the configs of the checkpoint contradict one another: {error}") from error


def _combined(
    root: JsonReader,
    llm: JsonReader,
    tower: JsonReader,
    shapes: Shapes,
    token_ids: Mapping[str, int],
    encoder_heads: int | None,
    any_vocabulary: bool,
) -> VilaUConfig:
    text = _text_config(llm, shapes[LLM], any_vocabulary)
    vision = _vision_config(tower, shapes[TOWER], encoder_heads)
    depth = _depth_config(tower, shapes[TOWER])
    for token, index in token_ids.items():
        if (index >= text.vocab_size) != (token == "<image>"):
            place = "after" if token == "<image>" else "within"
            raise ValueError(
                f"the tokenizer must have {token} {place} the vocabulary of the model ({text.vocab_size} tokens), got "
                f"id {index}."
            )
    return VilaUConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        depth_config=depth.to_dict(),
        image_token_id=token_ids["<image>"],
        image_start_token_id=token_ids["<im_start>"],
        image_end_token_id=token_ids["<im_end>"],
        video_start_token_id=token_ids["<vi_start>"],
        video_end_token_id=token_ids["<vi_end>"],
        num_video_frames=root.get("num_video_frames", int),
        tie_word_embeddings=False,
    )


def _text_config(llm: JsonReader, shapes: Mapping[str, tuple[int, ...]], any_vocabulary: bool) -> PreTrainedConfig:
    kind = llm.get("model_type", str)
    rows, width = required_shape(shapes, "model.embed_tokens.weight", rank=2, origin=f"the folder {LLM!r}")
    llm.expect("vocab_size", rows)
    llm.expect("hidden_size", width)
    if rows != VOCABULARY and not any_vocabulary:
        raise ValueError(
            f"the vocabulary must be {VOCABULARY}, as in the official checkpoint, got {rows}. If tokens were added on "
            "purpose, pass `any_vocabulary=True`."
        )
    fields = {key: value for key, value in llm.content.items() if key not in NOT_MODEL}
    scaling = fields.pop("rope_scaling", None)
    if "rope_parameters" not in fields:
        rope = dict(scaling or {})
        rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
        fields["rope_parameters"] = rope | {"rope_theta": fields.pop("rope_theta", 10000.0)}
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{llm.origin}: 'model_type' must be one that transformers knows, got {kind!r}.")
    return CONFIG_MAPPING[kind](**fields)


def _vision_config(
    tower: JsonReader, shapes: Mapping[str, tuple[int, ...]], encoder_heads: int | None
) -> VilaUVisionConfig:
    prefix = "rqvaesiglip"
    tower.expect(f"{prefix}.shared_codebook", True)
    tower.expect(f"{prefix}.ddconfig.double_z", False)
    width, channels, patch, _ = _tower_shape(shapes, f"{VISION}.embeddings.patch_embedding.weight", 4)
    for path, wanted in (("hidden_size", width), (f"{prefix}.embed_dim", width)):
        tower.expect(path, wanted)
    heads = encoder_heads or ENCODER_HEADS.get(tower.get(f"{prefix}.pretrained_model", str))
    if heads is None:
        raise ValueError(
            f"`encoder_heads` must be given: {tower.origin} names {tower.content[prefix]['pretrained_model']!r}, and "
            f"only those of {sorted(ENCODER_HEADS)} are known."
        )
    latent = tower.content[prefix].get("decoder_latent_shape")
    text_width = _tower_shape(shapes, f"{TEXT}.embeddings.token_embedding.weight", 2)
    return VilaUVisionConfig(
        hidden_size=width,
        intermediate_size=_tower_shape(shapes, f"{VISION}.encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=_count(shapes, f"{VISION}.encoder.layers."),
        num_attention_heads=heads,
        num_channels=channels,
        image_size=tower.get(f"{prefix}.ddconfig.resolution", int),
        patch_size=patch,
        codebook_size=tower.get(f"{prefix}.n_embed", int),
        num_codebooks=tower.get(f"{prefix}.code_shape", list)[-1],
        codebook_decay=tower.get(f"{prefix}.decay", float),
        commitment_loss_weight=tower.get(f"{prefix}.latent_loss_weight", float),
        restart_unused_codes=tower.get(f"{prefix}.restart_unused_codes", bool),
        latent_channels=tower.get(f"{prefix}.ddconfig.z_channels", int),
        decoder_base_channels=tower.get(f"{prefix}.ddconfig.ch", int),
        decoder_channel_multipliers=tuple(tower.get(f"{prefix}.ddconfig.ch_mult", list)),
        decoder_num_res_blocks=tower.get(f"{prefix}.ddconfig.num_res_blocks", int),
        decoder_latent_size=latent[0] if latent else None,
        use_semantic_head=True,
        use_text_tower=True,
        text_vocab_size=text_width[0],
        text_hidden_size=text_width[1],
        text_intermediate_size=_tower_shape(shapes, f"{TEXT}.encoder.layers.0.mlp.fc1.weight", 2)[0],
        text_num_hidden_layers=_count(shapes, f"{TEXT}.encoder.layers."),
        text_num_attention_heads=max(1, text_width[1] * heads // width),
        text_max_position_embeddings=_tower_shape(shapes, f"{TEXT}.embeddings.position_embedding.weight", 2)[0],
    )


def _depth_config(tower: JsonReader, shapes: Mapping[str, tuple[int, ...]]) -> VilaUDepthConfig:
    prefix = "rqtransformer"
    return VilaUDepthConfig(
        hidden_size=tower.get(f"{prefix}.embed_dim", int),
        intermediate_size=_tower_shape(shapes, f"{prefix}.head_transformer.blocks.0.mlp.0.weight", 2)[0],
        num_hidden_layers=tower.get(f"{prefix}.head.n_layer", int),
        num_attention_heads=tower.get(f"{prefix}.head.block.n_head", int),
        num_codebooks=tower.get(f"{prefix}.block_size", list)[-1],
        codebook_size=tower.get(f"{prefix}.vocab_size", int),
        codebook_dim=tower.get(f"{prefix}.input_embed_dim_1", int),
        backbone_hidden_size=tower.get(f"{prefix}.input_embed_dim_2", int),
    )


def _tower_shape(shapes: Mapping[str, tuple[int, ...]], key: str, rank: int) -> tuple[int, ...]:
    return required_shape(shapes, key, rank=rank, origin=f"the folder {TOWER!r}")


def _count(shapes: Mapping[str, Any], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})
