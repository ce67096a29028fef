"""Image prompts for Sana: IP-Adapter (arXiv 2308.06721), decoupled cross-attention to the features of images.

A projection turns the features of an image encoder into a few tokens, and for each block of the transformer two
matrices turn these into keys and values. The queries are the transformer's own, and so is the output projection; all
of its weights stay as they are. The negative prompts of classifier-free guidance have no image prompt, so that half is
the transformer's alone.

Decoupled rather than tokens appended to the text: the strength is then a factor of one term, exact at 0, and may
differ between adapters and blocks; the text keeps its own softmax, masks and caches; and the transformer, its LoRAs
and its 4-bit weights are not touched.

Legend: B prompts, n images per prompt, P patches of an image, C width of the features, T tokens of all images of a
prompt, D inner width of the cross-attention.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_sana.checks import check_integer, check_number
from diffusers_sana.files import atomic_write
from diffusers_sana.models.layers import Linear
from diffusers_sana.models.loading import StrictModelMixin
from diffusers_sana.models.transformers.attention_sana import SanaImageState, SanaRMSNorm
from diffusers_sana.models.transformers.text_sana import ImageStates


FEATURES = ("pooled", "patches")
IP_ADAPTER_FILE = "ip_adapter.safetensors"
HEAD_DIM = 64  # of the attention in the projection of patches


class SanaImageKeyValue(nn.Module):
    """Keys and values of one block for image tokens.

    Args:
        token_dim: width of the tokens.
        num_heads, head_dim: of the cross-attention.
        has_norm: whether keys are normalized, as in SANA-1.5.
    """

    def __init__(self, token_dim: int, num_heads: int, head_dim: int, has_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_k_ip = Linear(token_dim, num_heads * head_dim, bias=False)
        self.to_v_ip = Linear(token_dim, num_heads * head_dim, bias=False)
        self.norm_k_ip = SanaRMSNorm(num_heads * head_dim) if has_norm else None

    def forward(self, tokens: Tensor, scale: float) -> SanaImageState:
        """Tokens `[B, T, token_dim]` to keys and values `[B, T, heads, head_dim]`, the values times `scale`."""
        key, value = self.to_k_ip(tokens), self.to_v_ip(tokens) * scale
        if self.norm_k_ip is not None:
            key = self.norm_k_ip(key)
        heads = (self.num_heads, -1)
        return SanaImageState(key.unflatten(-1, heads), value.unflatten(-1, heads))


class SanaIPAdapter(nn.Module):
    """One IP-Adapter. The names of its tensors are those in a file of it.

    Args:
        image_dim: C.
        features: "pooled": one vector per image becomes `num_tokens` tokens, as in IP-Adapter; "patches": as many
            learned queries attend to the patches of an image, as in IP-Adapter Plus.
        num_tokens: per image.
        token_dim: width of the tokens.
        num_layers, num_heads, head_dim: blocks of the transformer, and the heads of its cross-attention.
        has_norm: whether keys are normalized.
        hidden_dim, depth: of the projection of patches: its width, at most 64 or a multiple of it, and its blocks.
    """

    def __init__(
        self,
        image_dim: int,
        features: str,
        num_tokens: int,
        token_dim: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        has_norm: bool = False,
        hidden_dim: int | None = None,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        if features not in FEATURES:
            raise ValueError(f"`features` must be one of {FEATURES}, got {features!r}.")
        sizes = {"image_dim": image_dim, "num_tokens": num_tokens, "token_dim": token_dim, "num_layers": num_layers}
        if features == "patches":
            sizes |= {"hidden_dim": hidden_dim, "depth": depth}  # type: ignore[dict-item]
        for name, size in sizes.items():
            check_integer(name, size)
        self.image_dim, self.features, self.head_dim = image_dim, features, head_dim
        if features == "pooled":
            self.image_proj: nn.Module = ImageProjection(image_dim, token_dim, num_tokens)
        else:
            width = int(hidden_dim or 0)
            if width > HEAD_DIM and width % HEAD_DIM:
                raise ValueError(f"`hidden_dim` must be at most {HEAD_DIM} or a multiple of it, got {width}.")
            heads = max(1, width // HEAD_DIM)
            self.image_proj = IPAdapterPlusImageProjection(
                image_dim, token_dim, width, int(depth or 0), width // heads, heads, num_tokens
            )
        layers = (SanaImageKeyValue(token_dim, num_heads, head_dim, has_norm) for _ in range(num_layers))
        self.ip_adapter = nn.ModuleList(layers)

    def forward(self, image_embeds: Tensor, scales: Sequence[float]) -> tuple[SanaImageState, ...]:
        """Features `[B, n, C]` or `[B, n, P, C]` of images, and a scale for each block, to a state for each block."""
        tokens = self.image_proj(image_embeds.flatten(0, 1)).unflatten(0, image_embeds.shape[:2]).flatten(1, 2)
        return tuple(layer(tokens, scale) for layer, scale in zip(self.ip_adapter, scales, strict=True))


class SanaIPAdapterModel(StrictModelMixin, ConfigMixin):
    """One or several IP-Adapters of a Sana transformer: a component of the pipelines that take image prompts.

    `pipe.load_ip_adapter` makes one of files, and `from_transformer` a new one to be trained. Each adapter has a
    strength for each block, 1 at first, which is not saved.

    Args:
        adapters: the arguments of a `SanaIPAdapter` each.
    """

    @register_to_config
    def __init__(self, adapters: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("`adapters` must describe at least one adapter, got none.")
        self.ip_adapters = nn.ModuleList(SanaIPAdapter(**adapter) for adapter in adapters)
        self.scales = [[1.0] * len(adapter.ip_adapter) for adapter in self._each]

    @property
    def _each(self) -> list[SanaIPAdapter]:
        return list(self.ip_adapters)  # type: ignore[arg-type]

    @classmethod
    def from_transformer(
        cls,
        transformer: Any,
        image_dim: int,
        features: str = "pooled",
        num_tokens: int | None = None,
        token_dim: int | None = None,
        hidden_dim: int | None = None,
        depth: int = 4,
    ) -> Self:
        """A new adapter to be trained for `transformer`, without any effect at first: its values are 0.

        Keys, where the tokens have the width of the projected text, begin as the transformer's.

        Args:
            transformer: a SanaTransformer2DModel, dense or quantized.
            image_dim: width of the image encoder's features, C.
            features, depth: see `SanaIPAdapter`.
            num_tokens: per image; 4 for pooled features and 16 for patches by default.
            token_dim: width of the tokens, by default that of the projected text, D. The size of an adapter is about
                2 * blocks * `token_dim` * D.
            hidden_dim: of the projection of patches; by default `token_dim`, rounded down to a multiple of 64.
        """
        config = transformer.config
        token_dim = token_dim or config["cross_attention_dim"]
        if features == "patches":
            width = hidden_dim or (token_dim if token_dim < HEAD_DIM else token_dim // HEAD_DIM * HEAD_DIM)
            projection = {"hidden_dim": width, "depth": depth}
        else:
            projection = {}
        settings = {
            "image_dim": image_dim,
            "features": features,
            "num_tokens": num_tokens or (4 if features == "pooled" else 16),
            "token_dim": token_dim,
            "num_layers": config["num_layers"],
            "num_heads": config["num_cross_attention_heads"],
            "head_dim": config["cross_attention_head_dim"],
            "has_norm": bool(config.get("qk_norm")),
        }
        model = cls([settings | projection])
        with torch.no_grad():
            for layer, block in zip(model._each[0].ip_adapter, transformer.transformer_blocks, strict=True):
                attention: Any = block.attn2
                own: Any = layer
                if own.to_k_ip.in_features == attention.to_k.in_features:
                    own.to_k_ip.weight.copy_(attention.to_k.weight)
                if own.norm_k_ip is not None:
                    own.norm_k_ip.weight.copy_(attention.norm_k.weight)
                own.to_v_ip.weight.zero_()
        return model

    @classmethod
    def from_tensors(cls, files: Sequence[Mapping[str, Tensor]], num_heads: int) -> Self:
        """The adapters whose tensors are in some files, with one adapter each.

        Args:
            files: tensors by the names that `save_adapter` gives them.
            num_heads: of the transformer's cross-attention, which the tensors do not tell.

        Raises:
            ValueError: the tensors are not those of an IP-Adapter of Sana.
        """
        with torch.device("meta"):
            model = cls([_settings(tensors, num_heads) for tensors in files])
        for adapter, tensors in zip(model._each, files, strict=True):
            own = adapter.state_dict()
            wrong = sorted(own.keys() ^ tensors.keys())
            wrong = wrong or [name for name, tensor in own.items() if tensor.shape != tensors[name].shape]
            if wrong:
                raise ValueError(
                    f"{len(wrong)} tensors of the IP-Adapter are missing, unknown or of another shape than the others"
                    f" imply, {wrong[0]!r} first. Is the file one that `save_adapter` wrote?"
                )
            adapter.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
        return model.requires_grad_(False).eval()

    def save_adapter(self, folder: str | Path, index: int = 0) -> Path:
        """Writes one adapter into `folder`, as the file that `pipe.load_ip_adapter(folder)` reads, and returns it."""
        path = Path(folder) / IP_ADAPTER_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._each[index].state_dict().items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)
        return path

    def set_scale(self, scale: float | Sequence[float | Sequence[float]]) -> None:
        """Sets how strong the image prompts are, in the calls to come.

        Args:
            scale: one number for all; or for each adapter a number, or a list of one number per block. Such a list
                may also be given by itself, if there is one adapter.

        Raises:
            TypeError, ValueError: neither of these.
        """
        each: Any = scale if isinstance(scale, list | tuple) else [scale] * len(self.ip_adapters)
        if len(self.ip_adapters) == 1 and len(each) > 1:
            each = [each]
        if len(each) != len(self.ip_adapters):
            raise ValueError(
                f"`scale` must be one number, or one entry for each of {len(self.ip_adapters)} IP-Adapters, got"
                f" {len(each)}."
            )
        scales = []
        for adapter, of_adapter in zip(self._each, each, strict=True):
            count = len(adapter.ip_adapter)
            numbers = list(of_adapter) if isinstance(of_adapter, list | tuple) else [of_adapter] * count
            if len(numbers) != count:
                raise ValueError(f"`scale` must have one number for each of {count} blocks, got {len(numbers)}.")
            for number in numbers:
                check_number("scale", number)
            scales.append([float(number) for number in numbers])
        self.scales = scales

    def forward(self, image_embeds: Sequence[Tensor]) -> ImageStates:
        """What the blocks attend to, for `encode_text(..., image_states=)` of the transformer.

        Args:
            image_embeds: for each adapter the features of images, `[B, n, C]` if pooled, else `[B, n, P, C]`.

        Returns:
            For each block a state of each adapter that has any strength, with B rows; empty if none has.

        Raises:
            TypeError, ValueError: naming what does not fit.
        """
        self.check_embeds(image_embeds)
        states = [
            adapter(embeds.to(self.dtype), scales)
            for adapter, embeds, scales in zip(self._each, image_embeds, self.scales, strict=True)
            if any(scales)
        ]
        return tuple(zip(*states, strict=True))

    def check_embeds(self, image_embeds: Sequence[Tensor], name: str = "image_embeds") -> None:
        """Raises where the argument `name` is not features as `forward` takes them."""
        if not isinstance(image_embeds, list | tuple) or len(image_embeds) != len(self.ip_adapters):
            found = f"{len(image_embeds)}" if isinstance(image_embeds, list | tuple) else type(image_embeds).__name__
            raise ValueError(
                f"`{name}` must be a list of {len(self.ip_adapters)}, one tensor for each IP-Adapter, got {found}."
            )
        for adapter, embeds in zip(self._each, image_embeds, strict=True):
            if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
                raise TypeError(f"`{name}` must hold floating point tensors, got {type(embeds).__name__}.")
            axes = "[prompts, images, {}]" if adapter.features == "pooled" else "[prompts, images, patches, {}]"
            has_axes = embeds.ndim == (3 if adapter.features == "pooled" else 4)
            if not has_axes or embeds.shape[-1] != adapter.image_dim or not embeds.numel():
                raise ValueError(
                    f"`{name}` must be {axes.format(adapter.image_dim)} for this IP-Adapter, which was trained on"
                    f" {adapter.features} features of that width, got {list(embeds.shape)}. Use the image encoder"
                    " that it was trained with."
                )

    def check_transformer(self, transformer: Any) -> None:
        """Raises ValueError where the adapters are not of a transformer of these sizes."""
        config = transformer.config
        wanted = tuple(
            config[name] for name in ("num_layers", "num_cross_attention_heads", "cross_attention_head_dim")
        )
        has_norm = bool(config.get("qk_norm"))
        for adapter in self._each:
            layer: Any = adapter.ip_adapter[0]
            found = len(adapter.ip_adapter), layer.num_heads, adapter.head_dim
            if found != wanted or (layer.norm_k_ip is not None) != has_norm:
                norms = {True: "normalized", False: "plain"}
                raise ValueError(
                    f"The IP-Adapter is for another transformer: it has {found[0]} blocks with {found[1]} heads of"
                    f" width {found[2]} and {norms[layer.norm_k_ip is not None]} keys, the transformer {wanted[0]}"
                    f" with {wanted[1]} heads of width {wanted[2]} and {norms[has_norm]} keys. Load the one that was"
                    " trained for it."
                )


def _settings(tensors: Mapping[str, Tensor], num_heads: int) -> dict[str, Any]:
    """The arguments of the `SanaIPAdapter` that some tensors are of."""
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"ip_adapter\.(\d+)\.", name))}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    key = shapes.get("ip_adapter.0.to_k_ip.weight")
    pooled, queries = shapes.get("image_proj.image_embeds.weight"), shapes.get("image_proj.latents")
    into, out = shapes.get("image_proj.proj_in.weight"), shapes.get("image_proj.proj_out.weight")
    if key is None or (pooled is None and None in (queries, into, out)):
        raise ValueError(
            "the tensors must be those of an IP-Adapter of Sana, `image_proj.*` and `ip_adapter.*`, but have names"
            f" such as {next(iter(tensors), None)!r}."
        )
    if key[0] % num_heads:
        raise ValueError(
            f"The IP-Adapter is for another transformer: its keys have the width {key[0]}, which"
            f" {num_heads} heads of the transformer do not divide."
        )
    settings: dict[str, Any] = {
        "token_dim": key[1],
        "num_layers": max(blocks) + 1,
        "num_heads": num_heads,
        "head_dim": key[0] // num_heads,
        "has_norm": "ip_adapter.0.norm_k_ip.weight" in shapes,
    }
    if pooled is not None:
        return settings | {"features": "pooled", "image_dim": pooled[1], "num_tokens": pooled[0] // key[1]}
    layers = {int(found[1]) for name in tensors if (found := re.match(r"image_proj\.layers\.(\d+)\.", name))}
    assert queries is not None
    assert into is not None
    return settings | {
        "features": "patches",
        "image_dim": into[1],
        "num_tokens": queries[1],
        "hidden_dim": queries[2],
        "depth": len(layers),
    }
