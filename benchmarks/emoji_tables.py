"""The tables about the bundled checkpoints, for `benchmarks.tables`."""

from collections.abc import Callable
from typing import Any

from benchmarks.markdown import render, results


# Questions about an image: as the pages name them -> as `examples.train_emoji.judge.accuracy` does.
QUESTIONS = {
    "object, alone": "object",
    "object, small and at one side": "object_aside",
    "both objects of a pair, on the right sides": "objects_of_a_pair",
    "object of which there are several": "counted_object",
    "how many": "number",
    "place": "place",
    "background": "background",
    "style": "style",
}


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def judge_accuracy() -> str:
    """How often the judge is right about true images."""
    report = results("cpu/emoji_judge")
    columns = ("true_images", "through_autoencoder")
    rows = [
        [asked, *(f"{100 * report[column][name]:.1f} %" for column in columns)] for asked, name in QUESTIONS.items()
    ]
    training = report["training"]
    return (
        f"{render(['right answers', 'true images', 'through the autoencoder'], rows)}\n\n"
        f"{report['scenes']} scenes that neither the judge nor the models were trained on; {training['steps']} steps,"
        f" {training['core_seconds'] / 60:.0f} minutes of one core."
    )


def scenes_right() -> str:
    """What the bundled checkpoint gets right, in 16 and in 4 bits."""
    report = results("cpu/evaluate_emoji")
    half, four = (report["models"][name] for name in ("sana-emoji", "sana-emoji, int4"))
    kinds = {
        "single_object": "prompts of one object",
        "position": "prompts of one object at a side",
        "two_object": "prompts of two objects",
        "counting": "prompts of two or three equal objects",
    }

    def row(name: str, of: Callable[[dict[str, Any]], dict[str, Any]]) -> list[str]:
        return [
            name,
            *(f"{percent(of(model['scenes'])['share'])} of {of(model['scenes'])['of']}" for model in (half, four)),
        ]

    rows = [row("everything the prompt asks for", lambda scenes: scenes["correct"])]
    rows += [row(shown, lambda scenes, tag=tag: scenes["by_tag"][tag]) for tag, shown in kinds.items()]
    rows += [
        row(f"right {name}", lambda scenes, name=name: scenes["by_property"][name])
        for name in half["scenes"]["by_property"]
    ]
    true = [model["true_images"] for model in (half, four)]
    rows.append(["FID to true images", *(f"{each['fid']:.1f}" for each in true)])
    rows.append(["KID to true images", *(f"{each['kid']:.3f} ± {each['kid_deviation']:.3f}" for each in true)])
    to_half = report["against"]["sana-emoji"]
    rows.append(["PSNR to bf16", "", f"{to_half['psnr_db']:.1f} dB"])
    rows.append(["SSIM to bf16", "", f"{to_half['ssim']:.4f}"])
    return render(["", "bf16", "int4"], rows)


def sprint_accuracy() -> str:
    """The student at each number of steps beside its teacher."""
    report = results("cpu/emoji_sprint")
    asked = {name: QUESTIONS[name] for name in QUESTIONS if name not in ("how many", "place")}
    rows = [
        [row.replace("_", " ").replace("1 steps", "1 step"), *(percent(report[row][name]) for name in asked.values())]
        for row in report["rows"]
    ]
    return render([f"{report['prompts']} held-out prompts", *asked], rows)


def edges_followed() -> str:
    """How well the edges of generated images agree with those asked for."""
    report = results("cpu/emoji_edges")
    kinds = {"all": "all", "object": "one", "position": "one at a side", "pair": "two", "count": "equal ones"}
    rows = [
        [name.replace("_", " "), *(f"{cosines[kind]:.2f}" for kind in kinds)]
        for name, cosines in report["mean_cosine_of_edges"].items()
    ]
    return render([f"mean cosine of edges, {report['scenes']} held-out scenes", *kinds.values()], rows)


def pixel_art() -> str:
    """How much the images of the LoRA are pixel art, and whether they still show what was asked for."""
    figures = results("cpu/lora_pixel_art")["figures"]
    rows = [
        [
            name.replace("_", " "),
            f"{row['variance_within_large_pixels']:.3f}",
            f"{row['differences_on_their_grid']:.3f}",
            percent(row["object"]),
        ]
        for name, row in figures.items()
    ]
    return render(["", "variance within large pixels", "differences on their grid", "object"], rows)


TABLES = {
    "judge_accuracy": judge_accuracy,
    "scenes_right": scenes_right,
    "sprint_accuracy": sprint_accuracy,
    "edges_followed": edges_followed,
    "pixel_art": pixel_art,
}
