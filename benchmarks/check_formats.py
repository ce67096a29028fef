"""Quantized files that this package writes, opened by the other runtimes' own packages on a CPU, and theirs by ours.

    python -m benchmarks.check_formats [WORD]

Runs with the packages that are installed: `pip install --no-deps comfy-kitchen cache-dit auto-round nvidia-modelopt
sdnq`, best in an environment of their own. Each row compares weights in fp32: the relative difference between what the
other package makes of a file, or of a layer's tensors, and what this package's layer is. With a word, only checks that
contain it run, and the other rows are kept. Writes
`benchmarks/results/<device>/formats.json`, which the table in docs/quantization.md shows.
"""

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana.files import read_json
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.loaders.nunchaku.layers import read_svdq
from diffusers_sana.loaders.nunchaku.packing import pack_down, pack_up, pack_vector
from diffusers_sana.loaders.quantized.comfy_convrot import read_float8, read_w4a8, write
from diffusers_sana.loaders.quantized.hub import export_quantized, load_quantized
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer, SVDQuantLinear


DTYPE = torch.bfloat16
PACKAGES = ("comfy-kitchen", "cache-dit", "auto-round", "nvidia-modelopt", "sdnq")
NAME = "transformer_blocks.0.attn.to_add_out"


def model(width: int = 256) -> nn.Module:
    """A tiny FLUX with sides that are multiples of `width`, not of 128 for 192."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(32, 16, 16),
    )


def quantized(precision: str, rank: int = 16, width: int = 256) -> nn.Module:
    """The model with SVDQuant layers in fp32 or, where files need it, bf16."""
    result = model(width).to(DTYPE)
    quantize(result, SVDQuantConfig(precision=precision, rank=rank), progress=False)
    for layer in layers(result).values():  # factors that differ between channels
        generator = torch.Generator().manual_seed(0)
        factors = 0.5 + torch.rand(layer.smooth_factor.shape, generator=generator)
        layer.smooth_factor.data.mul_(factors.to(DTYPE))
        layer.input_scale = 1.0
    return result


def layers(source: nn.Module) -> dict[str, SVDQuantLayer]:
    """Layers with quantized activations."""
    found = {name: part for name, part in source.named_modules() if isinstance(part, SVDQuantLayer)}
    return {name: part for name, part in found.items() if not part.is_weight_only}


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative, of matrices."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@contextmanager
def folder() -> Iterator[Path]:
    """One that is removed again."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def written(source: nn.Module, to: str, **options: Any) -> dict[str, Tensor]:
    """The tensors of a file or folder in another format."""
    with folder() as place:
        path = export_quantized(source, place / "out", to, **options)
        path = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
        return load_file(path)


def comfy_svdquant(tiled: bool) -> float:
    """comfy-kitchen's `dequantize` of an SVDQuant layer, in rows or in tiles."""
    from comfy_kitchen.tensor.svdquant_w4a4 import TensorCoreSVDQuantW4A4Layout as Layout

    source = quantized("int4")
    tensors = written(source, "comfy", tiled=tiled, requantize=True)
    name, layer = "double_blocks.0.txt_attn.proj", layers(source)[NAME]
    style = f"{name}." if tiled else f"{name}.weight_"
    params = Layout.Params(
        scale=tensors[f"{name}.weight_scale"].float(),
        orig_dtype=torch.float32,
        orig_shape=(256, 256),
        proj_down=tensors[f"{style}proj_down"].float(),
        proj_up=tensors[f"{style}proj_up"].float(),
        smooth_factor=tensors[f"{style}smooth_factor"].float(),
    )
    return difference(Layout.dequantize(tensors[f"{name}.weight"], params), layer.dequantize(torch.float32))


def comfy_nvfp4() -> float:
    """comfy-kitchen's `dequantize` of an nvfp4 layer without a branch, times the factor of the input."""
    from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout as Layout

    source = quantized("nvfp4", rank=0)
    tensors = written(source, "comfy", requantize=True)
    name, layer = "double_blocks.0.txt_attn.proj", layers(source)[NAME]
    params = Layout.Params(
        scale=tensors[f"{name}.weight_scale_2"],
        orig_dtype=torch.float32,
        orig_shape=(256, 256),
        block_scale=tensors[f"{name}.weight_scale"],
    )
    weight = Layout.dequantize(tensors[f"{name}.weight"], params) * tensors[f"{name}.pre_quant_scale"]
    return difference(weight, layer.dequantize(torch.float32))


def comfy_rotated(num_bits: int) -> float:
    """comfy-kitchen's `dequantize` of rotated weights, against what we read from the same file."""
    from comfy_kitchen.tensor.convrot_w4a4 import TensorCoreConvRotW4A4Layout
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout

    source = quantized("int4")
    with folder() as place:
        model().save_pretrained(place / "base")
        path = export_quantized(source, place / "out", "comfy-convrot", num_bits=num_bits)
        tensors = load_file(path)
        ours = load_quantized(path, base=place / "base", dtype=torch.float32).get_submodule(NAME).weight
    name = "double_blocks.0.txt_attn.proj"
    common = {"orig_dtype": torch.float32, "orig_shape": (256, 256), "convrot_groupsize": 256}
    layout: Any = TensorWiseINT8Layout if num_bits == 8 else TensorCoreConvRotW4A4Layout
    options = {"convrot": True} if num_bits == 8 else {}
    params = layout.Params(scale=tensors[f"{name}.weight_scale"], **common, **options)
    return difference(layout.dequantize(tensors[f"{name}.weight"], params), ours)


def comfy_int8_product() -> float:
    """The output of comfy-kitchen's int8 layer, rotated, against that of the layer that we read from the same file.

    Ours is computed by its formula, because processors without VNNI round weights once more.
    """
    from comfy_kitchen.backends.eager.quantization import int8_linear

    source = quantized("int4")
    with folder() as place:
        model().save_pretrained(place / "base")
        path = export_quantized(source, place / "out", "comfy-convrot")
        tensors = load_file(path)
        layer = load_quantized(path, base=place / "base", dtype=torch.float32).get_submodule(NAME)
    name, x = "double_blocks.0.txt_attn.proj", torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    theirs = int8_linear(
        x, tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], out_dtype=torch.float32, convrot=True
    )
    ours = UnpackedLayer.of(layer).to_quantized_weight(torch.float32)  # type: ignore[arg-type]
    return difference(theirs, ours.output(x, "w8a8"))


def comfy_rotated_codes() -> float:
    """The share of codes of `convrot_w4a4` in which comfy-kitchen's own quantizer differs."""
    from comfy_kitchen.tensor.convrot_w4a4 import quantize_convrot_w4a4_weight

    from diffusers_sana.loaders.quantized.comfy_convrot import encode

    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    theirs, scale = quantize_convrot_w4a4_weight(weight, 256)[:2]
    _, ours = encode(weight, 4)
    assert torch.allclose(scale.flatten(), ours["weight_scale"].flatten())
    return (theirs.view(torch.uint8) != ours["weight"].view(torch.uint8)).float().mean().item()


def comfy_w4a8() -> float:
    """comfy-kitchen's `dequantize` of a weight that its quantizer made, against what we read from the same tensors."""
    from comfy_kitchen import dequantize_w4a8_int8_weight, quantize_w4a8_int8_weight

    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    codes, relative, rows, codebook, _ = quantize_w4a8_int8_weight(weight)
    parts = {"weight": codes, "weight_s_rel": relative, "weight_s_channel": rows, "weight_codebook": codebook}
    tensors = {f"x.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    ours = read_w4a8(Source(tensors, "comfy-kitchen"), "x", *weight.shape, {"convrot_groupsize": 256})
    theirs = dequantize_w4a8_int8_weight(codes, relative, rows, codebook, output_dtype=torch.float32)
    return difference(ours.matrix(), theirs)


def comfy_float8() -> float:
    """comfy-kitchen's `dequantize` of a layer that we read from its own tensors and wrote again."""
    from comfy_kitchen.tensor.fp8 import TensorCoreFP8Layout as Layout

    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    codes, params = Layout.quantize(weight)
    source = Source({"x.weight": codes, "x.weight_scale": params.scale}, "comfy-kitchen")
    ours = read_float8(source, "x", *weight.shape, {})
    _, parts = write(ours)
    assert torch.equal(as_bytes(parts["weight"]), as_bytes(codes)), "other bytes"
    again = Layout.Params(scale=parts["weight_scale"], orig_dtype=torch.float32, orig_shape=tuple(weight.shape))
    return difference(Layout.dequantize(parts["weight"], again), ours.matrix())


def comfy_float8_product() -> float:
    """comfy-kitchen's float8 product of its own quantized input, against our layer's in f8a8: one token."""
    from comfy_kitchen.tensor.base import QuantizedTensor
    from comfy_kitchen.tensor.fp8 import TensorCoreFP8Layout as Layout

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 512, generator=generator), torch.randn(256, 512, generator=generator)
    codes, params = Layout.quantize(weight)
    theirs = torch.nn.functional.linear(
        QuantizedTensor.from_float(x, "TensorCoreFP8Layout"), QuantizedTensor(codes, "TensorCoreFP8Layout", params)
    )
    source = Source({"x.weight": codes, "x.weight_scale": params.scale}, "comfy-kitchen")
    item = read_float8(source, "x", *weight.shape, {})
    return difference(theirs, SVDQuantLinear(item.to_quantized_weight(torch.float32), None, "w8a8")(x))


def comfy_int4_product() -> float:
    """The output of a layer in w4a4 with comfy-kitchen's product, against that with our reference."""
    layer = layers(quantized("int4"))[NAME]
    layer.set_compute_mode("w4a4")
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    with torch.no_grad(), kernel_mode("torch"):
        ours = layer(x)
    with torch.no_grad(), kernel_mode("comfy-kitchen"):
        theirs = layer(x)
    assert not torch.equal(ours, theirs), "the product was refused"
    return difference(theirs, ours)


def cache_dit(precision: str, width: int) -> float:
    """`load_svdq` of cache-dit takes the file, strictly; the tensors of its modules are those of the file."""
    from cache_dit.quantization.svdquant.ptq import load_svdq

    source = quantized(precision, width=width)
    with folder() as place:
        path = export_quantized(source, place / "out", "cache-dit")
        theirs = load_svdq(model(width).to(DTYPE), str(path))
        tensors = load_file(path)
        model(width).save_pretrained(place / "base")
        again = load_quantized(path, base=place / "base")
    state = theirs.state_dict()
    wrong = [key for key, tensor in tensors.items() if not torch.equal(as_bytes(state[key]), as_bytes(tensor))]
    assert not wrong, wrong
    return max(
        difference(again.get_submodule(name).dequantize(torch.float32), layer.dequantize(torch.float32))  # type: ignore[operator]
        for name, layer in layers(source).items()
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """e4m3 as bytes, which can be compared."""
    return tensor.contiguous().view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def auto_round() -> float:
    """What auto-round's packer of MXFP4 has written, read by us, against its own unpacker."""
    from auto_round.export.svdquant_mxfp4 import NunchakuMXFP4Packer, pack_lowrank_weight

    generator = torch.Generator().manual_seed(0)
    rows, columns, rank = 256, 512, 16
    weight = torch.randn(rows, columns, generator=generator)
    down, up = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    packer = NunchakuMXFP4Packer()
    packed = packer.pack_residual(weight)
    tensors = {
        "x.qweight": packed.qweight,
        "x.wscales": packed.wscales,
        "x.smooth": pack_vector(torch.ones(columns), padding=1),
        "x.lora_down": pack_lowrank_weight(down.to(DTYPE), down=True),
        "x.lora_up": pack_lowrank_weight(up.to(DTYPE), down=False),
    }
    assert torch.equal(tensors["x.lora_down"].flatten(), pack_down(down.to(DTYPE)).flatten())
    assert torch.equal(tensors["x.lora_up"].flatten(), pack_up(up.to(DTYPE)).flatten())
    ours = read_svdq(Source(tensors, "auto-round"), "x", rows, columns).matrix()
    theirs = packer.unpack_residual(packed.qweight, packed.wscales, (rows, columns))
    return difference(ours, theirs + up.to(DTYPE).float() @ down.to(DTYPE).float())


def model_opt() -> float:
    """ModelOpt's `dequantize` of the residual, and its branch beside it, both times the factor of the input."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    source = quantized("nvfp4")
    tensors = written(source, "modelopt")
    part = {key.removeprefix(f"{NAME}."): tensor for key, tensor in tensors.items() if key.startswith(f"{NAME}.")}
    tensor = NVFP4QTensor(torch.Size((256, 256)), torch.float32, part["weight"])
    residual = tensor.dequantize(
        torch.float32, scale=part["weight_scale"], double_scale=part["weight_scale_2"], block_sizes={-1: 16}
    )
    branch = part["svdquant_lora_b"].float() @ part["svdquant_lora_a"].float()
    weight = (residual + branch) * part["pre_quant_scale"].float()
    return difference(weight, layers(source)[NAME].dequantize(torch.float32))


def sdnq(use_quantized_matmul: bool) -> float:
    """A model that SDNQ has saved, read by us, against what its own loader computes for the same input."""
    from sdnq import load_sdnq_model, save_sdnq_model, sdnq_post_load_quant

    class_ = diffusers.FluxTransformer2DModel
    options = {"weights_dtype": "int4", "use_svd": True, "svd_rank": 16, "group_size": 64}
    options |= {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0}
    theirs: Any = sdnq_post_load_quant(model(), use_quantized_matmul=use_quantized_matmul, **options)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    with folder() as place:
        save_sdnq_model(theirs, str(place / "sdnq"))
        ours = load_quantized(place / "sdnq", dtype=torch.float32)
        again = load_sdnq_model(str(place / "sdnq"), model_cls=class_)
    x = torch.eye(256)
    layer = ours.get_submodule(NAME)
    other = again.get_submodule(NAME)
    bias = other.bias.float() if other.bias is not None else 0.0
    # With `use_quantized_matmul` its weight is rounded to 8 bits for the product, by about .005.
    return difference(layer.dequantize(torch.float32), (other(x.to(other.bias.dtype)).float() - bias).t())


CHECKS: dict[str, tuple[str, Callable[[], float]]] = {
    "comfy: svdquant_w4a4, rows": ("comfy-kitchen", lambda: comfy_svdquant(False)),
    "comfy: svdquant_w4a4, tiles": ("comfy-kitchen", lambda: comfy_svdquant(True)),
    "comfy: nvfp4": ("comfy-kitchen", comfy_nvfp4),
    "comfy-convrot: int8_tensorwise": ("comfy-kitchen", lambda: comfy_rotated(8)),
    "comfy-convrot: product of int8_tensorwise": ("comfy-kitchen", comfy_int8_product),
    "comfy-convrot: convrot_w4a4": ("comfy-kitchen", lambda: comfy_rotated(4)),
    "comfy-convrot: share of other codes": ("comfy-kitchen", comfy_rotated_codes),
    "comfy: asym_w4a8_int8, read": ("comfy-kitchen", comfy_w4a8),
    "comfy: float8_e4m3fn, read and written": ("comfy-kitchen", comfy_float8),
    "comfy: product of float8_e4m3fn": ("comfy-kitchen", comfy_float8_product),
    "mode comfy-kitchen: int4 product in bf16": ("comfy-kitchen", comfy_int4_product),
    "cache-dit: int4": ("cache-dit", lambda: cache_dit("int4", 256)),
    "cache-dit: int4, side 192": ("cache-dit", lambda: cache_dit("int4", 192)),
    "cache-dit: nvfp4, side 192": ("cache-dit", lambda: cache_dit("nvfp4", 192)),
    "auto-round: MXFP4, read": ("auto-round", auto_round),
    "modelopt: NVFP4_SVD": ("nvidia-modelopt", model_opt),
    "sdnq: int4 + svd, read": ("sdnq", lambda: sdnq(False)),
    "sdnq: the same with its 8-bit product, read": ("sdnq", lambda: sdnq(True)),
}


def main() -> None:
    """Runs all checks whose packages are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    word, file = "".join(sys.argv[1:]), RESULTS / "cpu" / "formats.json"
    before = {row["check"]: row for row in read_json(file)["rows"]} if word else {}
    rows = []
    for check, (package, run) in CHECKS.items():
        if word not in check and check in before:
            rows.append(before[check])
            continue
        if package not in versions or word not in check:
            continue
        try:
            row = {"check": check, "package": f"{package} {versions[package]}", "difference": run()}
        except Exception as error:
            reason = str(error).splitlines()[0][:160] if str(error) else ""
            row = {
                "check": check,
                "package": f"{package} {versions[package]}",
                "failed": f"{type(error).__name__}: {reason}",
            }
        rows.append(row)
        print(row, flush=True)
    write_results("formats", {**environment(), "command": "python -m benchmarks.check_formats", "rows": rows})


if __name__ == "__main__":
    main()
