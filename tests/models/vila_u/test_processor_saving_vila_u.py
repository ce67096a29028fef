"""What the processor of VILA-U makes of outputs; saving and loading it; tokenizers that it refuses."""

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlamaTokenizer

from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessor
from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor
from diffusers_sana.models.vila_u.prompts_vila_u import encode_piece
from tests.models.vila_u.tiny import CELLS
from tests.models.vila_u.tiny_processor import tiny_processor, tiny_tokenizer


PROCESSOR = tiny_processor()


class TestOutputs:
    def test_text(self):
        ids = torch.tensor([encode_piece(PROCESSOR.tokenizer, "a cat</s>")])
        assert PROCESSOR.post_process_multimodal_output(ids) == ["a cat"]

    def test_images_and_videos(self):
        pictures = PROCESSOR.post_process_multimodal_output(torch.zeros(2, 3, 4, 4), generation_mode="image")
        assert [item.size for item in pictures] == [(4, 4)] * 2
        clips = PROCESSOR.post_process_multimodal_output(torch.zeros(1, 2, 3, 4, 4), generation_mode="video")
        assert [item.size for item in clips[0]] == [(4, 4)] * 2
        assert PROCESSOR.postprocess(torch.zeros(1, 3, 4, 4), output_type="uint8", rounding="truncate").max() == 127


class TestSaving:
    def test_save_and_load(self, tmp_path):
        tiny_processor(wrap_image_tokens=True, num_video_frames=3).save_pretrained(tmp_path)
        for cls in (VilaUProcessor, AutoProcessor):
            loaded = cls.from_pretrained(tmp_path)
            assert type(loaded) is VilaUProcessor
            assert (loaded.wrap_image_tokens, loaded.num_video_frames, loaded.num_image_tokens) == (True, 3, CELLS)
            assert loaded.chat_template == PROCESSOR.chat_template
            clip = {
                "text": "cat <image> <video>",
                "images": Image.new("RGB", (9, 5)),
                "videos": [Image.new("RGB", (9, 5))] * 3,
            }
            ours, theirs = tiny_processor(wrap_image_tokens=True, num_video_frames=3)(**clip), loaded(**clip)
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VilaUImageProcessor

    def test_tokenizer_without_the_tokens(self):
        plain = LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4}, merges=[], legacy=False)
        with pytest.raises(ValueError, match=r"must have the tokens \['<im_start>'"):
            VilaUProcessor(VilaUImageProcessor(), plain)

    def test_tokenizer_with_another_rule(self):
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer.prepend_scheme = "always"
        with pytest.raises(ValueError, match="must be a LLaMA tokenizer with `legacy=False`"):
            VilaUProcessor(VilaUImageProcessor(), tokenizer)
