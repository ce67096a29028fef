"""How good the bundled VILA-U is, on triples of object, style and background that no training showed.

    python -m examples.train_vila_u_emoji.evaluate --data outputs/emoji.zip [--model FOLDER] [--tower FOLDER]

Generation: images of prompts are compared with true renderings in a fixed feature space. Answering: the
answers about true images are compared with the true ones, word for word. The tower: how near its reconstructions
are, and, where its text tower is at hand, how often the nearest caption names the object.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.harness import environment
from diffusers_sana import VilaUForConditionalGeneration, VilaUProcessor, VilaUVisionModel
from diffusers_sana.checkpoints import VILA_U_EMOJI
from diffusers_sana.training.objectives.perceptual import RandomFeatures
from diffusers_sana.training.recipes.vila_u_tower import tokenize
from examples.train_emoji.common import captioned_grid, make_parser, write_report

from .data import QUESTIONS, TAUGHT, answer
from .models import RESOLUTION
from .scenes import COLORS, STYLES, EmojiArt, EmojiScenes, Scene, held_out_scenes


def to_images(pixels: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in [-1, 1] as a user would have them."""
    integers = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(item) for item in integers]


@torch.no_grad()
def reconstruct(tower: VilaUVisionModel, pixels: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` through their codes."""
    codes = torch.cat([tower.encode_to_codes(batch) for batch in pixels.to(tower.dtype).split(32)])
    return torch.cat([tower.decode_codes(batch) for batch in codes.split(32)]).float().clamp(-1, 1)


def similarity(originals: Tensor, others: Tensor) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of images `[B, 3, H, W]` in [-1, 1]."""
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(originals, others, strict=True)]
    psnr = [peak_signal_noise_ratio(a, b, data_range=2) for a, b in pairs]
    ssim = [structural_similarity(a, b, data_range=2, channel_axis=0) for a, b in pairs]
    return {"images": len(pairs), "psnr_db": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}


def generate(
    model: VilaUForConditionalGeneration, processor: VilaUProcessor, prompts: list[str], **options: Any
) -> Tensor:
    """Images `[B, 3, H, W]` of the prompts, number i from seed i."""
    images = []
    for start in tqdm(range(0, len(prompts), 16), desc="generating"):
        batch = prompts[start : start + 16]
        codes = model.generate(
            **processor(text=batch, generation_mode="image"),
            generation_mode="image",
            **options,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
        )
        images.append(model.decode_image_tokens(codes).float().clamp(-1, 1))
    return torch.cat(images)


def feature_space() -> Callable[[Tensor], Tensor]:
    """Images `[B, 3, H, W]` -> unit vectors `[B, F]`; fixed by its seed, learns nothing."""
    network = RandomFeatures()

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = network(images)
        return torch.cat([F.normalize(F.adaptive_avg_pool2d(m, 8).flatten(1)) for m in maps], dim=1)

    return features


def prompt_following(images: dict[str, Tensor], scenes: list[Scene], renderer: EmojiScenes) -> dict[str, dict]:
    """How often the nearest true rendering is the prompted one, when only one property of the scene is varied.

    Args:
        images: name -> images `[B, 3, H, W]` of the B scenes; each is judged alike.
        scenes: what they should show; those with two objects are left out.
        renderer: composes the true images; its `labels` are the objects to tell apart.
    """
    features = feature_space()
    rows = [i for i, scene in enumerate(scenes) if len(scene.labels) == 1]
    scenes = [scenes[i] for i in rows]
    described = {name: features(batch[rows]) for name, batch in images.items()}

    def ranks(varied: Callable[[Scene], list[Scene]]) -> dict[str, list[int]]:
        """For each image, how many renderings are nearer to it than the true one."""
        found: dict[str, list[int]] = {name: [] for name in images}
        for i, scene in enumerate(scenes):
            gallery = varied(scene)
            renderings = features(renderer.render(gallery, jitter=0.0))
            for name, batch in described.items():
                order = torch.cdist(batch[i : i + 1], renderings)[0].argsort().tolist()
                found[name].append(order.index(gallery.index(scene)))
        return found

    objects = ranks(lambda s: [Scene((label,), s.style, s.color, s.position) for label in renderer.labels])
    colors = ranks(lambda s: [Scene(s.labels, s.style, color, s.position) for color in COLORS])
    styles = ranks(lambda s: [Scene(s.labels, style, s.color, s.position) for style in STYLES])

    def fraction(found: list[int], top: int = 1) -> float:
        return sum(rank < top for rank in found) / len(found)

    return {
        name: {
            "prompts": len(scenes),
            "object_top1": fraction(objects[name]),
            "object_top5": fraction(objects[name], top=5),
            "object_top1_chance": 1 / len(renderer.labels),
            "color_top1": fraction(colors[name]),
            "color_top1_chance": 1 / len(COLORS),
            "style_top1": fraction(styles[name]),
            "style_top1_chance": 1 / len(STYLES),
        }
        for name in images
    }


def ask(
    model: VilaUForConditionalGeneration, processor: VilaUProcessor, question: str, images: list[Image.Image]
) -> list[str]:
    """The most likely answer about each image."""
    content = [[{"type": "image", "image": image}, {"type": "text", "text": question}] for image in images]
    chats = [[{"role": "user", "content": parts}] for parts in content]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    written = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return [said.strip() for said in processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], True)]


def answering(
    model: VilaUForConditionalGeneration, processor: VilaUProcessor, scenes: list[Scene], pixels: Tensor
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Fraction of right answers by what is asked for, beside chance; and what was said of each object."""
    chance = {"object": 1 / len(TAUGHT), "color": 1 / len(COLORS), "style": 1 / len(STYLES)}
    chance["caption"] = chance["object"] * chance["color"] * chance["style"]
    right: dict[str, list[bool]] = defaultdict(list)
    named: list[str] = []
    for question, about in tqdm(QUESTIONS.items(), desc="asking"):
        said = ask(model, processor, question, to_images(pixels))
        right[about] += [a == answer(question, scene) for a, scene in zip(said, scenes, strict=True)]
        named = named or said
    return {about: {"right": float(np.mean(found)), "chance": chance[about]} for about, found in right.items()}, named


@torch.no_grad()
def zero_shot(tower: VilaUVisionModel, tokenizer, scenes: list[Scene], pixels: Tensor) -> float:
    """How often the caption nearest to an image, among those that differ in the object, is the true one."""
    images = F.normalize(tower.get_image_features(pixels), dim=-1)
    hits = []
    for scene, image in zip(scenes, images, strict=True):
        captions = [Scene((label,), scene.style, scene.color).prompt for label in TAUGHT]
        texts = F.normalize(tower.get_text_features(tokenize(tokenizer, captions, tower.config)), dim=-1)
        hits.append(TAUGHT[int((texts @ image).argmax())] == scene.labels[0])
    return float(np.mean(hits))


def evaluate(
    model: VilaUForConditionalGeneration,
    processor: VilaUProcessor,
    data: Path,
    out: Path,
    tower: VilaUVisionModel | None = None,
    singles: int = 64,
) -> dict:
    """Measures a model; writes `evaluation.json` and three images into `out`."""
    art = EmojiArt(data)
    renderer = EmojiScenes(art, RESOLUTION, labels=TAUGHT)
    scenes = [Scene(s.labels, s.style, s.color) for s in held_out_scenes(TAUGHT, singles=singles, pairs=0)]
    truth = renderer.render(scenes, jitter=0.0)
    through_codes = reconstruct(model.model.vision_tower, truth)
    images = generate(model, processor, [scene.prompt for scene in scenes])
    answers, named = answering(model, processor, scenes, truth)
    out.mkdir(parents=True, exist_ok=True)
    shown = slice(0, 32)
    captioned_grid(enlarge(images[shown]), [scene.prompt for scene in scenes[shown]], out / "generated.png")
    captioned_grid(enlarge(truth[shown]), named[shown], out / "answered.png")
    count = min(8, len(scenes))
    both = torch.cat([truth[:count], through_codes[:count]])
    captioned_grid(enlarge(both), ["original"] * count + ["from its codes"] * count, out / "codes.png", columns=count)
    report = {
        **environment(),
        "tower_on_held_out_triples": similarity(truth, through_codes),
        "answers_on_held_out_triples": answers,
        "generated": prompt_following(
            {"generated_from_held_out_prompts": images, "ceiling_true_images_through_codes": through_codes},
            scenes,
            renderer,
        ),
    }
    if tower is not None:
        report["tower_on_held_out_triples"]["zero_shot_object"] = zero_shot(
            tower.eval(), processor.tokenizer, scenes, truth
        )
    return write_report(report, out)


def enlarge(images: Tensor) -> Tensor:
    """Twice the side, pixel by pixel: there is room for captions then."""
    return F.interpolate(images, scale_factor=2, mode="nearest")


def main(argv: list[str] | None = None) -> None:
    out = "outputs/vila-u-evaluation"
    parser = make_parser(__doc__, out, "folder for figures and images", data="outputs/emoji.zip")
    parser.add_argument("--model", default=VILA_U_EMOJI, help="folder of a model; default: the bundled one")
    parser.add_argument("--tower", help="folder of the tower as trained, with its text tower")
    args = parser.parse_args(argv)
    model = VilaUForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = VilaUProcessor.from_pretrained(args.model)
    tower = VilaUVisionModel.from_pretrained(args.tower) if args.tower else None
    report = evaluate(model, processor, args.data, args.out, tower)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
