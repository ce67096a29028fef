"""Which layers of a model are quantized, by class and name: no model is known here by its class.

A target is a linear layer or an ungrouped 1x1 convolution inside a repeated block (a numbered child of a list), where
nearly all the weights are. The ends of a model, embeddings and output layers, stay 16 bit: they are small, and errors
there reach everything.

    w4a16   adaLN projections, in the blocks or shared by them: they see one row a sample
            keys and values of cross-attention: their input is the text, once a prompt
    16 bit  everything in a convolutional residual block, and the ends of a U-Net's attention stages
    w4a4    all others in the blocks

Where 16-bit activations cost nothing, activations are left alone. So they are in text encoders, which run once a
prompt and have outliers that 4 bits do not hold: everything there is w4a16.

A model may publish `_svdquant_modules`, a dictionary like `SVDQuantConfig.modules`, to say so itself.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig


IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
ADALN = re.compile(r"(^|\.)(norm\w*\.linear|(img|txt)_mod\.\d+|adaLN_modulation\.\d+|\w*modulation\w*\.(linear|lin))$")
SHARED_ADALN = re.compile(r"^(time_embed|adaln_single)\.linear$")  # of Sana and of PixArt
OF_THE_TEXT = re.compile(r"(^|\.)attn2\.(to_k|to_v|add_k_proj|add_v_proj)$")
KEPT = re.compile(r"(^|\.)((resnets|upsamplers|downsamplers|embeddings?)\.|attentions\.\d+\.proj_(in|out)$)")
# Layers that share their input: what they are quantized with is chosen for all of them together. The queries of
# cross-attention have an input of their own.
SIBLINGS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("q_proj", "k_proj", "v_proj"))
CROSS_SIBLINGS = (("to_k", "to_v"), ("add_k_proj", "add_v_proj"))


def is_quantizable(module: nn.Module) -> bool:
    """Whether it is a linear layer or an ungrouped 1x1 convolution, of the stock class or derived from it."""
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
    """What the rules above say of a layer of that name: "w4a4", "w4a16", or None to leave it."""
    if SHARED_ADALN.search(name):
        return "w4a16"
    if not IN_A_BLOCK.search(name) or KEPT.search(name):
        return None
    return "w4a16" if ADALN.search(name) or OF_THE_TEXT.search(name) else "w4a4"


def find_targets(model: nn.Module, config: SVDQuantConfig) -> dict[str, str]:
    """The layers to quantize, by name in the model's order, each with "w4a4" or "w4a16".

    Works on the meta device.

    Raises:
        ValueError: a pattern that matches no layer, a rank above what a layer can have, or no layer at all.
    """
    candidates = {name: module for name, module in model.named_modules() if is_quantizable(module)}
    patterns = config.modules or getattr(model, "_svdquant_modules", None)
    if patterns is None:
        modes = {name: default_mode(name) for name in candidates}
        if hasattr(model, "get_input_embeddings"):  # of tokens: a model of transformers
            modes = {name: mode and "w4a16" for name, mode in modes.items()}
    else:
        _check_patterns("modules", patterns, candidates, fnmatchcase)
        modes = {name: next((patterns[p] for p in patterns if fnmatchcase(name, p)), None) for name in candidates}
    in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or []
    kept = [*config.modules_to_not_convert, *([in_fp32] if isinstance(in_fp32, str) else in_fp32)]
    _check_patterns("modules_to_not_convert", config.modules_to_not_convert, dict(model.named_modules()), _is_in)
    targets = {
        name: mode for name, mode in modes.items() if mode is not None and not any(_is_in(name, p) for p in kept)
    }
    if not targets:
        raise ValueError(
            f"no layer of {type(model).__name__} is to be quantized. `modules` must name linear layers or 1x1 "
            f"convolutions; it has {len(candidates)}, among them {sorted(candidates)[:3]}."
        )
    for name in targets:
        most = min(weight_shape(candidates[name]))
        if config.rank > most:
            raise ValueError(
                f"`rank` must be at most {most}, the smaller side of layer {name!r}, got {config.rank}. Lower it, or "
                "leave the layer out with `modules_to_not_convert`."
            )
    return targets


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Output and input features of a linear layer or a 1x1 convolution."""
    shape = cast(Tensor, module.weight).shape
    return shape[0], shape[1]


def as_patterns(targets: dict[str, str], model: nn.Module) -> dict[str, str]:
    """`SVDQuantConfig.modules` for these targets, short: `*` for the number of a block where that says the same."""
    candidates = [
        name for name, module in model.named_modules() if is_quantizable(module) or hasattr(module, "qweight")
    ]
    patterns: dict[str, str] = {}
    for name, mode in targets.items():
        general = re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)
        matched = [candidate for candidate in candidates if fnmatchcase(candidate, general)]
        patterns[general if all(targets.get(candidate) == mode for candidate in matched) else name] = mode
    return patterns


def sibling_groups(targets: Mapping[str, str]) -> list[list[str]]:
    """The names of targets in groups that share their input and their mode; most groups have one member."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, mode in targets.items():
        parent, _, leaf = name.rpartition(".")
        families = CROSS_SIBLINGS if parent.endswith("attn2") else SIBLINGS
        family = next((siblings for siblings in families if leaf in siblings), None)
        key = name if family is None else f"{parent}.{family[0]}"
        groups.setdefault((key, mode), []).append(name)
    return list(groups.values())


def _is_in(name: str, pattern: str) -> bool:
    """Whether a module is meant by a pattern: the module itself, one inside it, or one so named anywhere."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") or pattern in name.split(".")


def _check_patterns(
    argument: str, patterns: Iterable[str], names: Iterable[str], matches: Callable[[str, str], bool]
) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"`{argument}` must name layers of the model; {pattern!r} matches none. Names look like "
                f"{[name for name in names if IN_A_BLOCK.search(name)][:3]}; `*` stands for anything."
            )
