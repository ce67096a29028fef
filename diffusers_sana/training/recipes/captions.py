"""Captions of a folder of images by one or several vision-language models, and their CLIP scores (arXiv 2410.10629).

Captions go to `captions.jsonl` in the folder. A model captions an image once, and again only if image, prompt or model
have changed; so an interrupted run continues, and further models can be added.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils.hub import has_file

from diffusers_sana.evaluation.clip import Clip
from diffusers_sana.evaluation.vision_language import VisionLanguageModel
from diffusers_sana.files import atomic_write, digest, locked, model_identity
from diffusers_sana.images import read_image
from diffusers_sana.loading import checkpoint_path
from diffusers_sana.pipelines.pipeline_vila_u import VilaUPipeline
from diffusers_sana.training.data.captions import CAPTIONS_FILE, Caption, caption_line, read_captions
from diffusers_sana.training.data.metadata import inside
from diffusers_sana.training.data.sources import FolderSource


PROMPT = "Describe this image in one detailed paragraph."
ORIGINAL = "original"

# From images to a caption of each.
Captioner = Callable[[list[Image.Image]], list[str]]


class TransformersCaptioner(VisionLanguageModel):
    """A vision-language model of transformers and its processor, with one prompt for every image.

    Args:
        model: folder or Hub id.
        prompt: the request for a caption.
        max_new_tokens: length limit of a caption.
        device, dtype: where it runs, and in what.
    """

    def __init__(self, model: str, prompt: str, max_new_tokens: int, device: str, dtype: torch.dtype):
        super().__init__(model, device, dtype)
        self.prompt, self.max_new_tokens = prompt, max_new_tokens

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> list[str]:
        """The most probable caption of each image."""
        inputs = self.inputs(images, [self.prompt] * len(images))
        written = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = written[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def load_captioner(model: str, prompt: str, max_new_tokens: int, device: str, dtype: torch.dtype) -> Captioner:
    """The captioner for a name: folder or Hub id of a transformers model or of a VilaUPipeline, or bundled name."""
    path = checkpoint_path(model)
    if not has_file(path, VilaUPipeline.config_name):
        return TransformersCaptioner(path, prompt, max_new_tokens, device, dtype)
    pipe: Any = VilaUPipeline.from_pretrained(path, dtype=dtype).to(device)
    return lambda images: pipe.chat(images, prompt, max_new_tokens=max_new_tokens, do_sample=False)


def identity_of(model: str) -> str:
    """A digest of the files that the name of a captioner stands for now; see `model_identity`."""
    path = checkpoint_path(model)
    return model_identity(
        path, VilaUPipeline.config_name if has_file(path, VilaUPipeline.config_name) else "config.json"
    )


class CaptionFile:
    """The captions of a folder, in memory and on disk; additions are written at once.

    Args:
        folder: of the images.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / CAPTIONS_FILE
        self._digests: dict[str, str] = {}
        self.captions = read_captions(self.path) if self.path.exists() else {}
        self.rewrite()  # drops the partial line that a killed run may have left

    def add(self, captions: Iterable[tuple[str, Caption]]) -> None:
        """Adds captions by name of their image; each replaces the earlier one of the same model."""
        with open(self.path, "a", encoding="utf-8") as file:
            for name, caption in captions:
                others = [other for other in self.captions.get(name, []) if other.model != caption.model]
                self.captions[name] = [*others, caption]
                file.write(caption_line(name, [caption]))

    def image(self, name: str) -> Path:
        """The path of an image."""
        return inside(self.folder / name, self.folder, repr(str(self.path)))

    def digest(self, name: str, settings: str) -> str:
        """A digest of an image and of the settings used with it."""
        if name not in self._digests:
            self._digests[name] = digest(self.image(name))
        return digest(self._digests[name], settings)

    def missing(self, names: Sequence[str], model: str, settings: str = "") -> list[str]:
        """The images that a model has not captioned, or not with these settings.

        Captions that do not record what they were made from, such as those of other programs, are kept.
        """

        def is_there(name: str) -> bool:
            origins = [caption.made_from for caption in self.captions.get(name, []) if caption.model == model]
            return bool(origins) and (not settings or origins[0] in ("", self.digest(name, settings)))

        return [name for name in names if not is_there(name)]

    def rewrite(self) -> None:
        """Rewrites the file with one line per image, sorted by name."""
        lines = (caption_line(name, captions) for name, captions in sorted(self.captions.items()))
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def caption_with(
    file: CaptionFile, names: Sequence[str], model: str, captioner: Captioner, batch_size: int, settings: str = ""
) -> None:
    """Caption the images that `model` has not captioned with these settings, in batches."""
    todo = file.missing(names, model, settings)
    with tqdm(total=len(todo), desc=model, unit="image") as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            texts = captioner([read_image(file.image(name)) for name in batch])
            file.add(
                (name, Caption(model, text, made_from=file.digest(name, settings) if settings else ""))
                for name, text in zip(batch, texts, strict=True)
            )
            bar.update(len(batch))


def score(file: CaptionFile, clip: Clip, model: str = "") -> None:
    """Add the missing CLIP scores: 100 times the cosine, at least 0 (arXiv 2104.08718).

    Scores of another CLIP, or of another image of the same name, are replaced.

    Args:
        file: of the captions.
        clip: scores them.
        model: its identity; "" keeps all scores.
    """

    def is_scored(name: str, caption: Caption) -> bool:
        known = not model or caption.scored_from in ("", file.digest(name, model))
        return caption.clip_score is not None and known

    missing = {
        name: [caption for caption in captions if not is_scored(name, caption)]
        for name, captions in file.captions.items()
    }
    for name, captions in tqdm([item for item in missing.items() if item[1]], desc="CLIP", unit="image"):
        of_image = clip.image_features([read_image(file.image(name))])
        origin = file.digest(name, model) if model else ""
        cosines = (clip.text_features([caption.text for caption in captions]) @ of_image.T).flatten().tolist()
        file.add(
            (name, replace(caption, clip_score=round(max(0.0, 100 * cosine), 4), scored_from=origin))
            for caption, cosine in zip(captions, cosines, strict=True)
        )


def caption_folder(
    folder: Path,
    models: Sequence[str] = (),
    prompt: str = PROMPT,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    clip: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Captions the images of a folder and its subfolders, and scores the captions.

    Captions that the images came with, in `metadata.jsonl`, `.csv`, `.parquet` or `NAME.txt`, are included as those of
    the model "original".

    Args:
        folder: of the images.
        models: names for `load_captioner`; they run one after another.
        prompt: the request for a caption.
        max_new_tokens: length limit of a caption.
        batch_size: images at a time; 1 for models that take no more.
        clip: Hub id or folder of a CLIPModel that scores the captions; None: no scores.
        device, dtype: where the models run, and the name of their dtype.

    Raises:
        ValueError: the folder has no images.
        InUse: another process captions the folder.
    """
    source = FolderSource(folder, split="", captions="optional", use_captions_file=False)
    names = [path.relative_to(folder).as_posix() for path in source.images]
    with locked(folder / ".captions.lock", f"captions {str(folder)!r}"):
        file = CaptionFile(folder)
        originals = {name: text for name, text in zip(source.names, source.captions, strict=True) if text}
        known = {(name, c.text) for name, captions in file.captions.items() for c in captions if c.model == ORIGINAL}
        todo = [name for name in names if name in originals and (name, originals[name]) not in known]
        file.add((name, Caption(ORIGINAL, originals[name])) for name in todo)
        for model in models:
            settings = digest(prompt, max_new_tokens, dtype, identity_of(model))
            if file.missing(names, model, settings):
                captioner = load_captioner(model, prompt, max_new_tokens, device, getattr(torch, dtype))
                caption_with(file, names, model, captioner, batch_size, settings)
                del captioner  # before the next one is loaded
        if clip:
            score(file, Clip(clip, device), model_identity(clip, "config.json"))
        file.rewrite()
