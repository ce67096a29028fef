"""Caption a folder of pictures with one or several vision-language models, for Sana's training (arXiv 2410.10629).

    python examples/caption_images.py --data photos --models llava-hf/llava-1.5-7b-hf Qwen/Qwen2.5-VL-3B-Instruct \
        --clip openai/clip-vit-base-patch16

A model is any that transformers' `AutoModelForImageTextToText` loads, VILA-U included, or a folder of a VilaUPipeline;
`vila-u-emoji` is the bundled one. Captions go to `captions.jsonl` in the folder. Captions that images came with, in
`metadata.jsonl`, `.csv`, `.parquet` or `NAME.txt`, join as those of the model "original". What a model has captioned
it does not caption again, unless image, prompt or model have changed: a stopped run goes on where it was, and further
models can be added. With `--clip` each caption gets a CLIP score.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import has_file

from diffusers_sana import VilaUPipeline
from diffusers_sana.checkpoints import BUNDLED
from diffusers_sana.evaluation.clip import Clip
from diffusers_sana.files import atomic_write, digest, locked, model_identity
from diffusers_sana.images import read_image
from diffusers_sana.training.data.captions import CAPTIONS_FILE, Caption, caption_line, read_captions
from diffusers_sana.training.data.metadata import inside
from diffusers_sana.training.data.sources import FolderSource


PROMPT = "Describe this image in one detailed paragraph."
ORIGINAL = "original"

# From pictures to a caption each.
Captioner = Callable[[list[Image.Image]], list[str]]


class TransformersCaptioner:
    """A vision-language model of transformers and its processor, asked the same about each picture.

    Args:
        model: folder or Hub id.
        prompt: what to ask.
        max_new_tokens: longest caption.
        device, dtype: where it runs, and in what.
    """

    def __init__(self, model: str, prompt: str, max_new_tokens: int, device: str, dtype: torch.dtype):
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(model)
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # captions begin where prompts end
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> list[str]:
        """The most probable caption of each picture."""
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}]}]
            for image in images
        ]
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)  # only numbers with a point change their type
        written = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = written[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def load_captioner(model: str, prompt: str, max_new_tokens: int, device: str, dtype: torch.dtype) -> Captioner:
    """The captioner of a name: a folder or Hub id of transformers or of a VilaUPipeline, or a bundled checkpoint."""
    path = BUNDLED.get(model, model)
    if not has_file(path, VilaUPipeline.config_name):
        return TransformersCaptioner(path, prompt, max_new_tokens, device, dtype)
    pipe: Any = VilaUPipeline.from_pretrained(path, torch_dtype=dtype).to(device)
    return lambda images: pipe.chat(images, prompt, max_new_tokens=max_new_tokens, do_sample=False)


def identity_of(model: str) -> str:
    """What the name of a captioner stands for at present; see `model_identity`."""
    path = BUNDLED.get(model, model)
    return model_identity(
        path, VilaUPipeline.config_name if has_file(path, VilaUPipeline.config_name) else "config.json"
    )


class CaptionFile:
    """The captions of a folder, in memory and on disk; whatever is added is on disk at once.

    Args:
        folder: of the pictures.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / CAPTIONS_FILE
        self._digests: dict[str, str] = {}
        self.captions = read_captions(self.path) if self.path.exists() else {}
        self.rewrite()  # a half line that a killed run has left must not get another behind it

    def add(self, captions: Iterable[tuple[str, Caption]]) -> None:
        """Captions by name of their pictures; each takes the place of what its model had said before."""
        with open(self.path, "a", encoding="utf-8") as file:
            for name, caption in captions:
                others = [other for other in self.captions.get(name, []) if other.model != caption.model]
                self.captions[name] = [*others, caption]
                file.write(caption_line(name, [caption]))

    def image(self, name: str) -> Path:
        """The path of an image."""
        return inside(self.folder / name, self.folder, repr(str(self.path)))

    def digest(self, name: str, settings: str) -> str:
        """A name of the image together with the settings that something is made of it with."""
        if name not in self._digests:
            self._digests[name] = digest(self.image(name))
        return digest(self._digests[name], settings)

    def lacking(self, names: Sequence[str], model: str, settings: str = "") -> list[str]:
        """Those of the images that a model has not captioned, or not with these settings.

        Captions that say nothing of what they were made from, as those of other programs, are taken as they are.
        """

        def is_there(name: str) -> bool:
            origins = [caption.made_from for caption in self.captions.get(name, []) if caption.model == model]
            return bool(origins) and (not settings or origins[0] in ("", self.digest(name, settings)))

        return [name for name in names if not is_there(name)]

    def rewrite(self) -> None:
        """One line an image, in order of their names."""
        lines = (caption_line(name, captions) for name, captions in sorted(self.captions.items()))
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def caption_with(
    file: CaptionFile, names: Sequence[str], model: str, captioner: Captioner, batch_size: int, settings: str = ""
) -> None:
    """Caption the images that `model` has not captioned with these settings, in batches."""
    todo = file.lacking(names, model, settings)
    with tqdm(total=len(todo), desc=model, unit="picture") as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            texts = captioner([read_image(file.image(name)) for name in batch])
            file.add(
                (name, Caption(model, text, made_from=file.digest(name, settings) if settings else ""))
                for name, text in zip(batch, texts, strict=True)
            )
            bar.update(len(batch))


def score(file: CaptionFile, clip: Clip, model: str = "") -> None:
    """Give each caption that has no CLIP score one: 100 times the cosine, at least 0 (arXiv 2104.08718).

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
    for name, captions in tqdm([item for item in missing.items() if item[1]], desc="CLIP", unit="picture"):
        of_image = clip.image_features([read_image(file.image(name))])
        origin = file.digest(name, model) if model else ""
        cosines = (clip.text_features([caption.text for caption in captions]) @ of_image.T).flatten().tolist()
        file.add(
            (name, replace(caption, clip_score=round(max(0.0, 100 * cosine), 4), scored_from=origin))
            for caption, cosine in zip(captions, cosines, strict=True)
        )


def main(argv: list[str] | None = None) -> None:
    """The command line: a folder and the names of models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures, searched with its subfolders")
    parser.add_argument("--models", nargs="*", default=[], help="Hub ids or folders; they run one after the other")
    parser.add_argument("--clip", help="Hub id or folder of a CLIPModel that scores the captions; default: no scores")
    parser.add_argument("--prompt", default=PROMPT, help="what the models are asked")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest caption")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures at a time; 1 for models that take no more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where models run")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args(argv)

    source = FolderSource(args.data, split="", captions="optional", use_captions_file=False)
    names = [path.relative_to(args.data).as_posix() for path in source.images]
    with locked(args.data / ".captions.lock", f"captions {str(args.data)!r}"):
        caption(args, source, names)


def caption(args: argparse.Namespace, source: FolderSource, names: Sequence[str]) -> None:
    """All that the options ask for."""
    file = CaptionFile(args.data)
    originals = {name: text for name, text in zip(source.names, source.captions, strict=True) if text}
    known = {(name, c.text) for name, captions in file.captions.items() for c in captions if c.model == ORIGINAL}
    todo = [name for name in names if name in originals and (name, originals[name]) not in known]
    file.add((name, Caption(ORIGINAL, originals[name])) for name in todo)
    for model in args.models:
        settings = digest(args.prompt, args.max_new_tokens, args.dtype, identity_of(model))
        if file.lacking(names, model, settings):
            captioner = load_captioner(
                model, args.prompt, args.max_new_tokens, args.device, getattr(torch, args.dtype)
            )
            caption_with(file, names, model, captioner, args.batch_size, settings)
            del captioner  # before the next one is loaded
    if args.clip:
        score(file, Clip(args.clip, args.device), model_identity(args.clip, "config.json"))
    file.rewrite()


if __name__ == "__main__":
    main()
