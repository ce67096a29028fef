"""A processor that fits the model of `tiny.py`: its tokenizer is LLaMA's in small, 124 pieces and 5 special tokens."""

from pathlib import Path
from string import ascii_letters

from transformers import LlamaTokenizer

from diffusers_sana import VilaUPipeline
from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessor
from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor
from tests.models.vila_u.tiny import CELLS, VOCABULARY


SPECIAL = ["<im_start>", "<im_end>", "<vi_start>", "<vi_end>", "<image>"]
# "▁▁" as in LLaMA's vocabulary: two spaces, or the prefix and a space.
MERGES = [
    ("▁", "▁"),
    ("▁", "a"),
    ("U", "S"),
    ("US", "E"),
    ("USE", "R"),
    ("▁", "USER"),
    ("A", "S"),
    ("c", "a"),
    ("ca", "t"),
]


def tiny_tokenizer() -> LlamaTokenizer:
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", *ascii_letters, *"0123456789.,:;?!'\"-()"]
    pieces += [left + right for left, right in MERGES]
    pieces += [f"<0x{byte:02X}>" for byte in range(0x80, 0x80 + VOCABULARY - 4 - len(pieces))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=MERGES, pad_token="<unk>", legacy=False)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def tiny_processor(**options) -> VilaUProcessor:
    size = {"height": 32, "width": 32}
    fields = {"num_image_tokens": CELLS, "num_video_frames": 2}
    return VilaUProcessor(VilaUImageProcessor(size=size), tiny_tokenizer(), **(fields | options))


def write_folders(pipe: VilaUPipeline, folder: Path) -> dict[str, Path]:
    """The folder of a pipeline and one of transformers, with the same contents."""
    folders = {kind: folder / kind for kind in ("pipeline", "transformers")}
    pipe.save_pretrained(folders["pipeline"])
    pipe.model.save_pretrained(folders["transformers"])
    pipe.processor.save_pretrained(folders["transformers"])
    return folders
