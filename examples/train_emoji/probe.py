"""Trains the small network that `diffusers-sana evaluate` judges emoji images with, in minutes on one CPU core.

    python -m examples.train_emoji.probe --data outputs/emoji.zip --out outputs/emoji-probe

So that it judges generated images as fairly as true ones, a part of what it learns from is blurred, and a part has
been through the autoencoder, with and without noise on the latents. Triples of object, style and background that
`is_held_out` names are kept for the test, which is done on true images and on images through the autoencoder.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import AutoencoderDC
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.evaluation.measure import compare_sets

from .common import fit_probe, make_parser, right_answers, stored_batches
from .data import COLORS, COMMON_OBJECTS, POSITIONS, STYLES, EmojiArt, EmojiScenes, Scene, is_held_out, triples
from .evaluate import held_out_scenes


class ProbeScenes:
    """Images with their answers.

    Args:
        scenes: composes the images.
        vae: the autoencoder of the model to be judged.
    """

    def __init__(self, scenes: EmojiScenes, vae: torch.nn.Module):
        self.scenes, self.vae = scenes, vae.eval()

    def sample(self) -> Scene:
        """A scene: 40 % pairs, 30 % single objects aside; none of a held-out triple."""
        random = self.scenes.random
        style, color, kind = random.choice(STYLES), random.choice(list(COLORS)), random.random()
        if kind < 0.4:
            return Scene(tuple(random.sample(self.scenes.labels, 2)), style, color)
        position = random.choice([p for p in POSITIONS if p]) if kind < 0.7 else ""
        label = random.choice(self.scenes.labels)
        if is_held_out(label, style, color):
            return self.sample()
        return Scene((label,), style, color, position)

    @torch.no_grad()
    def through_autoencoder(self, images: Tensor, noise: float = 0.0) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1], encoded and decoded; `noise` is in units of the latents' deviation."""
        latents = self.vae.encode(images).latent
        spread = noise * latents.std() * torch.rand(len(latents), 1, 1, 1, generator=self.scenes.generator)
        latents = latents + spread * torch.randn(latents.shape, generator=self.scenes.generator)
        return self.vae.decode(latents).sample.clamp(-1, 1)

    def images(self, count: int) -> tuple[Tensor, list[Scene]]:
        """`[count, 3, H, W]` in [0, 1]: an eighth blurred, a quarter through the autoencoder, the others true."""
        described, part = [self.sample() for _ in range(count)], max(1, count // 8)
        shown = self.scenes.render(described)
        shown[:part] = F.interpolate(F.avg_pool2d(shown[:part], 3, 2, 1), scale_factor=2, mode="bilinear")
        shown[part : 3 * part] = self.through_autoencoder(shown[part : 3 * part], noise=0.5)
        return (shown + 1) / 2, described

    def batches(self, batch_size: int, size: int) -> Iterator[tuple[Tensor, list[Scene]]]:
        """Endless images `[B, 3, H, W]` in [0, 1]; see `stored_batches`."""
        return stored_batches(self.images, size, batch_size, self.scenes.generator)


def answers(probe: EmojiProbe, scenes: list[Scene]) -> dict[str, Tensor]:
    """See `right_answers`."""
    return right_answers(probe, scenes, [scene.labels for scene in scenes])


def train(data: ProbeScenes, steps: int, batch_size: int = 64, rate: float = 3e-3, store: int = 1024) -> EmojiProbe:
    """The trained network; the same seed gives the same weights."""
    torch.manual_seed(0)
    probe = EmojiProbe(objects=list(data.scenes.labels), colors=list(COLORS), styles=list(STYLES))
    return fit_probe(probe, data.batches(batch_size, store), answers, steps, rate)


def judged_scenes(labels: Sequence[str]) -> list[Scene]:
    """Each held-out triple of object, style and color in the middle and once aside, and as many random pairs."""
    random = Random(0)
    aside = [p for p in POSITIONS if p]
    scenes = [
        Scene((label,), style, color, position)
        for i, (label, style, color) in enumerate(triples(labels, held_out=True))
        for position in ("", aside[i % len(aside)])
    ]
    pairs = [tuple(random.sample(labels, 2)) for _ in scenes]
    return scenes + [Scene(pair, random.choice(STYLES), random.choice(list(COLORS))) for pair in pairs]


@torch.no_grad()
def accuracy(probe: EmojiProbe, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Fraction of right answers of each kind; `objects_of_a_pair` asks for both, `count` for their number."""
    right = answers(probe, scenes)
    parts = [probe(part) for part in images.split(64)]
    hits = {name: torch.cat([part[name].argmax(-1) for part in parts]) == right[name] for name in right}
    pair = right["second"] >= 0
    middle = right["place"] == probe.answers["place"].index("")

    def fraction(hit: Tensor, among: Tensor | slice) -> float:
        return hit[among].float().mean().item()

    return {
        "object_in_the_middle": fraction(hits["first"], middle),
        "object_aside": fraction(hits["first"], ~middle & ~pair),
        "objects_of_a_pair": fraction(hits["first"] & hits["second"], pair),
        "count": fraction(hits["number"], slice(None)),
        "place": fraction(hits["place"], ~pair),
        "background": fraction(hits["color"], slice(None)),
        "style": fraction(hits["style"], slice(None)),
    }


@torch.no_grad()
def judge(probe: EmojiProbe, data: ProbeScenes, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """Accuracy on the scenes: their true images, and these through the autoencoder."""
    true = data.scenes.render(scenes)
    decoded = torch.cat([data.through_autoencoder(part) for part in true.split(64)])
    return {
        "true_images": accuracy(probe, (true + 1) / 2, scenes),
        "through_autoencoder": accuracy(probe, (decoded + 1) / 2, scenes),
    }


def checks(scenes: list[Scene]) -> list[dict]:
    """What `diffusers_sana.evaluation.checks.read_checks` reads: prompts, seeds and what must be seen."""
    rows = []
    for seed, scene in enumerate(scenes):
        include: list[dict] = [{"class": label} for label in scene.labels]
        if len(include) == 2:
            include[1]["position"] = ["right of", 0]  # as all captions of the training have it
        elif scene.position:
            include[0]["place"] = scene.position.split(" ")[-1]
        tag = "two_object" if len(include) == 2 else "position" if scene.position else "single_object"
        seen = {"include": include, "total": len(include), "background": scene.color, "style": scene.style}
        rows.append({"tag": tag, "prompt": scene.prompt, "seed": seed, **seen})
    return rows


@torch.no_grad()
def reference_features(probe: EmojiProbe, data: ProbeScenes, count: int = 320) -> Tensor:
    """`[count, F]`, of true images: kinds of scenes in the proportions of `checks.jsonl`, but others, for FID and KID.

    The same scenes would not do: sets that belong together in pairs are nearer than two samples of one distribution.
    """
    left = {"middle": count * 45 // 80, "aside": count * 15 // 80, "pair": count * 20 // 80}
    scenes: list[Scene] = []
    while any(left.values()):
        scene = data.sample()
        kind = "pair" if len(scene.labels) == 2 else "aside" if scene.position else "middle"
        if left[kind]:
            left[kind] -= 1
            scenes.append(scene)
    return torch.cat([probe.features((part + 1) / 2) for part in data.scenes.render(scenes).split(64)])


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/emoji-probe", "folder of the probe")
    parser.add_argument("--steps", type=int, default=1500, help="of the training, 64 images each")
    parser.add_argument("--judge-only", action="store_true", help="of the probe that is in OUT")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    args = parser.parse_args(argv)
    art = EmojiArt(args.data)
    vae = AutoencoderDC.from_pretrained(SANA_EMOJI, subfolder="vae", dtype=torch.float32)
    labels = art.among(COMMON_OBJECTS)
    log = args.out / "training.json"
    if not args.judge_only:
        started = time.process_time()
        probe = train(ProbeScenes(EmojiScenes(art, seed=6, labels=labels), vae), args.steps)
        probe.half().save_pretrained(args.out)
        log.write_text(
            json.dumps({"steps": args.steps, "core_seconds": round(time.process_time() - started)}) + "\n",
            encoding="utf-8",
        )
    probe = EmojiProbe.from_pretrained(args.out).eval()  # judged as it is saved: rounded to 16 bit
    data = ProbeScenes(EmojiScenes(art, seed=7, labels=labels), vae)
    wanted = held_out_scenes(labels, singles=60, pairs=20)
    (args.out / "checks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checks(wanted)), encoding="utf-8")
    reference = reference_features(probe, data)
    save_file({"features": reference.half()}, args.out / "reference.safetensors")
    with torch.no_grad():
        true = probe.features((data.scenes.render(wanted) + 1) / 2)
    scenes = judged_scenes(labels)
    report = environment() | {"training": json.loads(log.read_text(encoding="utf-8")), "scenes": len(scenes)}
    report["true_images_of_checks"] = compare_sets(true, reference, ("fid", "kid"))  # as good as it gets
    report |= judge(probe, data, scenes)
    write_results("emoji_probe", report, args.results)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
