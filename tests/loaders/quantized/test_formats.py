"""Each format by its formulas: what a layer in a file stands for, and where its elements are."""

import json
from dataclasses import replace

import pytest
import torch

from diffusers_sana.kernels.low_bit import decode_e2m1, decode_int4, swizzled
from diffusers_sana.loaders.nunchaku import mxfp4
from diffusers_sana.loaders.nunchaku.layers import read_svdq
from diffusers_sana.loaders.quantized import comfy, comfy_convrot, modelopt, sdnq, vllm_omni
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.loaders.quantized.rows import pairs
from tests.loaders.nunchaku import nunchaku_formulas as formulas
from tests.numerics import assert_close_fp32, relative_error


N, K, R = 256, 192, 16


def unpacked(precision, rows=N, columns=K, rank=R):
    torch.manual_seed(0)
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8)
    scales = 0.5 + torch.rand(rows, columns // (64 if precision == "int4" else 16))
    return UnpackedLayer(
        codes,
        scales if precision == "int4" else scales.to(torch.float8_e4m3fn),
        None if precision == "int4" else 2.0 ** torch.randint(-3, 3, (rows,)),
        0.5 + torch.rand(columns),
        torch.randn(rank, columns),
        torch.randn(rows, rank),
        torch.randn(rows),
    )


def source(tensors, base=None):
    return Source({f"x.{name}": tensor for name, tensor in tensors.items()}, "a file", base)


def pair(packed, low_first=True):
    """Bytes to nibbles, one k at a time."""
    out = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.uint8)
    for k in range(out.shape[1]):
        byte = packed.view(torch.uint8)[:, k // 2]
        out[:, k] = byte & 15 if (k % 2 == 0) == low_first else byte >> 4
    return out


def residual(nibbles, scales, group):
    """Numbers of codes and scales, before any other factor."""
    numbers = decode_e2m1(nibbles) if group == 16 else decode_int4(nibbles).float()
    return numbers * scales.float().repeat_interleave(group, 1)


def test_vllm_omni():
    layer = unpacked("nvfp4")
    tensors = {
        "qweight": pairs(layer.codes).view(torch.int8),
        "wscales": layer.scales.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn),
        "wcscales": layer.row_scales / 2,
        "wtscale": torch.full((1,), 2.0),
        "smooth_factor": layer.smooth,
        "proj_down": layer.down.t().contiguous(),
        "proj_up": layer.up,
        "bias": layer.bias,
    }
    assert torch.equal(pair(tensors["qweight"]), layer.codes)
    read = vllm_omni._layer(source(tensors), "x", N, K, is_tiled=False)
    scales = tensors["wscales"].float().t()
    rows = (tensors["wcscales"] * tensors["wtscale"])[:, None]
    weight = residual(pair(tensors["qweight"]), scales, 16) * rows / tensors["smooth_factor"]
    assert_close_fp32(read.matrix(), weight + tensors["proj_up"] @ tensors["proj_down"].t())
    assert_close_fp32(read.matrix(), layer.matrix())


def test_modelopt():
    """Its branch sees the scaled input."""
    layer = unpacked("nvfp4")
    layer.input_scale = 0.25
    tensors = modelopt._tensors(layer, "x", 32, layer.row_scales.max())
    assert tensors["weight_scale"].float().amin() > 0
    assert tensors["svdquant_lora_a"].shape == (32, K)
    scaled = residual(pair(tensors["weight"]), tensors["weight_scale"], 16) * tensors["weight_scale_2"]
    weight = (scaled + tensors["svdquant_lora_b"] @ tensors["svdquant_lora_a"]) * tensors["pre_quant_scale"]
    assert_close_fp32(weight, layer.matrix())
    read = modelopt._layer(source(tensors), "x", N, K)
    assert_close_fp32(read.matrix(), layer.matrix())
    assert read.input_scale == 0.25


def test_one_factor_that_rounds_scales(caplog):
    layer = unpacked("nvfp4")
    layer.row_scales = torch.linspace(1, 100, N)
    comfy.one_factor(layer, "x")
    assert "'x': scales of groups were rounded by up to 0." in caplog.text


@pytest.mark.parametrize("tiled", [False, True])
def test_comfy_svdquant(tiled):
    layer = unpacked("int4")
    conf, tensors = comfy._write_svdquant(layer, torch.float32, tiled)
    assert conf["format"] == "svdquant_w4a4"
    weight = tensors["weight"]
    if tiled:
        n, k = formulas.grid(N, K)
        address = (((n // 128 * (K // 64) + k // 64) * 32 + n % 128 // 4) * 4 + n % 4) * 32 + k % 64 // 2
        byte = weight.flatten().view(torch.uint8)[address]
        nibbles = torch.where(k % 2 == 0, byte & 15, byte >> 4)
        scales = torch.stack([tensors["weight_scale"][n // 128, :, n % 128] for n in range(N)])
        up = torch.stack([tensors["proj_up"][n // 128, :, n % 128] for n in range(N)])
        style = ""
    else:
        nibbles, scales, up, style = pair(weight), tensors["weight_scale"].t(), tensors["weight_proj_up"], "weight_"
    assert torch.equal(nibbles, layer.codes)
    matrix = residual(nibbles, scales, 64) / tensors[f"{style}smooth_factor"] + up @ tensors[f"{style}proj_down"].t()
    assert_close_fp32(matrix, layer.matrix())
    read = comfy._svdquant(source(tensors), "x", N, K, conf)
    assert torch.equal(read.codes, layer.codes)
    assert torch.equal(read.scales, layer.scales)
    assert_close_fp32(read.matrix(), layer.matrix())


def test_comfy_svdquant_of_other_writers(caplog):
    """A branch for the smoothed input, activations without a sign, and a converter that mixes the two domains."""
    layer = unpacked("int4")
    conf, tensors = comfy._write_svdquant(layer, torch.float32, False)
    smoothed = tensors | {"weight_proj_down": tensors["weight_proj_down"] * layer.smooth[:, None], "bias": layer.bias}
    for change in ({"lowrank_branch_input_basis": "post_smoothing"}, {"proj_down_smooth_folded": False}):
        assert_close_fp32(comfy._svdquant(source(smoothed), "x", N, K, conf | change).matrix(), layer.matrix())
    assert not caplog.text
    mixed = comfy._svdquant(source(smoothed), "x", N, K, conf | {"smooth_mode": "weight_only"})
    assert_close_fp32(mixed.matrix(), layer.matrix())
    assert "was written by a converter that takes its branch from the weight before smoothing" in caplog.text
    unsigned = comfy._svdquant(source(smoothed), "x", N, K, conf | {"act_unsigned": True})
    x = torch.randn(3, K)
    plain = decode_int4(layer.codes).float() * layer.scales.repeat_interleave(64, 1) / layer.smooth
    expected = (x + 0.171875 * torch.ones(K)) @ plain.t() + layer.bias
    assert_close_fp32(x @ plain.t() + unsigned.bias, expected)


def test_comfy_nvfp4():
    """Even k in the high half, scales swizzled, one factor."""
    layer = unpacked("nvfp4", rows=200, rank=0)
    conf, tensors = comfy._write_nvfp4(layer, "x")
    groups = K // 16
    n, g = formulas.grid(200, groups)
    address = (n // 128 * -(-groups // 4) + g // 4) * 512 + n % 32 * 16 + n % 128 // 32 * 4 + g % 4
    scales = tensors["weight_scale"].view(torch.uint8).flatten()[address].view(torch.float8_e4m3fn)
    weight = residual(pair(tensors["weight"], low_first=False), scales, 16) * tensors["weight_scale_2"]
    assert_close_fp32(weight * tensors["pre_quant_scale"], layer.matrix())
    assert_close_fp32(comfy._nvfp4(source(tensors), "x", 200, K, conf).matrix(), layer.matrix())
    assert swizzled(layer.scales).shape == (256, 12)


@pytest.mark.parametrize("zero_key", ["weight_zeros", "weight_zero"])
@pytest.mark.parametrize(("zeros", "rank"), [(0.0, 0), (1.0, 0), (0.3, K // 64)])
def test_comfy_awq(zeros, rank, zero_key):
    codes = torch.randint(15, (N, K), dtype=torch.uint8)
    scales = 0.5 + torch.rand(K // 64, N)
    tensors = {"weight": pairs(codes).view(torch.int8), "weight_scale": scales, zero_key: zeros * scales}
    layer = comfy._awq(source(tensors), "x", N, K, {})
    assert layer.rank == rank
    assert layer.weight_only
    spread = scales.t().repeat_interleave(64, 1)
    assert_close_fp32(layer.matrix(), (codes.float() - 8) * spread + zeros * spread)


@pytest.mark.parametrize("columns", [256, 192, 100])
@pytest.mark.parametrize("num_bits", [8, 4])
def test_comfy_rotated(columns, num_bits):
    weight = torch.randn(N, columns)
    conf, tensors = comfy_convrot.encode(weight, num_bits)
    size = {256: 256, 192: 64, 100: 4}[columns]
    assert conf["convrot_groupsize"] == size
    matrix = comfy_convrot.hadamard(size)
    assert_close_fp32(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix, matrix.t())
    rotated = torch.cat([block @ matrix for block in weight.split(size, 1)], 1)
    scale = rotated.abs().amax(1) / (2 ** (num_bits - 1) - 1)
    codes = (rotated / scale[:, None]).round()
    stored = tensors["weight"].float() if num_bits == 8 else decode_int4(pair(tensors["weight"])).float()
    assert torch.equal(stored, codes)
    assert_close_fp32(tensors["weight_scale"].flatten(), scale)
    layer = comfy.READERS[conf["format"]](source(tensors), "x", N, columns, conf)
    read = layer.matrix()
    assert_close_fp32(read, torch.cat([c @ matrix for c in codes.split(size, 1)], 1) * scale[:, None])
    assert relative_error(read, weight) < (0.01 if num_bits == 8 else 0.2)
    x = torch.randn(7, columns)
    actual = layer.to_quantized_weight(torch.float32).output(x, f"w{num_bits}a8")
    rotated = torch.cat([part @ matrix for part in x.split(size, 1)], 1)  # as the runtime does
    tokens = rotated.abs().amax(1, keepdim=True) / 127
    expected = ((rotated / tokens).round() @ codes.t()) * tokens * scale
    assert relative_error(actual, expected) < 1e-3  # a number between two codes may fall on either side
    again, parts = comfy_convrot.write(layer)
    assert again == conf
    assert all(torch.equal(parts[key], tensor) for key, tensor in tensors.items())


def test_comfy_rotated_has_one_scale_a_row():
    """Else a layer does not fit the format; nor with a branch, smoothing factors, or in nvfp4."""
    layer = unpacked("int4", columns=256, rank=0)
    layer.smooth.fill_(1)
    assert not comfy_convrot.fits(replace(layer, rotation=64))
    layer.scales = layer.scales[:, :1].expand(-1, 4)
    assert not comfy_convrot.fits(layer)
    layer.rotation = 64
    assert comfy_convrot.fits(layer)
    branch = {"down": torch.ones(1, 256), "up": torch.ones(N, 1)}
    assert not comfy_convrot.fits(replace(layer, **branch))
    assert not comfy_convrot.fits(replace(layer, smooth=layer.smooth + 1))
    assert not comfy_convrot.fits(replace(unpacked("nvfp4", columns=256, rank=0), rotation=64))


def test_comfy_int8_of_other_writers():
    """One scale a tensor or a row, unrotated, without a format, and rotated in a nested dictionary."""
    codes = torch.randint(-128, 128, (N, K)).to(torch.int8)
    for scale in (torch.tensor(0.5), torch.rand(N), torch.rand(N, 1)):
        read = comfy_convrot.read_int8(
            source({"weight": codes, "weight_scale": scale}), "x", N, K, {"format": "int8_tensorwise"}
        )
        assert torch.equal(read.codes, codes)
        assert not read.weight_only
        assert torch.equal(read.matrix(), codes.float() * (scale.reshape(-1, 1) if scale.dim() else scale))
    conf = comfy._format(json.dumps({"params": {"convrot": True, "convrot_groupsize": 64}, "per_row": True}).encode())
    conf["full_precision_matrix_mult"] = True
    layer = comfy_convrot.read_int8(source({"weight": codes, "weight_scale": torch.ones(N)}), "x", N, K, conf)
    assert (layer.rotation, layer.weight_only) == (64, True)
    rotated = layer.matrix()
    assert_close_fp32(comfy_convrot.rotate(rotated, 64), codes.float())
    conf, parts = comfy_convrot.write(layer)
    assert torch.equal(parts["weight"], codes)
    assert (conf["convrot_groupsize"], conf["full_precision_matrix_mult"]) == (64, True)
    tensors = {"weight": codes[:, :192], "weight_scale": torch.ones(N)}
    with pytest.raises(ValueError, match=r"`convrot_groupsize` of 'x' in a file must divide its 192 .*, got 256"):
        comfy_convrot.read_int8(source(tensors), "x", N, 192, {"convrot": True})
    with pytest.raises(ValueError, match="`convrot_groupsize` must be a power of 4, got 32"):
        comfy_convrot.rotate(rotated, 32)
    with pytest.raises(ValueError, match=r"'x.weight' of a file must be int8, got torch.float32"):
        comfy_convrot.read_int8(source({"weight": codes.float(), "weight_scale": torch.ones(1)}), "x", N, K, {})
    with pytest.raises(ValueError, match=r"a file must have 'x.weight_scale', but lacks it"):
        comfy_convrot.read_int8(source({"weight": codes}), "x", N, K, {})


def test_comfy_float8():
    """Bytes and scales are those of the file, which has one scale a tensor, one a row, or none."""
    weight = torch.randn(N, K).to(torch.float8_e4m3fn)
    rows = torch.rand(N, 1) + 0.5
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), rows, rows.flatten(), None):
        tensors = {"weight": weight} | ({} if scale is None else {"weight_scale": scale})
        layer = comfy_convrot.read_float8(source(tensors), "x", N, K, {"full_precision_matrix_mult": True})
        spread = torch.ones(1) if scale is None else scale.reshape(-1, 1)
        assert torch.equal(layer.matrix(), weight.float() * spread)
        assert (layer.precision, layer.weight_only, comfy_convrot.fits(layer)) == ("float8", True, True)
        conf, parts = comfy_convrot.write(layer)
        assert conf == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        assert torch.equal(parts["weight"].view(torch.uint8), weight.view(torch.uint8))
        assert parts["weight_scale"].shape == ((N, 1) if spread.numel() == N else ())
    assert not comfy_convrot.fits(replace(layer, smooth=2 * layer.smooth))
    silent = source({"weight": weight, "weight_scale": torch.zeros(N)})
    assert not comfy_convrot.read_float8(silent, "x", N, K, {}).matrix().any()
    nan = weight.clone()
    nan.view(torch.uint8)[3, 5] = 255
    for change, message in (
        ({"weight": nan}, r"'x.weight' of a file must be finite, but has NaN"),
        ({"weight": weight.view(torch.uint8)}, r"'x.weight' of a file must be torch.float8_e4m3fn, got torch.uint8"),
        ({"weight": weight[:, :64]}, r"'x.weight' must have shape \(256, 192\), got \(256, 64\)"),
        ({"weight_scale": torch.ones(3)}, r"'x.weight_scale' of a file must be one number or 256, got shape \(3,\)"),
        ({"weight_scale": torch.tensor(torch.nan)}, r"'x.weight_scale' of a file must be finite, but has NaN or inf"),
        ({"input_scale": torch.ones(2)}, r"'x.input_scale' of a file must be one number, got shape \(2,\)"),
        ({"input_scale": torch.tensor(torch.inf)}, r"'x.input_scale' of a file must be finite, but has NaN or inf"),
    ):
        with pytest.raises(ValueError, match=message):
            comfy_convrot.read_float8(source({"weight": weight} | change), "x", N, K, {})


@pytest.mark.parametrize("kind", ["codebook", "4 bits", "6 bits"])
def test_comfy_w4a8(kind):
    width = 64 if kind == "6 bits" else 16
    codes = torch.randint(width, (N, K), dtype=torch.uint8)
    tensors = {
        "weight": pairs(codes & 15).view(torch.int8),
        "weight_s_rel": (20 * torch.rand(N, K // 16)).to(torch.float8_e4m3fn),
        "weight_s_channel": torch.rand(N),
    }
    levels = codes.float() - width // 2
    if kind == "codebook":
        tensors["weight_codebook"] = torch.linspace(-7, 7, 16)
        levels = tensors["weight_codebook"][codes.long()]
    if kind == "6 bits":
        high = torch.zeros(N, K // 4, dtype=torch.uint8)
        for k in range(K):
            high[:, k // 4] |= (codes[:, k] >> 4) << (2 * (k % 4))
        tensors["weight"] = torch.cat([tensors["weight"].view(torch.uint8), high], 1).view(torch.int8)
    spread = tensors["weight_s_rel"].float().repeat_interleave(16, 1)
    expected = (levels * spread).round().clamp(-127, 127) * tensors["weight_s_channel"][:, None]
    layer = comfy_convrot.read_w4a8(source(tensors), "x", N, K, {"convrot_groupsize": 64})
    assert_close_fp32(comfy_convrot.rotate(layer.matrix(), 64), expected)
    assert layer.precision == "int8"
    with pytest.raises(ValueError, match="has a `weight_correction`, which is not supported"):
        comfy_convrot.read_w4a8(source(tensors | {"weight_correction": torch.ones(1)}), "x", N, K, {})


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_unsigned", [False, True])
def test_sdnq(is_transposed, is_unsigned):
    """By the description of its files: flat bytes, codes + 8, groups of 128 features."""
    columns = 256
    codes = torch.randint(16, (N, columns), dtype=torch.uint8)
    scale, up, down = torch.rand(N, 2, 1), torch.randn(N, R), torch.randn(R, columns)
    tensors = {"weight": pairs(codes).flatten(), "scale": scale}
    tensors |= {"svd_up": up.t(), "svd_down": down.t()} if is_transposed else {"svd_up": up, "svd_down": down}
    spread = scale[..., 0].repeat_interleave(128, 1)
    expected = (codes.float() - 8) * spread
    if is_unsigned:
        tensors["zero_point"] = -7.3 * scale
        expected = (codes.float() - 7.3) * spread
    layer = sdnq._layer(source(tensors), "x", N, columns, is_transposed, is_unsigned)
    assert_close_fp32(layer.matrix(), expected + up @ down)
    assert layer.rank == R + (4 if is_unsigned else 0)
    without = sdnq._layer(source({"weight": tensors["weight"], "scale": scale}), "x", N, columns, False, False)
    assert without.rank == 0
    with pytest.raises(ValueError, match=r"'x' of a file has groups of 32 weights; a multiple of 64 is needed"):
        sdnq._layer(source(tensors | {"scale": torch.rand(N, 8, 1)}), "x", N, columns, False, False)


def test_mxfp4():
    """Scales that are powers of two, by the address of each; they become NVFP4 without an error."""
    layer = unpacked("nvfp4", columns=256)
    exponents = torch.randint(-20, -12, (N, 8))
    n, g = formulas.grid(N, 8)
    address = (((n // 128 * 4 + g // 2) * 8 + n % 8) * 4 + n % 128 % 32 // 8) * 8 + n % 128 // 32 * 2 + g % 2
    packed = torch.zeros(N * 8, dtype=torch.uint8)
    packed[address.flatten()] = (exponents + 127).flatten().to(torch.uint8)
    tensors = {
        "qweight": formulas.write_codes(layer.codes),
        "wscales": packed.reshape(8, N),
        "smooth": formulas.write_vector(layer.smooth, 1),
        "lora_down": formulas.write_down(layer.down),
        "lora_up": formulas.write_up(layer.up),
    }
    read = read_svdq(source(tensors), "x", N, 256)
    scales = torch.exp2(exponents.float()).repeat_interleave(32, 1)
    assert torch.equal((read.scales.float() * read.row_scales[:, None]).repeat_interleave(16, 1), scales)
    assert_close_fp32(read.matrix(), decode_e2m1(layer.codes) * scales / layer.smooth + layer.up @ layer.down)
    far = packed.reshape(8, N).clone()
    far.flatten()[address[0, 0]] = 0
    with pytest.raises(ValueError, match=r"'x.wscales' has two MXFP4 scales in one row that differ by 2\^1"):
        mxfp4.read_scales(far, 256, "x.wscales")
