"""PSNR and SSIM against known answers; LPIPS and Inception through stand-ins of their packages."""

import sys
from types import ModuleType

import pytest
import torch

from diffusers_sana.evaluation.features import make_inception
from diffusers_sana.evaluation.similarity import make_lpips, psnr, ssim


def test_psnr():
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x.clone()
    y[0] += 0.1
    assert psnr(x, y)[0] == pytest.approx(20, abs=1e-4)
    assert psnr(x, y)[1] == float("inf")


def test_ssim():
    x = torch.rand(2, 3, 16, 16)
    y = torch.stack([x[0], 0.5 * x[1] + 0.5 * torch.rand(3, 16, 16)])
    equal, noisy = ssim(x, y)
    assert equal == pytest.approx(1)
    assert 0.1 < noisy < 0.9


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_unequal_sizes(measure):
    with pytest.raises(ValueError, match=r"`targets` must have the shape of `images`, \(1, 3, 8, 8\), got"):
        measure(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9))


class FakeLPIPS(torch.nn.Module):
    """With the arguments of `lpips.LPIPS`."""

    def __init__(self, net: str, verbose: bool):
        super().__init__()
        self.net = net

    def forward(self, a, b, normalize=False):
        assert normalize, "images are in [0, 1]"
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


class FakeInception(torch.nn.Module):
    """With the arguments of `torch_fidelity`'s extractor."""

    def __init__(self, name, layers, feature_extractor_weights_path):
        super().__init__()
        self.weights = feature_extractor_weights_path

    def forward(self, images):
        assert images.dtype == torch.uint8
        return (images.flatten(1).float(),)


def test_lpips(monkeypatch):
    module = ModuleType("lpips")
    module.LPIPS = FakeLPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    x, y = torch.rand(2, 11, 3, 4, 4)
    assert torch.allclose(make_lpips()(x, y), (x - y).abs().mean((1, 2, 3)))
    with pytest.raises(ValueError, match="`targets`"):
        make_lpips()(x, y[:3])


def test_inception(monkeypatch):
    module = ModuleType("feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    assert make_inception("x.pth")(torch.ones(2, 3, 2, 2)).tolist() == [[255.0] * 12] * 2


@pytest.mark.parametrize(("make", "package"), [(make_lpips, "lpips"), (make_inception, "torch-fidelity")])
def test_missing_packages(make, package, monkeypatch):
    for name in ("lpips", "torch_fidelity"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"needs a package: `pip install {package}`"):
        make()
