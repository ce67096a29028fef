"""Several ControlNets for Sana as one: their outputs are summed, as in the multi-ControlNets of diffusers.

Legend: B batch, C latent channels, H W latent height and width, N image tokens, L text tokens, D inner width.
"""

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.controlnets.controlnet_sana import SanaControlNetOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from diffusers_sana.models.controlnets.controlnet_sana import SanaControlNetModel, wiring_of
from diffusers_sana.models.transformers.text_sana import SanaTextContext


# Arguments of `from_pretrained` that are also those of `load_config`.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class SanaMultiControlNetModel(ModelMixin, ConfigMixin):
    """Several `SanaControlNetModel` that steer one transformer together.

    A folder has each of them in a subfolder, "0.net", "1.net" and so on, or "0.fp16" of a variant, and says how many
    there are. A pipeline looks for the variant behind the point.

    Args:
        controlnets: one or more of this package, of either `wiring`; they may be compiled.

    Raises:
        TypeError, ValueError: another kind of model, or none.
    """

    nets: Any

    def __init__(self, controlnets: Sequence[Any]) -> None:
        super().__init__()
        if not isinstance(controlnets, list | tuple) or not controlnets:
            raise ValueError(f"`controlnets` must be a list of at least one ControlNet, got {controlnets!r}.")
        for net in controlnets:
            if not hasattr(net, "encode_text") or "wiring" not in net.config:
                raise TypeError(
                    "`controlnets` must be of the SanaControlNetModel of this package, got"
                    f" {type(net).__module__}.{type(net).__name__}. Load it with"
                    " `diffusers_sana.SanaControlNetModel.from_pretrained`."
                )
        self.nets = nn.ModuleList(controlnets)
        self.register_to_config(num_controlnets=len(controlnets))

    @property
    def has_inner(self) -> bool:
        """Whether one of them starts from the output of the transformer's first block."""
        return any(wiring_of(net) == "nvlabs" for net in self.nets)

    @property
    def saved_parts(self) -> dict[str, nn.Module]:
        """The models that are saved, and so quantized, one by one."""
        return {f"nets.{index}": net for index, net in enumerate(self.nets)}

    @apply_forward_hook
    def encode_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[SanaTextContext, ...]:
        """The text for each ControlNet, for `forward(..., text_context=)` in all steps.

        Args:
            encoder_hidden_states: text encoder output `[B, L, caption_channels]`.
            encoder_attention_mask, attention_kwargs: as in `SanaControlNetModel.encode_text`.
        """
        return tuple(
            net.encode_text(encoder_hidden_states.to(net.dtype), encoder_attention_mask, attention_kwargs)
            for net in self.nets
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Sequence[Tensor],
        controlnet_cond: Sequence[Tensor],
        conditioning_scale: Sequence[float],
        text_context: Sequence[SanaTextContext],
        first_block: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> SanaControlNetOutput | tuple[tuple[Tensor, ...]]:
        """The sums of the residuals. A ControlNet whose scale is 0 does not run.

        Args:
            hidden_states: noisy latents `[B, C, H, W]`.
            timestep, controlnet_cond, conditioning_scale, text_context: as in `SanaControlNetModel.forward`, one for
                each ControlNet.
            first_block: output of the transformer's first block `[B, N, D]`, where a ControlNet has
                `wiring="nvlabs"`.
            attention_kwargs: may contain `scale`, the weight of the loaded LoRAs.
            return_dict: return a `SanaControlNetOutput` instead of a tuple.

        Returns:
            `controlnet_block_samples`, tensors `[B, N, D]`, as many as the deepest ControlNet that runs has. Where
            `first_block` is given, sample i is for the output of block i, else for that of block i + 1.

        Raises:
            ValueError: not one for each ControlNet, every scale is 0, or `first_block` is missing.
        """
        given = {
            "timestep": timestep,
            "controlnet_cond": controlnet_cond,
            "conditioning_scale": conditioning_scale,
            "text_context": text_context,
        }
        for name, values in given.items():
            if len(values) != len(self.nets):
                raise ValueError(
                    f"`{name}` must have one for each of {len(self.nets)} ControlNets, got {len(values)}."
                )
        if not any(conditioning_scale):
            raise ValueError("`conditioning_scale` must not be 0 for every ControlNet: there would be no output.")
        if self.has_inner and first_block is None:
            raise ValueError("`first_block` must be given where a ControlNet has `wiring='nvlabs'`, got None.")

        sums: dict[int, Tensor] = {}
        arguments = zip(self.nets, timestep, controlnet_cond, conditioning_scale, text_context, strict=True)
        for net, t, cond, scale, text in arguments:
            if scale == 0:
                continue
            is_inner = wiring_of(net) == "nvlabs"
            stream: Any = first_block if is_inner else hidden_states
            options = {"conditioning_scale": scale, "attention_kwargs": attention_kwargs, "text_context": text}
            samples = net(stream.to(net.dtype), None, t, cond, **options, return_dict=False)[0]
            first = 1 if self.has_inner and not is_inner else 0
            for index, sample in enumerate(samples, first):
                sums[index] = sums[index] + sample if index in sums else sample
        blank = torch.zeros_like(sums[max(sums)])
        outputs: Any = tuple(sums.get(index, blank) for index in range(max(sums) + 1))
        return SanaControlNetOutput(controlnet_block_samples=outputs) if return_dict else (outputs,)

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look at the signature for what they may pass
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes a folder with each ControlNet in a subfolder; the arguments are those of `ModelMixin`."""
        self.save_config(save_directory)
        for index, net in enumerate(self.nets):
            folder = os.path.join(save_directory, _subfolder(index, kwargs.get("variant")))
            net.save_pretrained(folder, *args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str = "", **kwargs: Any
    ) -> Self:
        """Loads what `save_pretrained` has written.

        Args:
            pretrained_model_name_or_path, subfolder: where it is, a folder or on the Hub.
            kwargs: other arguments of `SanaControlNetModel.from_pretrained`, for each ControlNet.
        """
        place = str(pretrained_model_name_or_path)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config: Any = cls.load_config(place, subfolder=subfolder or None, **hub)
        names = (_subfolder(index, kwargs.get("variant")) for index in range(config["num_controlnets"]))
        folders = ("/".join(filter(None, (subfolder, name))) for name in names)
        return cls([SanaControlNetModel.from_pretrained(place, subfolder=folder, **kwargs) for folder in folders])


def _subfolder(index: int, variant: str | None) -> str:
    """Where a ControlNet is saved."""
    return f"{index}.{variant or 'net'}"


def controlnets_of(controlnet: Any) -> list[Any]:
    """Each ControlNet of the component `controlnet` of a pipeline, which may be one or several, and compiled."""
    return list(getattr(controlnet, "nets", [controlnet]))


def control_by_all(
    controlnet: Any, hidden_states: Tensor, dtype: torch.dtype, **arguments: Any
) -> tuple[Tensor, ...] | Callable[[Tensor], tuple[Tensor, ...]]:
    """`control` by several ControlNets: the argument `controlnet_block_samples` of the transformer.

    Args:
        controlnet: a SanaMultiControlNetModel; may be compiled.
        hidden_states: noisy latents `[B, C, H, W]`, of any dtype.
        dtype: of the transformer.
        arguments: the other arguments of `SanaMultiControlNetModel.forward`.
    """

    def samples(first_block: Tensor | None = None) -> tuple[Tensor, ...]:
        outputs = controlnet(hidden_states, first_block=first_block, **arguments, return_dict=False)[0]
        return tuple(output.to(dtype) for output in outputs)

    return samples if controlnet.has_inner else samples()
