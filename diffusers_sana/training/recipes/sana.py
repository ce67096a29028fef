"""From one resolution to the next: a trained transformer made ready for another size (arXiv 2410.10629)."""

import torch

from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel


def with_native_size(
    transformer: SanaTransformer2DModel, sample_size: int | None = None, interpolation_scale: int | None = None
) -> SanaTransformer2DModel:
    """The same weights, not copied, in a model for another size.

    Nothing but the positional table depends on the size, and that is computed. A model that had none gets one by
    `interpolation_scale`, and then must learn to read it.

    Args:
        transformer: what was trained at another size.
        sample_size: latent side to be built for, which also is the pipeline's default size; None leaves it.
        interpolation_scale: positions are divided by it. Sana has no table up to 1024 pixels, 1 at 2048, 2 at 4096.
            None leaves it.

    Raises:
        ValueError: a number that is not positive.
    """
    options = {"sample_size": sample_size, "interpolation_scale": interpolation_scale}
    changes = {name: value for name, value in options.items() if value is not None}
    for name, value in changes.items():
        if value <= 0:
            raise ValueError(f"`{name}` must be above 0, got {value}. Leave it out to keep what the model has.")
    if not changes:
        return transformer
    with torch.device("meta"):
        resized = SanaTransformer2DModel.from_config(transformer.config, **changes)
    resized.load_state_dict(transformer.state_dict(), assign=True)
    return resized.train(transformer.training)
