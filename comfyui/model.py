"""What passes between the nodes of Sana: a pipeline that all of them share, and what one branch of the graph adds.

A node changes nothing in a pipeline that another node, or a later run of the same graph, could notice.
"""

from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

from torch import Tensor

from . import host
from .places import source, state_of
from .previews import LatentPreview


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it follows.

    Attributes:
        place: of the ControlNet.
        image: `[B, H, W, 3]` in [0, 1].
        strength, start, end: weight, and the fractions of the steps between which it acts.
    """

    place: str
    image: Tensor
    strength: float
    start: float
    end: float


@dataclass(eq=False)
class Shared:
    """What all branches of a pipeline have in common.

    Attributes:
        branches: all models around the pipeline, as long as ComfyUI keeps them.
        controlnets: that are loaded, by the state of their files.
        preview: of the autoencoder's latents, once it was asked for.
    """

    branches: WeakSet = field(default_factory=WeakSet)
    controlnets: dict[str, Any] = field(default_factory=dict)
    preview: LatentPreview | None = None


@dataclass(frozen=True, eq=False)
class SanaModel:
    """A pipeline, and the LoRAs and the ControlNets to generate with.

    Attributes:
        pipe: a `SanaPipeline` or `SanaSprintPipeline`.
        loras: pairs of place and strength.
        controls: ControlNets, which steer together.
    """

    pipe: Any
    loras: tuple[tuple[str, float], ...] = ()
    controls: tuple[Control, ...] = ()
    shared: Shared = field(default_factory=Shared)

    def __post_init__(self) -> None:
        self.shared.branches.add(self)

    @property
    def is_sprint(self) -> bool:
        """Whether the model is SANA-Sprint."""
        return bool(self.pipe.transformer.config.guidance_embeds)

    @property
    def scaling_factor(self) -> float:
        """What the pipeline multiplies the latents of the autoencoder by. ComfyUI's nodes pass on the latter."""
        return self.pipe.vae.config.scaling_factor

    def with_lora(self, place: str, strength: float) -> "SanaModel":
        """A branch with one more LoRA."""
        return replace(self, loras=(*self.loras, (place, strength)))

    def with_control(self, control: Control) -> "SanaModel":
        """A branch with one more ControlNet."""
        return replace(self, controls=(*self.controls, control))

    def preview(self) -> LatentPreview:
        """Shows latents of this pipeline; fitted at the first call."""
        if self.shared.preview is None:
            self.shared.preview = LatentPreview.fit(self.pipe.vae)
        return self.shared.preview

    def activate_loras(self) -> None:
        """Activates exactly `loras`. Files stay loaded while a branch uses them and they do not change."""
        used = {state_of(place) for branch in self.shared.branches for place, _ in branch.loras}
        loaded = set(getattr(self.pipe.transformer, "peft_config", {}))
        if loaded and not loaded & used:
            self.pipe.unload_lora_weights()
        elif loaded - used:
            self.pipe.delete_adapters(sorted(loaded - used))
        strengths: dict[str, float] = {}
        for place, strength in self.loras:
            name = state_of(place)
            if name not in getattr(self.pipe.transformer, "peft_config", {}):
                self.pipe.load_lora_weights(source(place), adapter_name=name)
            strengths[name] = strengths.get(name, 0.0) + strength
        if strengths:
            self.pipe.enable_lora()
            self.pipe.set_adapters(list(strengths), list(strengths.values()))
        elif getattr(self.pipe.transformer, "peft_config", {}):
            self.pipe.disable_lora()

    def controlnet(self) -> Any:
        """The ControlNet of this branch, or a list of several, loaded. Others leave memory once no branch uses them.

        None for none.
        """
        used = {state_of(control.place) for branch in self.shared.branches for control in branch.controls}
        for name in self.shared.controlnets.keys() - used:
            del self.shared.controlnets[name]
        loaded = [self._loaded(control.place) for control in self.controls]
        return loaded if len(loaded) > 1 else next(iter(loaded), None)

    def _loaded(self, place: str) -> Any:
        """A ControlNet, read unless it is in memory."""
        from diffusers_sana import SanaControlNetModel

        name, file = state_of(place), source(place)
        if name not in self.shared.controlnets:
            is_file = file.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt"))
            load = SanaControlNetModel.from_single_file if is_file else SanaControlNetModel.from_pretrained
            model = load(file, dtype=self.pipe.transformer.dtype)
            self.shared.controlnets[name] = model.to(host.device())
        return self.shared.controlnets[name]
