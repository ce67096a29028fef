"""Control images by detectors of controlnet_aux, which a module in its place stands for."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sana import ControlPreprocessor, sobel_edges
from diffusers_sana.preprocessors import DETECTORS, PREPROCESSORS
from diffusers_sana.training.recipes import sana_options
from diffusers_sana.training.recipes.controlnet import ControlledImages
from examples.train_sana_controlnet import main
from tests.training import tiny


class Detector:
    """Finds the brightness; at multiples of 64 pixels, as those of controlnet_aux do."""

    calls = []

    def __init__(self, weights=None):
        self.weights, self.device = weights, None

    @classmethod
    def from_pretrained(cls, weights):
        return cls(weights)

    def to(self, device):
        self.device = device
        return self

    def __call__(self, input_image, detect_resolution=512, image_resolution=512, output_type="pil", **options):
        assert isinstance(input_image, np.ndarray)
        assert input_image.dtype == np.uint8
        assert output_type == "np"
        self.calls.append((self.weights, input_image.shape, detect_resolution, image_resolution, options))
        height, width = (max(64, round(side / 64) * 64) for side in input_image.shape[:2])
        gray = Image.fromarray(input_image).convert("L").resize((width, height), Image.Resampling.NEAREST)
        return np.stack([np.asarray(gray)] * 3, axis=2)


class WithoutWeights(Detector):
    """As CannyDetector, which has nothing to load and no device."""

    from_pretrained = None
    to = property(lambda self: self._none)  # raises AttributeError


@pytest.fixture
def controlnet_aux(monkeypatch):
    module = ModuleType("controlnet_aux")
    for class_name, has_weights, _ in DETECTORS.values():
        setattr(module, class_name, Detector if has_weights else WithoutWeights)
    monkeypatch.setitem(sys.modules, "controlnet_aux", module)
    monkeypatch.setattr(Detector, "calls", [])
    return module


def test_sobel_needs_nothing():
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(ControlPreprocessor()(images), sobel_edges(images))


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(controlnet_aux, name):
    gray = (torch.arange(64 * 128).reshape(1, 1, 64, 128) % 256).expand(2, 3, -1, -1) / 127.5 - 1
    found = ControlPreprocessor(name, weights="folder")(gray)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gray, atol=2 / 255, rtol=0)
    weights = "folder" if DETECTORS[name][1] else None
    assert Detector.calls == [(weights, (64, 128, 3), 64, 64, DETECTORS[name][2])] * 2


def test_other_sizes_and_pil_images(controlnet_aux):
    image = Image.fromarray(np.full((40, 90, 3), 200, np.uint8))
    found = ControlPreprocessor("hed")(image)
    assert found.size == image.size
    assert np.abs(np.asarray(found).astype(int) - 200).max() <= 1
    edges = ControlPreprocessor()(image)
    assert not np.asarray(edges).any()


def test_says_what_is_wrong(controlnet_aux, monkeypatch):
    with pytest.raises(ValueError, match=r"`name` must be one of .*'hed'.*got 'hedd'"):
        ControlPreprocessor("hedd")
    monkeypatch.setattr(Detector, "__call__", lambda *_, **__: "nothing")
    with pytest.raises(ValueError, match="'hed' must return an image as an array, but returned 'nothing'"):
        ControlPreprocessor("hed")(torch.zeros(1, 3, 64, 64))
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)  # as if it were not installed
    with pytest.raises(ValueError, match="`name` 'hed' needs a package: `pip install controlnet_aux`"):
        ControlPreprocessor("hed")


def test_training_from_hed_maps(controlnet_aux, tmp_path):
    assert sana_options.PREPROCESSORS == PREPROCESSORS
    tiny.write_image_folder(tmp_path / "data", [(40, 40), (40, 40)])
    tiny.tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    arguments = ["--data", str(tmp_path / "data"), "--pretrained", str(tmp_path / "pipeline"), "--num_layers", "1"]
    arguments += ["--batch_size", "2", "--num_workers", "0", "--resolution", "32", "--max_steps", "2"]
    arguments += ["--sample_steps", "1", "--max_sequence_length", "32", "--output_dir", str(tmp_path / "out")]
    main([*arguments, "--preprocessor", "hed"])
    assert len(Detector.calls) >= 4
    assert {call[1:4] for call in Detector.calls} == {((32, 32, 3), 32, 32)}
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_the_dataset_gives_what_the_detector_finds(controlnet_aux):
    class Images:
        names, sizes_of_items = ["a"], [(64, 64)]

        def __getitem__(self, index):
            return {"pixel_values": torch.full((3, 64, 64), 0.5)}

    control = ControlledImages(Images(), preprocessor="hed")[0]["control_image"]
    torch.testing.assert_close(control, torch.full((3, 64, 64), 0.5), atol=2 / 255, rtol=0)
