"""Plugin of pytest: runs diffusers' own tests of Sana on our classes.

Before a test module is imported, `diffusers.NAME` becomes ours for each class that we have. `CLASSES=diffusers` in the
environment leaves diffusers' own: the baseline. The tiny tokenizer and text encoder that the tests download are made
here instead, so that no network is needed.
"""

import os
from typing import Any

import diffusers
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, PreTrainedTokenizerFast


OURS = (
    "AutoencoderDC",
    "SanaControlNetModel",
    "SanaControlNetPipeline",
    "SanaImageToVideoPipeline",
    "SanaPAGPipeline",
    "SanaPipeline",
    "SanaSprintImg2ImgPipeline",
    "SanaSprintPipeline",
    "SanaTransformer2DModel",
    "SanaVideoPipeline",
    "SanaVideoTransformer3DModel",
)
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
TESTERS = "hf-internal-testing/"  # where the tests would download from


def tiny_tokenizer(*_: Any, **__: Any) -> PreTrainedTokenizerFast:
    """Letter by letter, eight tokens in all, as many as the tests' text encoders have."""
    pieces = [*SPECIAL.values(), *"aeot"]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    bos = pieces.index(SPECIAL["bos_token"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def tiny_text_encoder() -> Gemma2Model:
    """One layer, of the width that the tests' transformers expect."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 64, "head_dim": 16, "vocab_size": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return Gemma2Model(Gemma2Config(**sizes, **layers, attn_implementation="eager"))


def pytest_configure(config: pytest.Config) -> None:
    """Puts our classes and the tiny parts in place."""
    load = Gemma2Model.from_pretrained

    def load_or_make(path: Any, *args: Any, **kwargs: Any) -> Gemma2Model:
        return tiny_text_encoder() if str(path).startswith(TESTERS) else load(path, *args, **kwargs)

    Gemma2Model.from_pretrained = staticmethod(load_or_make)
    GemmaTokenizer.from_pretrained = staticmethod(tiny_tokenizer)
    # A test of LoRA scales looks for the layers where CLIP has them, in every text encoder that takes a LoRA.
    Gemma2Model.encoder = property(lambda self: self)
    if os.environ.get("CLASSES") == "diffusers":
        return
    import diffusers_sana

    for name in OURS:
        setattr(diffusers, name, getattr(diffusers_sana, name))


def pytest_report_header() -> list[str]:
    """Which classes are tested."""
    return [f"{name}: {getattr(diffusers, name).__module__}" for name in OURS]
