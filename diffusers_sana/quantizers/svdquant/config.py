"""What a user chooses about SVDQuant, and what a checkpoint records about itself."""

import json
import logging
import re
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersConfigMixin
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from diffusers_sana.arguments import COMPUTE_MODES, QUALITIES, ROTATIONS, TARGET_PRECISIONS
from diffusers_sana.kernels.rotation import GROUP


logger = logging.getLogger(__name__)

# How tensors are stored, see docs/quantization.md; changes with what a reader must know. A model is in the first that
# has all it needs, so that earlier versions read what they can: the second has rotated layers, the third int8 layers
# and other sizes of rotated groups, the fourth float8 layers.
LAYOUT = "diffusers_sana/1"
ROTATED_LAYOUT = "diffusers_sana/2"
INT8_LAYOUT = "diffusers_sana/3"
FLOAT8_LAYOUT = "diffusers_sana/4"
LAYOUTS = (LAYOUT, ROTATED_LAYOUT, INT8_LAYOUT, FLOAT8_LAYOUT)
PRECISIONS = (*TARGET_PRECISIONS, "float8")
# Of a layer: whether it has weights in 4 bits, int8 or float8, and whether its activations may be quantized.
LAYER_MODES = ("w4a4", "w4a16", "w8a8", "w8a16", "f8a8", "f8a16")
RANKS = {"int4": 32, "nvfp4": 32, "int8": 0, "float8": 0}  # of the branch, where the user names none
SMOOTHING = ("search", "none")
# The mode in which "auto" computes layers of a format on most of the devices that are fast with it. The result of a
# quantization does not depend on the device on which it runs.
USUAL_MODES = {"int4": "w4a8", "nvfp4": "w4a4", "int8": "w8a8", "float8": "f8a8"}
DTYPES = ("float16", "bfloat16", "float32", "float64")


class QuantizationMethod(StrEnum):
    """The name under which both libraries register the method; they read its `.value`."""

    SVDQUANT = "svdquant"


def mode_for(precision: str, mode: str) -> str:
    """The mode in which a layer of a format computes when its model is set to `mode`, which is not "auto".

    The bits of the activations count: an int8 layer computes in "w8a16" where 4-bit layers compute in "w4a16", and
    else in "w8a8", a float8 layer in "f8a16" and "f8a8"; 4-bit layers compute in "w4a8" where the mode is "w8a8".
    """
    if precision in ("int8", "float8"):
        weight = "w8" if precision == "int8" else "f8"
        return weight + ("a16" if mode.endswith("a16") else "a8")
    return f"w4{mode[2:]}"


@dataclass(frozen=True)
class LayerConfig:
    """How one layer is quantized; the fields are those of `SVDQuantConfig`, and `mode`.

    Attributes:
        mode: in which the layer will compute, such as "w4a8": candidates are compared in it.
    """

    precision: str = "int4"
    rank: int = 32
    smoothing: str = "search"
    refinements: int = 20
    gptq: bool | None = None
    seed: int = 0
    mode: str = "w4a4"
    quality: str = "default"
    rotation: str = "none"

    @property
    def tries_gptq(self) -> bool:
        """Whether error compensation is tried where there is calibration data."""
        return self.quality == "best" if self.gptq is None else self.gptq

    @property
    def uses_hessian(self) -> bool:
        """Whether calibration has to collect the products of inputs."""
        return self.tries_gptq or (self.rank > 0 and self.refinements > 0)


@dataclass(repr=False)
class SVDQuantConfig(DiffusersConfigMixin, TransformersConfigMixin):
    """Options of SVDQuant, for `quantization_config=` and `PipelineQuantizationConfig`, in both libraries.

    Args:
        precision: "int4" (integers, one scale per 64 weights), "nvfp4" (e2m1, one e4m3 scale per 16) or "int8" (8-bit
            integers, one scale per row). "float8" (e4m3, one scale per row) describes layers read from other runtimes'
            files, which `modules` names.
        rank: of the 16-bit low-rank branch; 0 for none. None: 32 for 4-bit layers, 0 for int8.
        quality: "default", or "best" for smaller errors in several times the time: finer smoothing, `rotation="auto"`,
            and with calibration prompts also `gptq`.
        smoothing: "search" the exponents of the smoothing factors per layer, or "none".
        refinements: how many times, at most, the branch is refitted to the rounding error, with calibration prompts
            weighted by the inputs of the layer, and the weight rounded again. It ends earlier where it no longer pays.
        gptq: try to round the residual with second-order error compensation. A layer keeps it where it lowers the
            error for calibration inputs that it was not fitted to. True needs calibration prompts; None for
            `quality="best"` with prompts.
        rotation: round weight and activations in a rotated basis: "hadamard", "none", or "auto" for layers in which it
            lowers the error, see `kernels/rotation.py`. It costs an operation per layer and call, and other runtimes
            cannot read such layers. None: "auto" for `quality="best"`, else "none".
        budget: a share of the bytes that all tensors take in bf16, such as "0.30x". Ranks, and which layers become
            int8 or stay in 16 bit, are then chosen from measured errors, see `budget.py`; `rank` is not used. All
            options are fitted, and kept in memory until the choice. None: all layers in `precision` with `rank`.
        compute_mode: how layers compute: "w4a4", "w4a8", "w4a16", "w8a8", "w8a16", or "auto" for the fastest on the
            device; see `mode_for`. Layers are fitted for that mode; "auto" stands for "w4a8" with int4, "w4a4" with
            nvfp4 and "w8a8" with int8.
        modules: which layers to quantize: patterns of module names to "w4a4" (activations may be quantized), "w4a16"
            (activations stay 16 bit), "w8a8" or "w8a16" (the same with int8 weights). None: chosen by name, see
            `targets.py`. A saved model lists its layers, those with float8 weights as "f8a8" or "f8a16".
        modules_to_not_convert: patterns of module names to leave in 16 bit.
        rotated: patterns of the names of layers that are rotated; written in a saved model. A dictionary of patterns
            to sizes of the rotated groups, where some are not 64.
        seed: of the randomized SVD.
        layout: of the stored tensors. Other runtimes use the name `svdquant` for different layouts.
        input_scales: static scales of the inputs of layers, by name, for runtimes that need them; a record that ours
            does not use. See `measure_input_scales`.
        dtype: of scales, low-rank branch and all that is not quantized, such as "bfloat16". It is recorded in a saved
            model, which is loaded in it unless another dtype is passed. None: as the library decides.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    quant_method: QuantizationMethod = field(init=False, default=QuantizationMethod.SVDQUANT)  # type: ignore[assignment]
    precision: str = "int4"
    rank: int | None = None
    quality: str = "default"
    smoothing: str = "search"
    refinements: int = 20
    gptq: bool | None = None
    rotation: str | None = None
    budget: str | None = None
    compute_mode: str = "auto"
    modules: dict[str, str] | None = None
    modules_to_not_convert: list[str] = field(default_factory=list)
    rotated: list[str] | dict[str, int] = field(default_factory=list)
    seed: int = 0
    layout: str | None = LAYOUT
    input_scales: dict[str, float] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in (None, *LAYOUTS):
            is_newer = str(self.layout).startswith(f"{LAYOUT.partition('/')[0]}/")
            raise ValueError(
                f"`layout` must be one of {LAYOUTS}, got {self.layout!r}. "
                + (
                    "Upgrade diffusers_sana."
                    if is_newer
                    else "The model was quantized by another runtime: load it there."
                )
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {DTYPES} or None, got {self.dtype!r}.")
        for name, allowed in (
            ("precision", PRECISIONS),
            ("compute_mode", COMPUTE_MODES),
            ("quality", QUALITIES),
            ("smoothing", SMOOTHING),
            ("rotation", (None, *ROTATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.precision == "float8" and self.modules is None:
            raise ValueError(f"`precision` must be one of {TARGET_PRECISIONS} to quantize a model, got 'float8'.")
        for name, least in (("rank", 0), ("refinements", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "rank":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        if self.budget is not None and not re.fullmatch(r"0?\.\d+x", str(self.budget)):
            raise ValueError(
                f'`budget` must be a share of the bytes in bf16 such as "0.30x", or None, got {self.budget!r}.'
            )
        if not isinstance(self.gptq, bool | None):
            raise TypeError(f"`gptq` must be True, False or None, got {self.gptq!r}.")
        if not isinstance(self.modules_to_not_convert, list | tuple | None):
            raise TypeError(f"`modules_to_not_convert` must be a list, got {self.modules_to_not_convert!r}.")
        if not isinstance(self.rotated, list | tuple | dict | None):
            raise TypeError(f"`rotated` must be a list, or a dictionary of patterns to sizes, got {self.rotated!r}.")
        if not isinstance(self.input_scales, dict | None):
            raise TypeError(
                f"`input_scales` must be a dictionary of layer names to numbers, got {self.input_scales!r}."
            )
        if not isinstance(self.modules, dict | None):
            raise TypeError(f"`modules` must be a dictionary of patterns to modes or None, got {self.modules!r}.")
        self.modules_to_not_convert = list(self.modules_to_not_convert or [])
        self.rotated = dict(self.rotated) if isinstance(self.rotated, dict) else list(self.rotated or [])
        for pattern in [*self.modules_to_not_convert, *self.rotated, *(self.modules or {})]:
            if not isinstance(pattern, str):
                raise TypeError(f"patterns of module names must be strings, got {pattern!r}.")
        if self.modules is not None and not self.modules:
            raise ValueError("`modules` must name at least one pattern, or be None for the choice by name, got {}.")
        for pattern, mode in (self.modules or {}).items():
            if mode not in LAYER_MODES:
                raise ValueError(f"`modules[{pattern!r}]` must be one of {LAYER_MODES}, got {mode!r}.")

    def for_layer(self, mode: str) -> LayerConfig:
        """How a layer of one of `LAYER_MODES` is quantized. 4-bit layers with 16-bit activations are always int4."""
        is_weight_only = mode.endswith("a16")
        if not mode.startswith("w4"):
            precision = "int8" if mode.startswith("w8") else "float8"
        else:
            precision = "nvfp4" if self.precision == "nvfp4" and not is_weight_only else "int4"
        automatic = "auto" if self.quality == "best" else "none"
        chosen = USUAL_MODES[precision] if self.compute_mode == "auto" else mode_for(precision, self.compute_mode)
        return LayerConfig(
            precision=precision,
            rank=RANKS[precision] if self.rank is None else self.rank,
            smoothing=self.smoothing,
            refinements=self.refinements,
            gptq=False if is_weight_only else self.gptq,
            seed=self.seed,
            mode=mode_for(precision, mode) if is_weight_only else chosen,
            quality=self.quality,
            rotation="none" if is_weight_only else self.rotation or automatic,
        )

    def rotation_of(self, name: str) -> int | None:
        """The size of the rotated groups of a layer of a saved model; None if it is not rotated."""
        pattern = next((pattern for pattern in self.rotated if fnmatchcase(name, pattern)), None)
        if pattern is None:
            return None
        return self.rotated[pattern] if isinstance(self.rotated, dict) else GROUP

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config from the output of `to_dict`. Fields that this version does not know are ignored with a warning.

        With `return_unused_kwargs` also returns the keyword arguments that are not fields.
        """
        known = {item.name for item in fields(cls) if item.init}
        values = config_dict | {key: value for key, value in kwargs.items() if key in known}
        if "layout" not in values and "quant_method" in values and "modules" not in values:
            values["layout"] = None  # every config that we saved has one of them
        if unknown := sorted(key for key in config_dict.keys() - known - {"quant_method"} if not key.startswith("_")):
            logger.warning(f"SVDQuantConfig does not know {unknown} and ignores them.")
        config = cls(**{key: value for key, value in values.items() if key in known})
        unused = {key: value for key, value in kwargs.items() if key not in known}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """All fields, in JSON types."""
        return asdict(self) | {"quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults."""
        defaults = SVDQuantConfig().to_dict()
        kept = ("quant_method", "layout")
        return {key: value for key, value in self.to_dict().items() if key in kept or value != defaults[key]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """As JSON."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"
