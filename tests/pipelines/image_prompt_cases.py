"""Tiny image encoders and IP-Adapters for the tests of image prompts."""

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from diffusers_sana import SanaIPAdapterModel, VilaUImageProcessor, VilaUVisionModel
from tests.models.vila_u.tiny import tiny_vision_config


SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE_SIZE = 16


def clip_encoder():
    """Pooled features of width 12, nine patches (and a class token) of width 8; and its image processor."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SIZES, projection_dim=12, image_size=IMAGE_SIZE, patch_size=8, initializer_range=0.5)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return CLIPVisionModelWithProjection(config).eval(), processor


def siglip_encoder():
    """Pooled features and patches of width 8; and its image processor."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(**SIZES, image_size=IMAGE_SIZE, patch_size=8)
    processor = SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return SiglipVisionModel(config).eval(), processor


def vila_u_encoder(**changes):
    """The tower of a tiny VILA-U, and its image processor."""
    torch.manual_seed(0)
    config = tiny_vision_config(**changes)
    size = {"height": config.image_size, "width": config.image_size}
    return VilaUVisionModel(config).eval(), VilaUImageProcessor(size=size)


def trained_adapter(transformer, image_dim=12, seed=1, **options):
    """An adapter with random values in place of the zeros of a new one."""
    torch.manual_seed(seed)
    model = SanaIPAdapterModel.from_transformer(transformer, image_dim, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return model


def colored(color):
    """A PIL image of one color with a dark corner."""
    image = Image.new("RGB", (24, 20), color)
    image.paste("black", (0, 0, 8, 8))
    return image
