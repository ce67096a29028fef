"""transformers' common tests of processors and image processors, on those of VILA-U.

Run it in the unpacked source distribution of transformers, whose folder `tests` is the package `tests` here. The tests
take the type of the model from the name of this file.
"""

import unittest
from string import ascii_letters
from typing import Any

import transformers_tests  # noqa: F401  # makes the package `tests`
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin
from transformers import LlamaTokenizer
from transformers.processing_utils import ProcessorMixin

import diffusers_sana  # noqa: F401
from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessor
from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor


SPECIAL = ["<im_start>", "<im_end>", "<vi_start>", "<vi_end>", "<image>"]


class VilaUProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    """The common tests of processors, without those that cannot be about this one."""

    processor_class = VilaUProcessor
    videos_input_name = "pixel_values"  # frames are images
    chat_template_max_length = 400

    @classmethod
    def _setup_tokenizer(cls) -> LlamaTokenizer:
        """LLaMA's in small: letters, digits and marks."""
        pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", *ascii_letters, *"0123456789.,:;?!'\"-()"]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        merges = [("\u2581", "\u2581")]
        vocabulary["\u2581\u2581"] = len(vocabulary)
        tokenizer = LlamaTokenizer(
            vocab=vocabulary, merges=merges, pad_token="<unk>", legacy=False, add_bos_token=True
        )
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        return tokenizer

    @classmethod
    def _setup_image_processor(cls) -> VilaUImageProcessor:
        return VilaUImageProcessor(size={"height": 32, "width": 32})

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        """16 cells an image, 2 frames a video."""
        return {"num_image_tokens": 16, "num_video_frames": 8}

    def test_flat_kwarg_applied_when_modality_dict_lacks_it(self) -> None:
        """Here and only here there is a video in the batch, which needs its placeholder in the text."""
        self.video_token = "<video>"
        super().test_flat_kwarg_applied_when_modality_dict_lacks_it()

    @staticmethod
    def does_processor_return_mm_offsets(processor_class: type, method_name: str) -> bool:
        """Asks the host's class; the original takes whatever comes first behind ours for it."""
        return getattr(processor_class, method_name) is not getattr(ProcessorMixin, method_name)


class Tester(ImageProcessingTester):
    """What the common tests ask of an image processor: its arguments and images."""

    def __init__(self, parent: unittest.TestCase) -> None:
        super().__init__(parent=parent)
        self.size = {"height": 18, "width": 18}

    def _get_image_processing_classes(self) -> dict[str, Any]:
        return {"pil": VilaUImageProcessor}


class VilaUImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    """The common tests of image processors."""

    image_processor_tester_class = Tester


NOT_ABOUT_IT = {
    VilaUProcessorTest: {
        "test_model_input_names": "no call returns all of them: codes come in place of pixels",
        "test_init_arguments_not_in_processor_kwargs": "`wrap_image_tokens` of a call overrides that of the processor",
    },
    VilaUImageProcessorTest: {
        "test_new_models_require_torchvision_backend": "a rule for what is added to transformers itself",
    },
}
for case, tests in NOT_ABOUT_IT.items():
    for test, reason in tests.items():
        setattr(case, test, unittest.skip(reason)(getattr(case, test)))
