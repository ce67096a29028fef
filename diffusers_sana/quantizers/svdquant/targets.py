"""Which layers of a model are quantized. They are matched by name and class, so no model-specific code is needed.

A target is a linear layer or an ungrouped 1x1 convolution inside a repeated block (a numbered child of a list), where
nearly all weights are. Embeddings and output layers stay in 16 bit: they are small, and their errors affect the whole
output.

    w4a16   adaLN projections, in the blocks or shared by them: they process one row per image
            keys and values of cross-attention: their input is the text, processed once per prompt
    16 bit  everything in a convolutional residual block, the input and output layers of a U-Net's attention stages,
            and gates, which have an output per head or fewer
    w4a4    all other layers in the blocks

Activations stay in 16 bit where that costs nothing. This includes text encoders, which run once per prompt and have
outliers that 4 bits cannot represent: all their layers are w4a16. With int8 weights w8a8 and w8a16 take the places of
w4a4 and w4a16.

A model may publish `_svdquant_modules`, a dictionary like `SVDQuantConfig.modules`, to override these rules.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar, cast

from torch import Tensor, nn

from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig, mode_for


T = TypeVar("T")
IN_BLOCK = re.compile(r"(^|\.)\d+\.")
ADALN = re.compile(r"(^|\.)(norm\w*\.linear|(img|txt)_mod\.\d+|adaLN_modulation\.\d+|\w*modulation\w*\.(linear|lin))$")
SHARED_ADALN = re.compile(
    r"^((time_embed|adaln_single)\.linear"  # Sana and SANA-Video; PixArt
    r"|(audio_time_embed|(audio_)?prompt_adaln|av_cross_attn_\w+)\.linear"  # LTX-2
    r"|(double|single)_stream_modulation\w*\.linear"  # FLUX.2
    r"|condition_embedder\.time_proj"  # Wan
    r"|distilled_guidance_layer\.layers\.\d+\.linear_\d"  # Chroma
    r"|t_block\.1"  # SANA-WM and SANA-Video 2.0
    r"|caption_projection\.\d+\.linear)$"  # of HiDream, for text, as the following
)
CROSS_ATTENTION_TEXT = re.compile(r"(^|\.)((audio_)?attn2\.(to_k|to_v|add_k_proj|add_v_proj)|cross_attn\.kv_linear)$")
IN_16_BIT = re.compile(r"(^|\.)((resnets|upsamplers|downsamplers|embeddings?)\.|attentions\.\d+\.proj_(in|out)$)")
GATE = 32  # a layer with no more than one output for so many inputs is a gate, such as those of heads in SANA-WM
# Layers that share their input, and so their smoothing factors. The queries of cross-attention have a different input.
SIBLINGS = (
    ("to_q", "to_k", "to_v"),
    ("to_q_t", "to_k_t", "to_v_t"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
)
CROSS_ATTENTION = re.compile(r"(attn2|\w+_to_\w+_attn)$")  # to text; and between video and audio
CROSS_SIBLINGS = (("to_k", "to_v"), ("add_k_proj", "add_v_proj"))


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is a linear layer or an ungrouped 1x1 convolution, of the stock class or a subclass."""
    if isinstance(module, nn.Linear):
        return not hasattr(module, "qweight")
    return (
        isinstance(module, nn.Conv2d)
        and not hasattr(module, "qweight")
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), 0)
        and module.groups == 1
    )


def default_mode(name: str) -> str | None:
    """The mode that the rules above assign to a layer name: "w4a4", "w4a16", or None for 16 bit."""
    if SHARED_ADALN.search(name):
        return "w4a16"
    if not IN_BLOCK.search(name) or IN_16_BIT.search(name):
        return None
    return "w4a16" if ADALN.search(name) or CROSS_ATTENTION_TEXT.search(name) else "w4a4"


def find_targets(model: nn.Module, config: SVDQuantConfig) -> dict[str, str]:
    """The layers to quantize, by name in the order of the model, each with one of `LAYER_MODES`.

    Works on the meta device.

    Raises:
        ValueError: a pattern that matches no layer, or only layers whose weight is tied to another's, a rank above the
            smaller side of a layer, or no layer to quantize.
    """
    candidates = {name: module for name, module in model.named_modules() if is_quantizable(module)}
    tied = {name: other for name, other in tied_modules(model).items() if name in candidates}
    patterns = config.modules or getattr(model, "_svdquant_modules", None)
    if patterns is None:
        modes = {name: None if _is_gate(module) else default_mode(name) for name, module in candidates.items()}
        if hasattr(model, "get_input_embeddings"):  # a model of transformers
            modes = {name: mode and "w4a16" for name, mode in modes.items()}
    else:
        _check_patterns("modules", patterns, candidates, fnmatchcase)
        _check_not_tied(patterns, candidates, tied)
        modes = {name: next((patterns[p] for p in patterns if fnmatchcase(name, p)), None) for name in candidates}
    if config.modules is None and config.precision == "int8":
        modes = {name: mode and mode_for("int8", mode) for name, mode in modes.items()}
    in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or []
    kept = [*config.modules_to_not_convert, *([in_fp32] if isinstance(in_fp32, str) else in_fp32)]
    _check_patterns("modules_to_not_convert", config.modules_to_not_convert, dict(model.named_modules()), _is_in)
    targets = {
        name: mode
        for name, mode in modes.items()
        if mode is not None and name not in tied and not any(_is_in(name, p) for p in kept)
    }
    if not targets:
        raise ValueError(
            f"no layer of {type(model).__name__} is to be quantized. `modules` must name linear layers or 1x1 "
            f"convolutions; it has {len(candidates)}, among them {sorted(candidates)[:3]}."
        )
    for name, mode in targets.items():
        max_rank, rank = min(weight_shape(candidates[name])), config.for_layer(mode).rank
        if config.budget is None and rank > max_rank:
            raise ValueError(
                f"`rank` must be at most {max_rank}, the smaller side of layer {name!r}, got {rank}. Lower it, or "
                "leave the layer out with `modules_to_not_convert`."
            )
    return targets


def tied_modules(model: nn.Module) -> dict[str, str]:
    """Modules that share their weight with another one, such as an output layer with the embeddings -> that one."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    return {name: next(n for n in names if n != name) for names in owners.values() if len(names) > 1 for name in names}


def _is_gate(module: nn.Module) -> bool:
    outputs, inputs = weight_shape(module)
    return outputs * GATE <= inputs


def check_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError for NaN or infinity in the weight of a layer, naming the layer."""
    if not weight.isfinite().all():
        raise ValueError(
            f"the weight of {name!r} must be finite, got NaN or infinity. Load the model in bf16 or fp32."
        )


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Output and input features of a linear layer or a 1x1 convolution."""
    shape = cast(Tensor, module.weight).shape
    return shape[0], shape[1]


def as_patterns(targets: dict[str, T], model: nn.Module) -> dict[str, T]:
    """Targets and what they have, such as a mode, in short form: `*` for a block number where all blocks agree."""
    candidates = [
        name for name, module in model.named_modules() if is_quantizable(module) or hasattr(module, "qweight")
    ]
    patterns: dict[str, T] = {}
    for name, mode in targets.items():
        general = re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)
        matched = [candidate for candidate in candidates if fnmatchcase(candidate, general)]
        patterns[general if all(targets.get(candidate) == mode for candidate in matched) else name] = mode
    return patterns


def sibling_groups(targets: Mapping[str, str]) -> list[list[str]]:
    """The names of targets, grouped by shared input and mode; most groups have one member."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, mode in targets.items():
        parent, _, leaf = name.rpartition(".")
        families = CROSS_SIBLINGS if CROSS_ATTENTION.search(parent) else SIBLINGS
        family = next((siblings for siblings in families if leaf in siblings), None)
        key = name if family is None else f"{parent}.{family[0]}"
        groups.setdefault((key, mode), []).append(name)
    return list(groups.values())


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a model that share their input. They share smoothing factors, so they are decomposed together.

    Attributes:
        component: name of the model in its pipeline.
        model: holds the layers.
        names: of the layers in the model.
        mode: one of `LAYER_MODES`.
    """

    component: str
    model: nn.Module
    names: list[str]
    mode: str

    @property
    def keys(self) -> list[str]:
        """The names of the layers, unique in the pipeline."""
        return [f"{self.component}.{name}" for name in self.names]

    @property
    def key(self) -> str:
        """The name of the group: that of its first layer."""
        return self.keys[0]

    @property
    def layers(self) -> list[nn.Module]:
        """The layers."""
        return [self.model.get_submodule(name) for name in self.names]

    @property
    def weights(self) -> list[Tensor]:
        """Their weights, `[N, K]`, without gradient."""
        return [cast(Tensor, layer.weight).detach().flatten(1) for layer in self.layers]


def layer_groups(component: str, model: nn.Module, targets: Mapping[str, str]) -> list[LayerGroup]:
    """The targets of a model in groups that share their input."""
    return [LayerGroup(component, model, names, targets[names[0]]) for names in sibling_groups(targets)]


def _is_in(name: str, pattern: str) -> bool:
    """Whether a pattern selects a module: by its name, by that of a parent, or by one component of its name."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") or pattern in name.split(".")


def _check_patterns(
    argument: str, patterns: Iterable[str], names: Iterable[str], matches: Callable[[str, str], bool]
) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"`{argument}` must name layers of the model; {pattern!r} matches none. Names look like "
                f"{[name for name in names if IN_BLOCK.search(name)][:3]}; `*` stands for anything."
            )


def _check_not_tied(patterns: Iterable[str], names: Iterable[str], tied: Mapping[str, str]) -> None:
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if all(name in tied for name in matched):
            raise ValueError(
                f"`modules` must name layers with a weight of their own; {pattern!r} only matches {matched[0]!r}, "
                f"whose weight is also that of {tied[matched[0]]!r}. Leave it out."
            )
