"""A whole evaluation: generate images of fixed prompts and seeds, measure them, report the figures.

    report = evaluate(EvaluationConfig(model="sana-emoji"))

Legend: N images, H/W height and width, F features.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusers_sana import SVDQuantConfig
from diffusers_sana import quantize as quantize_pipeline
from diffusers_sana.arguments import find_device
from diffusers_sana.checkpoints import EMOJI_PROBE
from diffusers_sana.evaluation import measure, similarity
from diffusers_sana.evaluation.clip import Clip
from diffusers_sana.evaluation.config import JUDGES, OF_SETS, EvaluationConfig
from diffusers_sana.evaluation.detector import Detector
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.evaluation.features import Features, make_inception
from diffusers_sana.evaluation.images import generate_missing
from diffusers_sana.evaluation.judges import Judge, judged, make_judge
from diffusers_sana.evaluation.machine import versions
from diffusers_sana.evaluation.paired import compare_reports, differences, figures_by_prompt
from diffusers_sana.evaluation.vqa import Vqa, make_vqa, vqa_scores
from diffusers_sana.loading import find_pipeline_class, identity, load_on


TRUE_FEATURES = Path(EMOJI_PROBE) / "reference.safetensors"  # of renderings of the emoji themselves
NO_HUB_OPTIONS: Mapping[str, str | None] = {"revision": None, "variant": None}


@dataclass(frozen=True)
class Networks:
    """What an evaluation measures with, loaded; each part is None or empty where nothing needs it.

    Attributes:
        observe: images and their checks to what is seen in the images.
        clip: names colors.
        judges: name of a figure -> function of images and their prompts to scores.
        vqa: answers questions about images.
        pairwise: name of a figure -> function of two sets of images.
        features: network behind FID and KID.
        true_features: `[N, F]` of true emoji, for `features`.
    """

    observe: measure.Observe | None
    clip: Clip | None
    judges: dict[str, Judge]
    vqa: Vqa | None
    pairwise: dict[str, Callable[[Tensor, Tensor], Tensor]]
    features: Features | None
    true_features: Tensor | None


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Generates the images that are missing in `config.out`, and measures all of them.

    An evaluation that was stopped continues where it stopped, in the same batches and therefore with the same bits.

    Returns:
        The report: `settings`, `versions`, `images` (their prompts and seeds), `models` (figures of each model's
        images) and `against` (figures against other images, and differences from their figures, see `paired`).
        `report.markdown` makes a page of it.

    Raises:
        ValueError: a network cannot measure what is asked for, or `config.out` holds images of other settings.
        OSError: there is no such model.
    """
    networks = load_networks(config)  # whatever can be missing is missed before anything is generated
    name = f"{config.model}, {config.quantize}" if config.quantize else config.model
    hub = {"revision": config.revision, "variant": config.variant}
    paths = generate(config, config.model, config.quantize, config.out / "images", hub)
    generated, against = {name: paths}, {}
    if config.reference_model:
        reference = config.reference_model + (", reference" if config.reference_model == name else "")
        generated[reference] = generate(config, config.reference_model, None, config.out / "reference")
        # Without KID, which is unbiased for independent sets: these have the same seeds.
        measures = set(config.measures) - {"kid"}
        against[reference] = compare(networks, paths, generated[reference], measures)
    if config.others is not None:
        against[str(config.against)] = compare(networks, paths, config.others, set(config.measures))
    report: dict[str, Any] = {
        "settings": settings(config),
        "versions": versions(),
        "images": [{"prompt": task.prompt, "seed": task.seed, "tag": task.tag} for task in config.tasks],
        "models": {name: measure_alone(config, networks, paths) for name, paths in generated.items()},
        "against": against,
    }
    ours, *references = (figures_by_prompt(figures, report["images"]) for figures in report["models"].values())
    for name, figures in zip(list(generated)[1:], references, strict=True):
        against[name]["differences"] = differences(ours, figures)
    if config.other_report:
        against[str(config.against)] = {"differences": compare_reports(report, config.other_report)}
    return report


def load_networks(config: EvaluationConfig) -> Networks:
    """The networks that the measures of `config` need."""
    device = find_device(config.device)
    clip = Clip(config.clip, device) if config.clip else None
    probe = cache(lambda: EmojiProbe.from_pretrained(EMOJI_PROBE).eval())

    observe: measure.Observe | None = None
    if "scenes" in config.measures and config.detector:
        detector = Detector(config.detector, clip, config.threshold, device=device)
        detector.check_labels(config.tasks)
        observe = detector.observe
    elif "scenes" in config.measures:
        observe = lambda images, checks: probe().observe(images)  # noqa: E731

    make_features: dict[str, Callable[[], Features]] = {
        "probe": lambda: probe().features,
        "clip": lambda: clip.features,  # type: ignore[union-attr]  # the config asks for it
        "inception": lambda: make_inception(config.inception, device),
    }
    vqa = make_vqa(config.vqa, device) if config.vqa and {"vqascore", "dpg"} & set(config.measures) else None
    judges: dict[str, Judge] = {}
    if clip and "clip" in config.measures:
        judges["clip_score"] = clip.scores
    for name in [name for name in JUDGES if name in config.measures]:
        judges[name] = vqa_scores(vqa) if name == "vqascore" and vqa else make_judge(name, device=device)
    make_pairwise: dict[str, tuple[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]]] = {
        "psnr": ("psnr_db", lambda: similarity.psnr),
        "ssim": ("ssim", lambda: similarity.ssim),
        "lpips": ("lpips", lambda: similarity.make_lpips(device=device)),
    }
    network = config.feature_network
    return Networks(
        observe,
        clip,
        judges,
        vqa,
        {label: make() for name, (label, make) in make_pairwise.items() if name in config.measures},
        make_features[network]() if network else None,
        load_file(TRUE_FEATURES)["features"] if network == "probe" and config.of_emoji else None,
    )


def generate(
    config: EvaluationConfig,
    model: str,
    quantize: str | None,
    folder: Path,
    hub: Mapping[str, str | None] = NO_HUB_OPTIONS,
) -> list[Path]:
    """The images of all prompts by one model, in `folder`; only those are generated that are not there."""
    options = {"num_inference_steps": config.steps, "guidance_scale": config.guidance_scale}
    options = {key: value for key, value in options.items() if value is not None}
    load = cache(lambda: load_pipeline(model, quantize, config.dtype, find_device(config.device), hub))

    def generate_batch(prompts: list[str], seeds: list[int]) -> Any:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]  # same noise on every device
        return load()(prompts, generator=generators, return_dict=False, **options)[0]

    return generate_missing(
        generate_batch,
        [task.prompt for task in config.tasks],
        [task.seed for task in config.tasks],
        folder,
        {
            "model": model,
            "model_files": identity(model, hub["revision"]),
            "variant": hub["variant"],
            "quantize": quantize,
            "dtype": config.dtype,
            "options": options,
        },
        config.batch_size,
        f"{model}, {quantize}" if quantize else model,
    )


def load_pipeline(
    model: str, quantize: str | None, dtype: str, device: str, hub: Mapping[str, str | None] = NO_HUB_OPTIONS
) -> Any:
    """A pipeline on its device, quantized if asked for."""
    pipe = load_on(device, find_pipeline_class(model, hub["revision"]), model, dtype, **hub)
    if quantize:
        quantize_pipeline(pipe, SVDQuantConfig(precision=quantize), progress=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_alone(config: EvaluationConfig, networks: Networks, paths: list[Path]) -> dict[str, Any]:
    """Figures of one model's images."""
    figures: dict[str, Any] = {}
    if networks.observe:
        figures["scenes"] = measure.check_scenes(paths, config.tasks, networks.observe)
    prompts = [task.prompt for task in config.tasks]
    per_image: dict[str, list[float]] = {}
    for name, judge in networks.judges.items():
        per_image[name] = measure.score_images(paths, prompts, partial(judged, judge))
    if networks.vqa and "dpg" in config.measures:
        found = measure.ask_questions(paths, config.questioned, networks.vqa)
        per_image["dpg"] = found["scores"]
        figures |= {"dpg_by_category": found["by_category"], "dpg_answers": found["answers"]}
    for name, values in per_image.items():
        figures |= measure.mean_of(name, values)
    figures |= {"per_image": per_image} if per_image else {}
    if networks.features and networks.true_features is not None:
        features = measure.collect_features(paths, networks.features)
        figures["true_images"] = measure.compare_sets(features, networks.true_features, config.measures)
    return figures


def compare(networks: Networks, paths: list[Path], others: list[Path], measures: set[str]) -> dict[str, Any]:
    """Figures of one model's images against other images."""
    figures: dict[str, Any] = {}
    if networks.pairwise:
        figures |= measure.compare_pairs(paths, others, networks.pairwise)
    if networks.features and measures & set(OF_SETS):
        ours, theirs = (measure.collect_features(files, networks.features) for files in (paths, others))
        figures |= measure.compare_sets(ours, theirs, measures)
    return figures


def settings(config: EvaluationConfig) -> dict[str, Any]:
    """The arguments of an evaluation with their defaults filled in, for the report."""
    filled = {"checks": list(config.measures), "prompts": config.prompt_set, "device": find_device(config.device)}
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return {key: value for key, value in (arguments | filled).items() if value is not None}
