"""Tiny Nunchaku files, written by the formulas of the format from a 16-bit model, and what they ought to be read as.

`flux_file(model, precision)` and `sana_file` return the tensors of the file and the state dict of the 16-bit model
that the file stands for.
"""

import json
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from tests.loaders.nunchaku import nunchaku_formulas as formulas


DTYPE = torch.bfloat16
SHIFT = 0.171875
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
RANK = 20  # no multiple of 16
FILL = 1.0  # what the padding of scales and biases holds

Tensors = dict[str, Tensor]


class Quantized(NamedTuple):
    """A layer: the tensors of the file, the matrix that it stands for, its 4-bit part in fp64."""

    tensors: Tensors
    matrix: Tensor
    residual: Tensor


def flux(heads: int, head_dim: int, num_layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        num_layers=num_layers,
        num_single_layers=1,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(head_dim // 2, head_dim // 4, head_dim // 4),
    ).to(DTYPE)


def sana() -> torch.nn.Module:
    """5 heads, which are padded to 8; 400 channels of the feed-forward, which are padded to 448."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 5, "attention_head_dim": 32, "num_cross_attention_heads": 5}
    cross = {"cross_attention_head_dim": 32, "cross_attention_dim": 160}
    return diffusers.SanaTransformer2DModel(**tiny.TRANSFORMER | heads | cross | {"sample_size": 8}).to(DTYPE)


def quantize(
    weight: Tensor, bias: Tensor | None, precision: str, members: int = 1, shifted: bool = False
) -> Quantized:
    """SVDQuant with made-up smoothing factors; `members` layers lie in `weight` one below the other."""
    rows, columns = weight.shape
    smooth = (0.5 + torch.rand(columns)).to(DTYPE)
    smoothed = weight.float() * smooth.float()
    left, values, right = torch.linalg.svd(smoothed, full_matrices=False)
    up = (left[:, :RANK] * values[:RANK]).to(DTYPE)
    down = (right[:RANK] / smooth.float()).to(DTYPE)
    residual = smoothed - up.float() @ (down.float() * smooth.float())
    group = 64 if precision == "int4" else 16
    groups = torch.nn.functional.pad(residual, (0, -columns % group)).unflatten(1, (-1, group))
    amax = groups.abs().amax(-1)
    tensors = {}
    if precision == "int4":
        scales = (amax / 7).to(DTYPE)
        integers = (groups / scales.float()[..., None]).round().clamp(-7, 7)
        nibbles, decoded = integers.int() % 16, integers * scales.float()[..., None]
        padded = formulas.pad(scales, rows, formulas.ceil(columns, 128) // group, FILL)
        tensors["wscales"] = formulas.write_scales(padded, FILL)
    else:
        of_members = (amax.unflatten(0, (members, -1)).amax((1, 2)) / 6 / 448).to(DTYPE)
        of_rows = of_members.repeat_interleave(rows // members)
        scales = (amax / 6 / of_rows.float()[:, None]).to(torch.float8_e4m3fn)
        steps = (of_rows.float()[:, None] * scales.float())[..., None]
        index = ((groups / steps).abs()[..., None] - E2M1).abs().argmin(-1)
        nibbles, decoded = index + 8 * groups.signbit(), E2M1[index] * groups.sign() * steps
        tensors["wscales"] = formulas.write_micro_scales(scales, FILL)
        if members > 1:
            tensors["wcscales"] = formulas.write_vector(of_rows, FILL)
        else:
            tensors["wtscale"] = of_members
    tensors["qweight"] = formulas.write_codes(nibbles.flatten(1)[:, :columns].to(torch.uint8))
    tensors["smooth"] = formulas.write_vector(smooth, FILL)
    tensors["smooth_orig"] = tensors["smooth"]
    tensors["lora_down"] = formulas.write_down(down, FILL)
    tensors["lora_up"] = formulas.write_up(up, FILL)
    residual = decoded.flatten(1)[:, :columns].double() / smooth.double()
    if bias is not None:
        stored = bias.double() - SHIFT * residual.sum(1) if shifted else bias
        tensors["bias"] = formulas.write_vector(stored.to(DTYPE), FILL)
    return Quantized(tensors, (residual + up.double() @ down.double()).float(), residual)


def quantize_adaln(weight: Tensor, bias: Tensor, splits: int, point: float = 7) -> tuple[Tensors, Tensor, Tensor]:
    """Tensors of the file, and the weight and bias that they stand for."""
    rows = weight.shape[0]
    groups = weight.float().unflatten(1, (-1, 64))
    scales = (groups.abs().amax(-1) / 7).to(DTYPE)
    codes = (groups / scales.float()[..., None]).round()
    zeros = (-point * scales.float()).to(DTYPE)
    matrix = (codes * scales.float()[..., None]).flatten(1)
    channels = rows // splits
    stored = bias.float().clone()
    for split in {1, splits - 2}:
        stored[split * channels : (split + 1) * channels] += 1
    stored = stored.to(DTYPE)
    true_bias = stored.float()
    for split in {1, splits - 2}:
        true_bias[split * channels : (split + 1) * channels] -= 1

    interleaved = torch.tensor([split * channels + i for i in range(channels) for split in range(splits)])
    spare = torch.zeros(-scales.shape[1] % 16, rows, dtype=DTYPE)
    tensors = {
        "qweight": formulas.write_awq((codes + 7).flatten(1).to(torch.uint8)[interleaved]),
        "wscales": torch.cat([scales[interleaved].t(), spare]),
        "wzeros": torch.cat([zeros[interleaved].t(), spare]),
        "bias": stored[interleaved],
    }
    return tensors, matrix, true_bias


class _File:
    """A file in the making: its tensors, and the 16-bit state dict that it stands for."""

    def __init__(self, model: torch.nn.Module, precision: str) -> None:
        self.precision = precision
        self.original = model.state_dict()
        self.rest = dict(self.original)  # what is in the file under its own name
        self.tensors: Tensors = {}
        self.meant: Tensors = {}

    def add(self, name: str, tensors: Tensors) -> None:
        self.tensors |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}

    def take(self, key: str) -> Tensor:
        return self.rest.pop(key)

    def quantize(self, name: str, layers: list[str], columns: slice = slice(None), **options: bool) -> Quantized:
        """Layers one below the other, their biases too."""
        weights = [self.original[f"{layer}.weight"].flatten(1)[:, columns] for layer in layers]
        biases = [self.original[f"{layer}.bias"] for layer in layers if f"{layer}.bias" in self.original]
        bias = torch.cat(biases) if biases and columns.start != 0 else None
        quantized = quantize(torch.cat(weights), bias, self.precision, len(layers), **options)
        self.add(name, quantized.tensors)
        return quantized

    def plain(self, name: str, layers: list[str], shifted: bool = False) -> None:
        quantized = self.quantize(name, layers, shifted=shifted)
        for layer, matrix in zip(layers, quantized.matrix.chunk(len(layers)), strict=True):
            weight = self.take(f"{layer}.weight")
            self.meant[f"{layer}.weight"] = matrix.reshape(weight.shape)
            if f"{layer}.bias" in self.rest:
                self.meant[f"{layer}.bias"] = meant_bias(self.take(f"{layer}.bias"), quantized, shifted)

    def finish(self) -> tuple[Tensors, Tensors]:
        self.tensors |= self.rest
        self.meant |= {key: tensor.float() for key, tensor in self.rest.items()}
        return self.tensors, {key: self.meant[key].float() for key in self.original}


def meant_bias(bias: Tensor, quantized: Quantized, shifted: bool) -> Tensor:
    """The bias after its way through the file, where it is 16 bit with the shift in it."""
    offset = SHIFT * quantized.residual.sum(1) if shifted else 0.0
    return ((bias.double() - offset).to(DTYPE).double() + offset).float()


def flux_file(model: torch.nn.Module, precision: str) -> tuple[Tensors, Tensors]:
    file, shift = _File(model, precision), precision == "int4"
    for i in range(2):
        block = f"transformer_blocks.{i}"
        attn = f"{block}.attn"
        file.plain(f"{block}.qkv_proj", [f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"])
        file.plain(f"{block}.qkv_proj_context", [f"{attn}.add_{x}_proj" for x in "qkv"])
        file.plain(f"{block}.out_proj", [f"{attn}.to_out.0"])
        file.plain(f"{block}.out_proj_context", [f"{attn}.to_add_out"])
        file.plain(f"{block}.mlp_fc1", [f"{block}.ff.net.0.proj"])
        file.plain(f"{block}.mlp_fc2", [f"{block}.ff.net.2"], shift)
        file.plain(f"{block}.mlp_context_fc1", [f"{block}.ff_context.net.0.proj"])
        file.plain(f"{block}.mlp_context_fc2", [f"{block}.ff_context.net.2"], shift)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            _norm(file, block, norm)
        _adaln(file, f"{block}.norm1.linear", 6)
        _adaln(file, f"{block}.norm1_context.linear", 6)
    block = "single_transformer_blocks.0"
    file.plain(f"{block}.qkv_proj", [f"{block}.attn.to_{x}" for x in "qkv"])
    file.plain(f"{block}.mlp_fc1", [f"{block}.proj_mlp"])
    width = model.inner_dim
    name = f"{block}.proj_out"
    first = file.quantize(f"{block}.out_proj", [name], slice(0, width))
    second = file.quantize(f"{block}.mlp_fc2", [name], slice(width, None), shifted=shift)
    file.take(f"{name}.weight")
    file.meant[f"{name}.weight"] = torch.cat([first.matrix, second.matrix], dim=1)
    file.meant[f"{name}.bias"] = meant_bias(file.take(f"{name}.bias"), second, shift)
    _norm(file, block, "norm_q")
    _norm(file, block, "norm_k")
    _adaln(file, f"{block}.norm.linear", 3)
    return file.finish()


def _norm(file: _File, block: str, name: str) -> None:
    weight = file.take(f"{block}.attn.{name}.weight")
    file.tensors[f"{block}.{name}.weight"] = weight
    file.meant[f"{block}.attn.{name}.weight"] = weight


def _adaln(file: _File, name: str, splits: int) -> None:
    tensors, matrix, bias = quantize_adaln(file.take(f"{name}.weight"), file.take(f"{name}.bias"), splits)
    file.add(name, tensors)
    file.meant |= {f"{name}.weight": matrix, f"{name}.bias": bias}


def sana_file(model: torch.nn.Module, precision: str) -> tuple[Tensors, Tensors]:
    file = _File(model, precision)
    for i in range(2):
        block = f"transformer_blocks.{i}"
        _sana_attention(file, f"{block}.attn.qkv_proj", f"{block}.attn1")
        file.plain(f"{block}.attn.out_proj", [f"{block}.attn1.to_out.0"])
        file.plain(f"{block}.cross_attn.q_linear", [f"{block}.attn2.to_q"])
        file.plain(f"{block}.cross_attn.out_proj", [f"{block}.attn2.to_out.0"])
        file.plain(f"{block}.ff.point_conv", [f"{block}.ff.conv_point"])
        for part in ("weight", "bias"):
            names = [f"{block}.attn2.to_{x}.{part}" for x in "kv"]
            file.tensors[f"{block}.cross_attn.kv_linear.{part}"] = torch.cat([file.rest[name] for name in names])
            file.meant |= {name: file.take(name) for name in names}
        _sana_convolution(file, f"{block}.ff")
    return file.finish()


def _sana_attention(file: _File, name: str, attn: str) -> None:
    """8 heads of 32 rows for 5: queries, then each head's keys and values."""
    parts = {}
    for x in "qkv":
        parts[x] = torch.zeros(8, 32, 160, dtype=DTYPE)
        parts[x][:5] = file.take(f"{attn}.to_{x}.weight").reshape(5, 32, 160)
    rows = [*parts["q"], *(parts[x][head] for head in range(8) for x in "kv")]
    quantized = quantize(torch.cat(rows), None, file.precision)
    file.add(name, quantized.tensors)
    blocks = quantized.matrix.split(32)
    file.meant[f"{attn}.to_q.weight"] = torch.cat(blocks[:5])
    file.meant[f"{attn}.to_k.weight"] = torch.cat([blocks[8 + 2 * head] for head in range(5)])
    file.meant[f"{attn}.to_v.weight"] = torch.cat([blocks[9 + 2 * head] for head in range(5)])


def _sana_convolution(file: _File, ff: str) -> None:
    """448 channels for 400, values and gates by turns."""
    keys = [
        f"{ff}.conv_inverted.weight",
        f"{ff}.conv_inverted.bias",
        f"{ff}.conv_depth.weight",
        f"{ff}.conv_depth.bias",
    ]
    mixed = []
    for key in keys:
        tensor = file.take(key).squeeze() if "inverted" in key else file.take(key)
        out = torch.zeros(896, *tensor.shape[1:], dtype=DTYPE)
        for i in range(400):
            out[2 * i], out[2 * i + 1] = tensor[i], tensor[400 + i]
        mixed.append(out)
    quantized = quantize(mixed[0], mixed[1], file.precision)
    file.add(f"{ff}.inverted_conv", quantized.tensors)
    file.tensors[f"{ff}.depth_conv.weight"] = mixed[2].permute(0, 2, 3, 1).contiguous()
    file.tensors[f"{ff}.depth_conv.bias"] = mixed[3]
    order = [*range(0, 800, 2), *range(1, 800, 2)]
    meant = [quantized.matrix[:, :, None, None], *mixed[1:]]
    file.meant |= {key: tensor[order] for key, tensor in zip(keys, meant, strict=True)}


def write(path: Path, tensors: Tensors, model: torch.nn.Module, **metadata: str) -> Path:
    """A file with the header that Nunchaku writes."""
    name = type(model).__name__
    header = {"config": model.to_json_string(), "model_class": f"Nunchaku{name}"}
    header["quantization_config"] = json.dumps({"method": "svdquant", "rank": 32})
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(tensors, path, {key: value for key, value in (header | metadata).items() if value})
    return path
