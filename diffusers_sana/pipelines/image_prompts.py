"""Image prompts: pipelines that also take images as prompts, through IP-Adapters (arXiv 2308.06721).

Legend: B prompts, n images per prompt, P patches of an image, C width of the image encoder's features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers.image_processor import PipelineImageInput
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as UpstreamTransformer
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, Gemma2PreTrainedModel, GemmaTokenizer, PreTrainedModel

from diffusers_sana.checkpoint_files import HUB_ARGUMENTS
from diffusers_sana.checks import check_computed
from diffusers_sana.images import to_pixels, to_rgb
from diffusers_sana.loaders.lora.files import ENDINGS, named, read_lora
from diffusers_sana.locks import exclusive
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.ip_adapter_sana import IP_ADAPTER_FILE, SanaIPAdapterModel
from diffusers_sana.models.transformers.attention_sana import SanaImageState
from diffusers_sana.models.transformers.text_sana import ImageStates
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.pipeline_sana_base import SanaPipelineBase, Size
from diffusers_sana.pipelines.request import Request


logger = logging.get_logger(__name__)

VILA_U, VILA_U_TOWER = "vila_u", "vila_u_vision"  # types of models; their modules are imported where they are needed


class ImagePromptPipeline(SanaPipelineBase):
    """Base of the pipelines that take image prompts: `load_ip_adapter`, `set_ip_adapter_scale`, `unload_ip_adapter`.

    Args:
        image_encoder: a vision encoder of transformers (SigLIP, CLIP, ...) or a `VilaUVisionModel`.
        feature_extractor: its image processor.
        ip_adapter: trained for the transformer and the image encoder.
        the others: the components, see `SanaPipeline`.
    """

    _optional_components = ["image_encoder", "feature_extractor", "ip_adapter"]

    image_encoder: Any
    feature_extractor: Any
    ip_adapter: SanaIPAdapterModel | None

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC | UpstreamAutoencoderDC,
        transformer: SanaTransformer2DModel | UpstreamTransformer,
        scheduler: SchedulerMixin,
        image_encoder: PreTrainedModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        ip_adapter: SanaIPAdapterModel | None = None,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(image_encoder=image_encoder, feature_extractor=feature_extractor, ip_adapter=ip_adapter)

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: str | Sequence[str | None] | None = None,
        weight_name: str | Sequence[str | None] | None = None,
        image_encoder_folder: str | None = "image_encoder",
        **kwargs: Any,
    ) -> None:
        """Loads one or several IP-Adapters, in place of those that are there, and their image encoder.

        The image encoder is looked for only if the pipeline has none. If there is none beside the adapter either,
        give one to the pipeline (`pipe.register_modules(image_encoder=..., feature_extractor=...)`), or call it with
        `ip_adapter_image_embeds`.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder or an id on the Hub with one, or the tensors of
                one; or a list of these. Files are those that `SanaIPAdapterModel.save_adapter` writes.
            subfolder: in the folder or on the Hub; one for all, or a list.
            weight_name: name of the file, by default "ip_adapter.safetensors"; one for all, or a list.
            image_encoder_folder: subfolder with the image encoder and its processor, or a folder of its own; None:
                load none.
            kwargs: `revision`, `token` and the like, for the Hub.

        Raises:
            TypeError: an argument that has no effect.
            ValueError: the adapter is for another transformer, or the file is not one of an adapter.
            OSError: there is no such file, or it is damaged.
        """
        if unknown := sorted(kwargs.keys() - set(HUB_ARGUMENTS)):
            raise TypeError(f"`{unknown[0]}` is no argument of `load_ip_adapter`. For files it has {HUB_ARGUMENTS}.")
        check_takes_image_prompts(self.transformer)
        places: list[Any] = [pretrained_model_name_or_path_or_dict, subfolder, weight_name]
        lists = [list(place) if isinstance(place, list | tuple) else [place] for place in places]
        count = max(map(len, lists))
        if any(len(each) not in (1, count) for each in lists):
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict`, `subfolder` and `weight_name` must be of one length where"
                f" they are lists, got {[len(each) for each in lists]}."
            )
        sources, folders, names = (each * (count // len(each)) for each in lists)
        heads, files = self.transformer.config["num_cross_attention_heads"], []
        device, dtype = _device_of(self.transformer, self._execution_device), self.transformer.dtype
        for source, folder, file in zip(sources, folders, names, strict=True):
            with named(source, file, folder):
                tensors = _read(source, folder, file, kwargs)
                files.append({name: tensor.to(device, dtype) for name, tensor in tensors.items()})
                SanaIPAdapterModel.from_tensors(files[-1:], heads).check_transformer(self.transformer)
        adapter = SanaIPAdapterModel.from_tensors(files, heads)
        if self.image_encoder is None and image_encoder_folder is not None and not isinstance(sources[0], dict):
            encoder, processor = _load_encoder(sources[0], folders[0], image_encoder_folder, self.dtype, kwargs)
            if encoder is not None:
                self.register_modules(image_encoder=encoder.to(device))
                if self.feature_extractor is None:
                    self.register_modules(feature_extractor=processor)
        self.register_modules(ip_adapter=adapter)

    def set_ip_adapter_scale(self, scale: float | Sequence[float | Sequence[float]]) -> None:
        """Sets the strength of the image prompts: see `SanaIPAdapterModel.set_scale`. 0 is without, 1 at first."""
        if self.ip_adapter is None:
            raise ValueError("There is no IP-Adapter to set the `scale` of. Call `pipe.load_ip_adapter` before.")
        self.ip_adapter.set_scale(scale)

    def unload_ip_adapter(self) -> None:
        """Removes the IP-Adapters, the image encoder and its processor; the transformer is as it was before."""
        self.register_modules(image_encoder=None, feature_extractor=None, ip_adapter=None)

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: PipelineImageInput | None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
    ) -> list[Tensor]:
        """The features of image prompts, which `ip_adapter_image_embeds` of the pipelines takes.

        Args:
            ip_adapter_image: as in `SanaPipeline.__call__`; not with `ip_adapter_image_embeds`.
            ip_adapter_image_embeds: such features, which are only repeated.
            device: of the result; the pipeline's by default.
            num_images_per_prompt: rows per prompt.

        Returns:
            For each adapter `[B or 1, n, C]`, or of patches `[B or 1, n, P, C]`. Unlike those of other pipelines of
            diffusers they have no negative half.
        """
        _check_image_prompts(self, ip_adapter_image, ip_adapter_image_embeds)
        device = device or self._execution_device
        embeds = ip_adapter_image_embeds
        if embeds is None:
            embeds = [
                self._encode_images(images, adapter.features, device)[None]
                for images, adapter in zip(self._images_of(ip_adapter_image), self._adapters, strict=True)
            ]
            assert self.ip_adapter is not None
            for each in embeds:
                check_computed("image_encoder", "features", each, each.dtype)
            self.ip_adapter.check_embeds(embeds, "ip_adapter_image")
        return [each.to(device).repeat_interleave(num_images_per_prompt, dim=0) for each in embeds]

    @property
    def _adapters(self) -> list[Any]:
        return [] if self.ip_adapter is None else list(self.ip_adapter.ip_adapters)

    def _images_of(self, ip_adapter_image: Any) -> list[Any]:
        """The images for each adapter: lists, or tensors of preprocessed pixels."""
        each = ip_adapter_image if isinstance(ip_adapter_image, list | tuple) else [ip_adapter_image]
        if len(each) != len(self._adapters):
            raise ValueError(
                f"`ip_adapter_image` must have one entry for each of {len(self._adapters)} IP-Adapters, got"
                f" {len(each)}. Several images for one adapter are a list in the list; images that differ between the"
                " prompts are given as `ip_adapter_image_embeds`."
            )
        return [list(images) if isinstance(images, list | tuple) else [images] for images in each]

    def _encode_images(self, images: list[Any], features: str, device: torch.device) -> Tensor:
        """`[n, C]` or `[n, P, C]`."""
        pixels = _preprocess(images, self.feature_extractor)
        encoder = self.image_encoder
        with exclusive(encoder):
            return image_features(encoder, pixels.to(_device_of(encoder, device), encoder.dtype), features).to(device)

    def _check(self, request: Request, size: Size) -> None:
        super()._check(request, size)
        if request.has_image_prompt:
            _check_image_prompts(self, request.ip_adapter_image, request.ip_adapter_image_embeds)
            prompts = request.prompt if request.prompt_embeds is None else request.prompt_embeds
            count = len(prompts) if isinstance(prompts, list | Tensor) else 1
            for embeds in request.ip_adapter_image_embeds or ():
                if len(embeds) not in (1, count):
                    raise ValueError(
                        f"`ip_adapter_image_embeds` must have 1 row, or one for each of {count} prompts, got"
                        f" {len(embeds)}. Features of negative prompts are not part of them: these have no image."
                    )

    def _image_states(self, request: Request, num_images: int) -> ImageStates:
        """What the blocks attend to, one row for each of `num_images`; empty without image prompts."""
        if not request.has_image_prompt:
            return ()
        embeds = self.prepare_ip_adapter_image_embeds(request.ip_adapter_image, request.ip_adapter_image_embeds)
        adapter: Any = self.ip_adapter
        device, dtype = self._execution_device, self.transformer.dtype
        with exclusive(adapter):
            states = adapter([each.to(_device_of(adapter, device)) for each in embeds])

        def per_image(value: Tensor) -> Tensor:
            value = value.to(device, dtype)
            return (
                value.expand(num_images, -1, -1, -1)
                if len(value) == 1
                else value.repeat_interleave(num_images // len(value), dim=0)
            )

        return tuple(
            tuple(SanaImageState(per_image(image.key), per_image(image.value)) for image in images)
            for images in states
        )


def _device_of(model: Any, execution_device: torch.device) -> torch.device:
    """Where a model computes; one whose weights are kept elsewhere by sequential offloading is on "meta" meanwhile."""
    device: torch.device = model.device
    return execution_device if device.type == "meta" else device


@torch.no_grad()
def image_features(encoder: Any, pixel_values: Tensor, features: str) -> Tensor:
    """What IP-Adapters see of images.

    Args:
        encoder: a vision encoder of transformers, or VILA-U's.
        pixel_values: `[n, 3, H, W]` as its image processor gives them.
        features: "pooled", `[n, C]`: the projected vector of CLIP, the pooled one of other encoders, of VILA-U that of
            its semantic head, or the mean of its features without one. "patches", `[n, P, C]`: the hidden states
            before the last layer, of VILA-U what it quantizes.

    Raises:
        ValueError: the encoder does not give such features.
    """
    if _kind_of(encoder) == VILA_U_TOWER:
        if features == "pooled" and encoder.semantic_head is not None:
            return encoder.get_image_features(pixel_values)
        patches = encoder.encode(pixel_values).flatten(1, 2)
        return patches if features == "patches" else patches.mean(dim=1)
    outputs = encoder(pixel_values, output_hidden_states=features == "patches")
    if features == "patches":
        states = getattr(outputs, "hidden_states", None)
        found = None if states is None else states[-2]
    else:
        found = getattr(outputs, "image_embeds", None)
        found = getattr(outputs, "pooler_output", None) if found is None else found
    if found is None:
        raise ValueError(
            f"`image_encoder`, a {type(encoder).__name__}, gives no {features} features of images. Load the encoder"
            " that the IP-Adapter was trained with."
        )
    return found


def check_takes_image_prompts(transformer: Any) -> None:
    """Raises ValueError for a transformer whose blocks know text alone, such as diffusers'."""
    if not getattr(transformer, "_takes_image_prompts", False):
        library = type(transformer).__module__.partition(".")[0]
        raise ValueError(
            "`transformer` must be diffusers_sana.SanaTransformer2DModel for image prompts, got"
            f" {library}.{type(transformer).__name__}. `diffusers_sana.SanaPipeline.from_pretrained` loads it from the"
            " same folder."
        )


def image_processor_of(encoder: Any, folder: str | Path | None = None, **hub: Any) -> Any:
    """The image processor of an encoder: that of a folder or a Hub id, else the usual one of its kind and size.

    Raises:
        ValueError: there is none, and the kind of the encoder is none of CLIP, SigLIP and VILA-U.
    """
    if folder is not None:
        try:
            return transformers.AutoImageProcessor.from_pretrained(folder, **hub)
        except (OSError, ValueError):
            logger.info(f"{folder} has no image processor; the usual one of the image encoder is taken.")
    side: Any = getattr(getattr(encoder, "config", None), "image_size", None)
    size = {"height": side, "width": side}
    kind = _kind_of(encoder)
    if kind.startswith("clip"):
        return transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size)
    if kind.startswith("siglip_"):
        return transformers.SiglipImageProcessor(size=size)
    if kind == VILA_U_TOWER:
        from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessor

        return VilaUImageProcessor(size=size)
    raise ValueError(
        f"`feature_extractor` must be given for a {type(encoder).__name__}: there is no image processor beside it."
    )


def _kind_of(encoder: Any) -> str:
    return str(getattr(getattr(encoder, "config", None), "model_type", ""))


def load_image_encoder(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Any]:
    """An image encoder and its image processor, from a folder or the Hub.

    Args:
        name_or_path: of a vision encoder of transformers, or of a whole VILA-U, whose vision tower is taken.
        dtype: of the encoder.
        options: `subfolder`, and arguments for the Hub.
    """
    config = transformers.AutoConfig.from_pretrained(name_or_path, **options)
    if config.model_type == VILA_U:
        from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration

        model = VilaUForConditionalGeneration.from_pretrained(name_or_path, dtype=dtype, **options)
        encoder = model.model.vision_tower
    else:
        config = getattr(config, "vision_config", config)  # of a whole CLIP or SigLIP, the half that sees
        # The auto class would leave out the projection.
        is_clip = config.model_type == "clip_vision_model"
        model_class = transformers.CLIPVisionModelWithProjection if is_clip else transformers.AutoModel
        encoder = model_class.from_pretrained(name_or_path, config=config, dtype=dtype, **options)
    return encoder.eval(), image_processor_of(encoder, name_or_path, **options)


def _check_image_prompts(pipe: Any, image: Any, embeds: Any) -> None:
    """Raises, naming the argument, where image prompts cannot be used."""
    if image is not None and embeds is not None:
        raise ValueError("`ip_adapter_image` and `ip_adapter_image_embeds` exclude each other; leave one out.")
    name = "ip_adapter_image" if embeds is None else "ip_adapter_image_embeds"
    if pipe.ip_adapter is None:
        raise ValueError(f"`{name}` needs an IP-Adapter. Call `pipe.load_ip_adapter` before.")
    check_takes_image_prompts(pipe.transformer)
    pipe.ip_adapter.check_transformer(pipe.transformer)
    if embeds is not None:
        pipe.ip_adapter.check_embeds(embeds, name)
        if not all(bool(each.isfinite().all()) for each in embeds):
            raise ValueError("`ip_adapter_image_embeds` must be finite, but has NaN or infinite values.")
        return
    lists = pipe._images_of(image)
    for images in lists:
        if not images or not all(isinstance(each, Tensor | np.ndarray | Image.Image) for each in images):
            raise TypeError(f"`ip_adapter_image` must hold PIL images, arrays or tensors of pixels, got {images!r}.")
    if pipe.image_encoder is None or pipe.feature_extractor is None:
        part = "image_encoder" if pipe.image_encoder is None else "feature_extractor"
        raise ValueError(
            f"`ip_adapter_image` needs `{part}`, which this pipeline does not have. Call"
            " `pipe.register_modules(image_encoder=..., feature_extractor=...)` with the encoder that the IP-Adapter"
            " was trained with, or give `ip_adapter_image_embeds`."
        )


def _preprocess(images: list[Any], processor: Any) -> Tensor:
    """`[n, 3, H, W]` for an image encoder. Arrays and tensors hold what `to_pixels` takes."""
    found = []
    for image in images:
        if isinstance(image, Image.Image):
            found.append(to_rgb(image))
            continue
        for pixels in to_pixels("ip_adapter_image", image):
            values = (pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
            found.append(Image.fromarray(values))
    pixel_values: Tensor = processor(found, return_tensors="pt").pixel_values
    return pixel_values


def _read(source: Any, subfolder: str | None, weight_name: str | None, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file of one adapter."""
    if isinstance(source, dict):
        parts = ("image_proj", "ip_adapter")
        nested = {f"{part}.{key}": source[part][key] for part in parts for key in source.get(part, ())}
        return read_lora(nested or dict(source))[0]
    if weight_name is None and Path(source).suffix not in ENDINGS:
        weight_name = IP_ADAPTER_FILE
    tensors, _ = read_lora(source, weight_name, subfolder=subfolder, **hub)
    return tensors


def _load_encoder(
    source: str | Path, subfolder: str | None, image_encoder_folder: str, dtype: torch.dtype, hub: dict[str, Any]
) -> tuple[Any, Any]:
    """The encoder and processor in a folder of that name, or beside an adapter; None twice if there is none."""
    config, own = "config.json", Path(image_encoder_folder)
    place = Path(source).parent if Path(source).is_file() else Path(source)
    beside = place / (subfolder or "") / image_encoder_folder  # or, if that is absolute, itself
    for folder in (beside, own):
        if (folder / config).is_file():
            return load_image_encoder(folder, dtype)
    if place.is_dir():
        return None, None
    inner = "/".join(part for part in (subfolder, image_encoder_folder) if part)
    try:
        return load_image_encoder(str(source), dtype, subfolder=inner, **hub)
    except OSError:
        logger.info(f"{source} has no image encoder in {inner}.")
        return None, None
