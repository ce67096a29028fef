"""Tiny models of several families in bf16, quantized by this package."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusers_sana.loaders.quantized.comfy import with_markers
from diffusers_sana.loaders.quantized.hub import load_quantized
from diffusers_sana.loaders.quantized.layer import UnpackedLayer
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer
from diffusers_sana.quantizers.svdquant.targets import find_targets
from tests.loaders.nunchaku import nunchaku_files as files
from tests.quantizers.tiny_models import SDXL, make


DTYPE = torch.bfloat16


def flux() -> torch.nn.Module:
    return files.flux(2, 64, 1)


def sana() -> torch.nn.Module:
    return files.sana()


def qwen() -> torch.nn.Module:
    return make(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
    ).to(DTYPE)


def z_image() -> torch.nn.Module:
    return make(
        "ZImageTransformer2DModel",
        dim=192,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[32, 32, 32],
        axes_lens=[64, 32, 32],
        in_channels=4,
    ).to(DTYPE)


def sdxl() -> torch.nn.Module:
    return make("UNet2DConditionModel", **SDXL, block_out_channels=(32, 64)).to(DTYPE)


FAMILIES = {"flux": flux, "sana": sana, "qwen": qwen, "z_image": z_image, "sdxl": sdxl}


@cache
def quantized(family: str, precision: str = "int4", rank: int = 16, excluded: tuple[str, ...] = ()) -> torch.nn.Module:
    """Never to be changed: it is shared by tests."""
    model = FAMILIES[family]()
    config = SVDQuantConfig(
        precision=precision, rank=rank, smoothing="none", refinements=0, modules_to_not_convert=list(excluded)
    )
    quantize(model, config, progress=False)
    for layer in layers(model).values():
        if not layer.is_weight_only:  # factors that differ between channels, but not between layers with one input
            generator = torch.Generator().manual_seed(0)
            layer.smooth_factor.data.mul_(0.5 + torch.rand(layer.smooth_factor.shape, generator=generator).to(DTYPE))
    return model


def float8_tensors(model: torch.nn.Module, per_row: bool) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """A model as ComfyUI stores it in float8, in the names of diffusers: tensors and formats."""
    tensors, formats = dict(model.state_dict()), {}
    for name in find_targets(model, SVDQuantConfig(rank=0)):
        weight = tensors.pop(f"{name}.weight").float()
        if weight.dim() != 2:
            tensors[f"{name}.weight"] = weight.to(DTYPE)
            continue
        scale = weight.abs().amax(1, keepdim=True) / 448 if per_row else weight.abs().amax() / 448
        tensors |= {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}
        formats[name] = {"format": "float8_e4m3fn"}
        if name.startswith("transformer_blocks"):
            if "attn." in name or "attn1" in name:
                tensors[f"{name}.input_scale"] = torch.tensor(0.3)
            else:
                formats[name]["full_precision_matrix_mult"] = True
    return tensors, formats


def float8(model: torch.nn.Module, path: Path, per_row: bool = False, **options: Any) -> torch.nn.Module:
    """The model with float8 layers, read from a file of ComfyUI at `path`, with its original at `path / base`."""
    model.save_pretrained(path / "base")
    written = with_markers(*float8_tensors(model, per_row))
    save_file({key: value.contiguous() for key, value in written.tensors.items()}, path / "float8.safetensors")
    return load_quantized(path / "float8.safetensors", base=path / "base", **options)


def layers(model: torch.nn.Module) -> dict[str, SVDQuantLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SVDQuantLayer)}


def unpacked(model: torch.nn.Module) -> dict[str, UnpackedLayer]:
    return {name: UnpackedLayer.of(layer) for name, layer in layers(model).items()}


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def assert_equal_state(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Every tensor, bit for bit."""
    state = actual.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert (state[key].dtype, state[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(as_bytes(state[key]), as_bytes(tensor)), key
