"""What the demo page says about the images it generates ("Ask about this image"): results/cpu/demo_answers.json.

    python -m benchmarks.demo_answers

One image for each of 50 prompts, whose objects are among the 57 that both bundled models were taught, with the page's
default steps and guidance in 16 bits. VILA-U is asked for the object and for the color of the background; an answer is
right if it is what the prompt says. The bundled probe judges too, which tells the generator's errors from VILA-U's.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import SanaPipeline, VilaUPipeline
from diffusers_sana.checkpoints import EMOJI_PROBE, SANA_EMOJI, VILA_U_EMOJI
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.images import to_pixels
from examples.train_emoji.scenes import OBJECTS, with_article
from examples.train_vila_u_emoji.data import TAUGHT


QUESTIONS = {"object": "What is this?", "background": "Which colour is the background?"}


def scenes(count: int, colors: tuple[str, ...]) -> list[dict[str, str]]:
    """Different objects in a fixed random order, each with a random color."""
    rng, names = random.Random(0), [name for name in TAUGHT if name in OBJECTS]
    return [{"object": name, "background": rng.choice(colors)} for name in rng.sample(names, count)]


def without_article(words: str) -> str:
    """ "an apple" as "apple": the models differ in which article a unicorn has."""
    return words.removeprefix("an ").removeprefix("a ")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50, help="at most the number of objects that both know")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(argv)

    generator = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.bfloat16)
    generator.set_progress_bar_config(disable=True)
    answerer = VilaUPipeline.from_pretrained(VILA_U_EMOJI, dtype=torch.float32)
    judge = EmojiProbe.from_pretrained(EMOJI_PROBE).eval()
    rows: list[dict[str, Any]] = []
    for seed, asked in enumerate(scenes(args.images, judge.answers["color"])):
        image = generator(
            f"{with_article(asked['object'])} on a {asked['background']} background",
            num_inference_steps=args.steps,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        said = {about: without_article(answerer.chat(image, question)) for about, question in QUESTIONS.items()}
        seen = judge.observe(to_pixels("image", image))[0]
        judged = {"object": seen.objects[0].label, "background": seen.background}
        rows.append({"asked": asked, "said": said, "judged": judged})

    def share(matches: list[bool]) -> float:
        return sum(matches) / len(matches)

    recognizable = [row for row in rows if row["judged"] == row["asked"]]
    report = environment() | {
        "images": len(rows),
        "steps": args.steps,
        "object_right": share([row["said"]["object"] == row["asked"]["object"] for row in rows]),
        "background_right": share([row["said"]["background"] == row["asked"]["background"] for row in rows]),
        "both_right": share([row["said"] == row["asked"] for row in rows]),
        "judge_finds_what_was_asked": len(recognizable) / len(rows),
        "both_right_where_the_judge_finds_it": share([row["said"] == row["asked"] for row in recognizable]),
        "not_right": [row for row in rows if row["said"] != row["asked"]],
    }
    print(json.dumps(report, indent=1))
    write_results("demo_answers", report, args.results)


if __name__ == "__main__":
    main()
