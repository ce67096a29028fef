"""Larger transformers made of trained ones: of more blocks, as SANA-1.5 (arXiv 2501.18427), and of videos."""

from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from diffusers_sana.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from diffusers_sana.training.data.batches import unchanged_random_state


DROPPED = 2  # blocks; the paper's last ones had specialized in ending


@torch.no_grad()
def grow_transformer(transformer: Any, num_layers: int, kept_layers: int | None = None, seed: int = 0) -> Any:
    """A transformer of more blocks: the first ones of `transformer`, and new ones that begin as the identity.

    A new block adds nothing to its input at first, because the last layers of its two attentions and of its Mix-FFN
    are zeros; all else in it is random. So the larger model begins as what the kept blocks compute, exactly. This is
    the paper's initialization (partial preservation); copies of trained blocks diverged there.

    Args:
        transformer: a SanaTransformer2DModel; it does not change.
        num_layers: blocks of the new one.
        kept_layers: blocks that are taken over; default: all but the last two, as in the paper. With all of them the
            new model computes what the old one does.
        seed: of the new weights. The global random numbers do not change.

    Returns:
        A new one of the same class, dtype and device.

    Raises:
        ValueError: there are not so many blocks to keep, or none would be new.
    """
    before = transformer.config.num_layers
    kept = before - DROPPED if kept_layers is None else kept_layers
    if not 1 <= kept <= before:
        raise ValueError(
            f"`kept_layers` must be 1 to {before}, the blocks that there are, got {kept}. Name how many to keep."
        )
    if num_layers <= kept:
        raise ValueError(f"`num_layers` must be above the {kept} blocks that are kept, got {num_layers}. Use more.")
    with unchanged_random_state(seed):
        grown = type(transformer).from_config(transformer.config, num_layers=num_layers)
    old = {f"transformer_blocks.{index}." for index in range(kept, before)}
    state = {name: value for name, value in transformer.state_dict().items() if not name.startswith(tuple(old))}
    grown.load_state_dict(grown.state_dict() | state)
    for block in grown.transformer_blocks[kept:]:
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.conv_point):
            for parameter in layer.parameters():
                parameter.zero_()
    nn.Module.to(grown, transformer.device, transformer.dtype)  # diffusers' own `to` warns of the dtype
    return grown.train(transformer.training)


# Fields of the configuration that models of images and of videos share.
SHARED = (
    *("num_layers", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "dropout"),
    *("cross_attention_head_dim", "cross_attention_dim", "caption_channels", "in_channels", "out_channels"),
    *("mlp_ratio", "attention_bias", "sample_size", "norm_elementwise_affine", "norm_eps", "qk_norm"),
)


@torch.no_grad()
def video_transformer(transformer: Any) -> SanaVideoTransformer3DModel:
    """A model of videos that begins with the weights of one of images, as SANA-Video did (arXiv 2509.24695).

    The temporal convolutions begin as zeros. Only the rotary positions are new to the weights, so the model must be
    trained.

    Args:
        transformer: a SanaTransformer2DModel without guidance embedding and positional table; it does not change.

    Returns:
        A new one, of the same dtype and device.

    Raises:
        ValueError: it has one of these, which videos have not.
    """
    config = transformer.config
    if config.guidance_embeds or config.interpolation_scale is not None:
        raise ValueError(
            "`transformer` must have no guidance embedding and no positional table, got `guidance_embeds`"
            f" {config.guidance_embeds} and `interpolation_scale` {config.interpolation_scale}. Use that of a Sana up"
            " to 1024 pixels."
        )
    side = config.patch_size
    shared = {name: config[name] for name in SHARED}
    with unchanged_random_state(0):
        video = SanaVideoTransformer3DModel(**shared, patch_size=(1, side, side))
    state = dict(transformer.state_dict())
    for part in ("weight", "bias"):
        state[f"patch_embedding.{part}"] = state.pop(f"patch_embed.proj.{part}")
    state["patch_embedding.weight"] = state["patch_embedding.weight"].unsqueeze(2)
    if config.timestep_scale != 1.0:
        name = "time_embed.emb.timestep_embedder.linear_1.weight"
        state[name] = _for_whole_timesteps(state[name], config.timestep_scale)
    state |= {name: value for name, value in video.state_dict().items() if name.endswith("conv_temp.weight")}
    video.load_state_dict(state)
    nn.Module.to(video, transformer.device, transformer.dtype)
    return video.train(transformer.training)


def _for_whole_timesteps(weight: Tensor, scale: float) -> Tensor:
    """The first layer `[D, channels]` of the timestep's MLP for timesteps t, of one that was trained on `scale` t.

    Where `scale` t lies in [0, 1], the layer's output is a smooth function of t, which the sinusoids of t fit.
    """
    times = torch.arange(1001, dtype=torch.float64)
    channels = weight.shape[1]
    embed: dict[str, Any] = {"embedding_dim": channels, "flip_sin_to_cos": True, "downscale_freq_shift": 0}
    told, known = (get_timestep_embedding(each, **embed).double() for each in (times, scale * times))
    fitted = torch.linalg.lstsq(told, known @ weight.double().cpu().T, rcond=1e-6, driver="gelsd").solution
    return fitted.T.to(weight)
