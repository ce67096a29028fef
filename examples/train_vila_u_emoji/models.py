"""The sizes of the bundled VILA-U."""

from transformers import LlamaTokenizer

from diffusers_sana import VilaUConfig, VilaUForConditionalGeneration, VilaUVisionModel
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUDepthConfig, VilaUVisionConfig
from diffusers_sana.models.vila_u.prompts_vila_u import IMAGE, IMAGE_END, IMAGE_START, VIDEO_END, VIDEO_START


RESOLUTION = 64
WIDTH = 192  # of the tower and of a codebook entry


def make_tower(tokenizer: LlamaTokenizer) -> VilaUVisionModel:
    """64 pixels in 8 x 8 cells of 4 codes out of 1024; with the parts that only the contrastive loss needs."""
    config = VilaUVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=7,
        num_attention_heads=6,
        image_size=RESOLUTION,
        patch_size=8,
        codebook_size=1024,
        num_codebooks=4,
        latent_channels=64,
        decoder_base_channels=32,
        decoder_channel_multipliers=(1, 1, 2, 2),
        decoder_num_res_blocks=1,
        decoder_norm_groups=8,
        use_semantic_head=True,
        use_text_tower=True,
        text_vocab_size=len(tokenizer),
        text_hidden_size=WIDTH,
        text_intermediate_size=2 * WIDTH,
        text_num_hidden_layers=2,
        text_num_attention_heads=6,
        text_max_position_embeddings=24,
    )
    return VilaUVisionModel(config)


def make_model(tower: VilaUVisionModel, tokenizer: LlamaTokenizer) -> VilaUForConditionalGeneration:
    """A LLaMA of 6 layers and width 256, a depth transformer of 2 layers and width 192, and a trained tower.

    The tower is rounded to bf16, in which it will be published: the codes that are learned are then those of the file.
    """
    vision = tower.config.to_dict() | {"use_semantic_head": False, "use_text_tower": False}
    vision["quantizer_dtype"] = "float32"
    vision.pop("_name_or_path", None)  # where the tower lay
    media = (IMAGE, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END)
    names = ("image", "image_start", "image_end", "video_start", "video_end")
    config = VilaUConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": tokenizer.convert_tokens_to_ids(IMAGE),  # the placeholder needs no row
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=VilaUVisionConfig(**vision),
        depth_config=VilaUDepthConfig(
            hidden_size=192,
            intermediate_size=576,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_codebooks=tower.config.num_codebooks,
            codebook_size=tower.config.codebook_size,
            codebook_dim=WIDTH,
            backbone_hidden_size=256,
            dropout=0.0,
        ),
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in zip(names, media, strict=True)
        },
        num_video_frames=2,
        tie_word_embeddings=True,
    )
    model = VilaUForConditionalGeneration(config)
    own = model.model.vision_tower.state_dict()
    model.model.vision_tower.load_state_dict(
        {name: value.bfloat16().float() for name, value in tower.state_dict().items() if name in own}
    )
    return model
