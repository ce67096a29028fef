"""Trains the judge of images at 256 px, a small network that says what they show, and measures it on true art.

    python -m examples.train_emoji.judge --data outputs/emoji-256.zip --vae outputs/autoencoder/phase_3/model

So that it judges generated images as fairly as true ones, a part of what it learns from is blurred, and a part has
been through the autoencoder, with and without noise on the latents. It sees no held-out scene. `OUT` gets the network,
the held-out prompts as checks (`checks.jsonl`), and features of true images for FID and KID.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import AutoencoderDC
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.evaluation.measure import compare_sets

from .common import fit_probe, make_parser, right_answers, stored_batches
from .scenes import COLORS, HELD_OUT, SIDES, STYLES, Art, Scene, Scenes, held_out_scenes, is_held_out, render


KINDS = {"object": 0.25, "small": 0.05, "position": 0.25, "pair": 0.3, "count": 0.15}
BATCH_SIZE, STORE = 64, 2048  # images
TAGS = {"object": "single_object", "pair": "two_object", "count": "counting"}  # as in GenEval


class JudgeScenes:
    """Images with what they show.

    Args:
        art: the objects.
        vae: the autoencoder of the models to be judged.
        seed: of scenes and noise.
    """

    def __init__(self, art: Art, vae: ModelMixin, seed: int):
        self.art, self.vae = art, vae
        self.scenes = Scenes(art.objects, seed, KINDS)
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def through_autoencoder(self, images: Tensor, noise: float = 0.0) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1], encoded and decoded; `noise` is in units of the latents' deviation."""
        latents = self.vae.encode(images).latent
        spread = noise * latents.std() * torch.rand(len(latents), 1, 1, 1, generator=self.generator)
        latents = latents + spread * torch.randn(latents.shape, generator=self.generator)
        return self.vae.decode(latents).sample.clamp(-1, 1)

    def images(self, count: int) -> tuple[Tensor, list[Scene]]:
        """`[count, 3, 128, 128]` in [0, 1]: an eighth blurred, an eighth through the autoencoder, the others true.

        Half the side, as the network itself would shrink them.
        """
        described, part = [self.scenes.sample() for _ in range(count)], max(1, count // 8)
        shown = render(self.art, described)
        shown[part : 2 * part] = self.through_autoencoder(shown[part : 2 * part], noise=0.5)
        shown = shrink(shown)
        shown[:part] = F.interpolate(F.avg_pool2d(shown[:part], 3, 2, 1), scale_factor=2, mode="bilinear")
        return (shown + 1) / 2, described

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[Scene]]]:
        """Endless batches of `images`; see `stored_batches`."""
        return stored_batches(self.images, size, BATCH_SIZE, self.generator)


def shrink(images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` at half their side."""
    return F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)


def answers(probe: EmojiProbe, scenes: list[Scene]) -> dict[str, Tensor]:
    """See `right_answers`."""
    return right_answers(probe, scenes, [scene.objects for scene in scenes])


def train(data: JudgeScenes, steps: int, rate: float = 3e-3) -> EmojiProbe:
    """The trained network; the same seed gives the same weights."""
    torch.manual_seed(0)
    probe = EmojiProbe(data.art.objects, list(COLORS), list(STYLES), max_objects=3)
    return fit_probe(probe, data.batches(STORE), answers, steps, rate)


@torch.no_grad()
def accuracy(probe: EmojiProbe, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Fraction of right answers by kind of scene and question; a pair is right if both of its objects are."""
    right = answers(probe, scenes)
    parts = [probe(part) for part in images.split(64)]
    hits = {name: torch.cat([part[name].argmax(-1) for part in parts]) == right[name] for name in right}
    hits["pair"] = hits["first"] & hits["second"]
    kinds = [scene.kind for scene in scenes]

    def fraction(name: str, *among: str) -> float:
        rows = [i for i, kind in enumerate(kinds) if not among or kind in among]
        return round(hits[name][rows].float().mean().item(), 4)

    return {
        "object": fraction("first", "object"),
        "object_aside": fraction("first", "position"),
        "objects_of_a_pair": fraction("pair", "pair"),
        "counted_object": fraction("first", "count"),
        "number": fraction("number"),
        "place": fraction("place", "object", "position"),
        "background": fraction("color"),
        "style": fraction("style"),
    }


def judged_scenes(objects: list[str]) -> list[Scene]:
    """Scenes that the training has not shown: each held-out look of an object in the middle and at one side, and as
    many pairs and half as many counts."""
    looks = [Scene((word,), style, color) for word, style, color in product(objects, STYLES, COLORS)]
    single, sides = [scene for scene in looks if is_held_out(scene)], cycle(SIDES)
    aside = [replace(scene, position=side) for scene, side in zip(single, sides, strict=False)]
    several = Scenes(objects, seed=100, kinds={"pair": 2, "count": 1})
    return [*single, *aside, *(several.sample(held_out=True) for _ in range(len(single) * 3 // 2))]


@torch.no_grad()
def measure(probe: EmojiProbe, data: JudgeScenes, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """Accuracy on the scenes: their true images, and these through the autoencoder."""
    figures: dict[str, list[Tensor]] = {"true_images": [], "through_autoencoder": []}
    for start in range(0, len(scenes), 32):
        true = render(data.art, scenes[start : start + 32])
        figures["true_images"].append(shrink(true))
        figures["through_autoencoder"].append(shrink(data.through_autoencoder(true)))
    return {name: accuracy(probe, (torch.cat(parts) + 1) / 2, scenes) for name, parts in figures.items()}


def check(scene: Scene, seed: int) -> dict:
    """What `diffusers_sana.evaluation.checks.read_checks` reads: prompt, seed and what must be seen."""
    include: list[dict] = [{"class": word} for word in dict.fromkeys(scene.objects)]
    if scene.kind == "pair":
        include[1]["position"] = ["right of", 0]
    elif scene.kind == "count":
        include[0]["count"] = len(scene.objects)
    elif scene.position in SIDES:
        include[0]["place"] = scene.position
    row = {"tag": TAGS.get(scene.kind, scene.kind), "prompt": scene.prompt, "seed": seed, "include": include}
    return row | {"total": len(scene.objects), "background": scene.color, "style": scene.style}


@torch.no_grad()
def reference_features(probe: EmojiProbe, art: Art, count: int = 4) -> Tensor:
    """`[100 * count, F]`, of true images: kinds of scenes in the proportions of the prompts, but others, for FID, KID.

    The same scenes would not do: sets that belong together in pairs are nearer than two samples of one distribution.
    """
    sources = {kind: Scenes(art.objects, seed=9, kinds={kind: 1}) for kind in HELD_OUT}
    scenes = [sources[kind].sample() for kind, share in HELD_OUT.items() for _ in range(count * share)]
    random.Random(0).shuffle(scenes)
    parts = [render(art, scenes[start : start + 64]) for start in range(0, len(scenes), 64)]
    return torch.cat([probe.features((shrink(part) + 1) / 2) for part in parts])


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/emoji-judge", "folder of the judge")
    parser.add_argument("--vae", type=Path, help="folder of the autoencoder of the models to be judged", required=True)
    parser.add_argument("--steps", type=int, default=1500, help=f"of the training, {BATCH_SIZE} images each")
    parser.add_argument("--judge-only", action="store_true", help="measure what OUT has, and train nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    args = parser.parse_args(argv)
    art, log = Art(args.data), args.out / "training.json"
    vae = AutoencoderDC.from_pretrained(args.vae, dtype=torch.float32).eval()
    if not args.judge_only:
        started = time.process_time()
        train(JudgeScenes(art, vae, seed=6), args.steps).half().save_pretrained(args.out)
        training = {"steps": args.steps, "core_seconds": round(time.process_time() - started)}
        log.write_text(json.dumps(training) + "\n", encoding="utf-8")
    probe = EmojiProbe.from_pretrained(args.out).eval()  # measured as it is saved: rounded to 16 bits
    wanted = held_out_scenes(art.objects, HELD_OUT)
    rows = [json.dumps(check(scene, seed)) + "\n" for seed, scene in enumerate(wanted)]
    (args.out / "checks.jsonl").write_text("".join(rows), encoding="utf-8")
    reference = reference_features(probe, art)
    save_file({"features": reference.half()}, args.out / "reference.safetensors")
    with torch.no_grad():
        true = probe.features((shrink(render(art, wanted)) + 1) / 2)
    scenes = judged_scenes(art.objects)
    report = environment() | {"training": json.loads(log.read_text(encoding="utf-8")), "scenes": len(scenes)}
    report["true_images_of_checks"] = compare_sets(true, reference, ("fid", "kid"))  # as good as it gets
    report |= measure(probe, JudgeScenes(art, vae, seed=7), scenes)
    write_results("emoji_judge", report, args.results)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
