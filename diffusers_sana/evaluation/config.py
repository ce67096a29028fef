"""What an evaluation measures, and with what; checked before torch is imported and before anything is generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from diffusers_sana.checkpoints import BUNDLED, EMOJI_PROBE
from diffusers_sana.checks import check_integer, check_number
from diffusers_sana.evaluation.checks import Check, check_detectable, read_checks
from diffusers_sana.evaluation.dpg import Questioned, read_questions
from diffusers_sana.evaluation.optional import check_installed
from diffusers_sana.evaluation.report import read_report
from diffusers_sana.files import IMAGE_SUFFIXES
from diffusers_sana.loading import check_version, checkpoint_path, pipeline_class_name


JUDGES = ("pickscore", "hpsv2", "imagereward", "vqascore")
OF_PAIRS, OF_SETS = ("psnr", "ssim", "lpips"), ("fid", "kid")
MEASURES = ("scenes", "clip", *JUDGES, "dpg", *OF_PAIRS, *OF_SETS)
FEATURES = ("probe", "inception", "clip")
PROMPTS = {"emoji": Path(EMOJI_PROBE) / "checks.jsonl", "coco": Path(__file__).parent / "coco.jsonl"}
# Measure or features -> the package it needs, which is not among our dependencies.
PACKAGES = {
    "ssim": "skimage",
    "lpips": "lpips",
    "inception": "torch_fidelity",
    "hpsv2": "hpsv2",
    "imagereward": "ImageReward",
}

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """An evaluation of a pipeline.

    Args:
        model: Hub id or folder of a pipeline, or the name of a bundled checkpoint.
        out: folder for the images and the report.
        checks: what to measure, of `MEASURES`. None: all that the other options allow.
        prompts: "emoji", "coco", a file of checks (docs/evaluation.md), or dpg_bench.csv, the questions of DPG-Bench.
            None: "emoji" for bundled models, else "coco".
        limit: use only so many of the prompts, evenly spread.
        quantize: "int4", "nvfp4" or "int8" to quantize the model first.
        steps, guidance_scale: None takes the pipeline's default.
        batch_size: images generated at a time.
        revision: of `model`: branch, tag or commit on the Hub.
        variant: of the weights of `model`, such as "fp16".
        reference_model: generates the same prompts and seeds, to compare with.
        against: folder of images to compare with, or report.json of another evaluation of the same prompts; not
            together with `reference_model`.
        detector: object detection model of transformers, for `scenes` of other prompts than "emoji".
        threshold: least score of a detected object.
        clip: CLIP model of transformers, for `clip` and for the colors of objects.
        vqa: vision-language model of transformers, or "module:function", for `vqascore` and `dpg`; see `vqa.Vqa`.
        features: of `FEATURES`, for `fid` and `kid`. None: "probe" for emoji, else "inception".
        inception: file with the weights of torch-fidelity's Inception. None: it downloads them.
        device: None is the GPU, if there is one.
        dtype: of the pipelines.

    Raises:
        ValueError: what is to be measured needs an argument or a package that is missing, or a value is out of range.
        OSError: a file or model that is named does not exist.
    """

    model: str
    out: Path = Path("outputs/evaluated")
    checks: Sequence[str] | None = None
    prompts: str | None = None
    limit: int | None = None
    quantize: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 8
    revision: str | None = None
    variant: str | None = None
    reference_model: str | None = None
    against: Path | None = None
    detector: str | None = None
    threshold: float = 0.3
    clip: str | None = None
    vqa: str | None = None
    features: str | None = None
    inception: Path | None = None
    device: str | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("limit", "steps", "batch_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale)
        check_number("threshold", self.threshold, at_least=0, at_most=1)
        if unknown := set(self.checks or ()) - set(MEASURES):
            raise ValueError(f"`checks` must be of {', '.join(MEASURES)}, got {', '.join(sorted(unknown))}.")
        if self.features not in (None, *FEATURES):
            raise ValueError(f"`features` must be one of {', '.join(FEATURES)}, got {self.features!r}.")
        if self.reference_model and self.against:
            raise ValueError("`reference_model` and `against` must not both be given; leave one out.")
        self.tasks, self.others, self.other_report  # noqa: B018, read now: a damaged file is an error at once
        self._check_measures()
        pipeline_class_name(self.model, self.revision)
        check_version(self.model, self.revision, self.variant)
        if self.reference_model:
            pipeline_class_name(self.reference_model)

    @property
    def of_emoji(self) -> bool:
        """Whether the prompts are those of the bundled models, which a bundled network checks."""
        return self.prompt_set == "emoji"

    @property
    def prompt_set(self) -> str:
        """`prompts`, or its default."""
        return self.prompts or ("emoji" if checkpoint_path(self.model) in BUNDLED.values() else "coco")

    @cached_property
    def tasks(self) -> list[Check]:
        """The prompts, their seeds, and what their images must show."""
        if self._has_questions:
            every = [Check("dpg", asked.prompt, seed, ()) for seed, asked in enumerate(self._every_questioned)]
            return spread(every, self.limit)
        return spread(read_checks(PROMPTS.get(self.prompt_set, Path(self.prompt_set))), self.limit)

    @property
    def questioned(self) -> list[Questioned]:
        """The prompts of DPG-Bench with their questions; none of other prompts."""
        return spread(self._every_questioned, self.limit) if self._has_questions else []

    @property
    def _has_questions(self) -> bool:
        return Path(self.prompt_set).suffix == ".csv"

    @cached_property
    def _every_questioned(self) -> list[Questioned]:
        return read_questions(Path(self.prompt_set))

    @cached_property
    def others(self) -> list[Path] | None:
        """The images in `against`, where that is a folder."""
        return images_in(self.against) if self.against and self.against.suffix != ".json" else None

    @cached_property
    def other_report(self) -> dict[str, Any] | None:
        """The report that `against` is, where it is one."""
        return read_report(self.against) if self.against and self.against.suffix == ".json" else None

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """`checks`, or all that the other arguments allow."""
        if self.checks is not None:
            return tuple(self.checks)
        is_set = len(self.tasks) > 1
        is_possible = {
            "scenes": self.of_emoji or (self.detector and not self._has_questions),
            "clip": self.clip,
            "vqascore": self.vqa and not self._has_questions,
            "dpg": self.vqa and self._has_questions,
            "psnr": self.reference_model,
            "ssim": self.reference_model,
            "fid": is_set and (self.of_emoji or (self.features and (self.reference_model or self.others))),
            "kid": is_set and (self.of_emoji or (self.features and self.others)),
        }
        return tuple(name for name in MEASURES if is_possible.get(name))

    @property
    def feature_network(self) -> str | None:
        """The network behind `fid` and `kid`, None where neither is measured."""
        if not set(OF_SETS) & set(self.measures):
            return None
        return self.features or ("probe" if self.of_emoji else "inception")

    def _check_measures(self) -> None:
        measures = set(self.measures)
        if not measures:
            raise ValueError(
                "`checks` has nothing to measure with: pass `detector`, `clip`, `vqa`, `reference_model`, or "
                "`features` with `against`; or `prompts` emoji for a model that generates emoji"
            )
        if measures & set(OF_PAIRS):
            if not (self.reference_model or self.others):
                raise ValueError(f"`checks` {' '.join(OF_PAIRS)} need `reference_model` or `against` with images")
            if self.others is not None and len(self.others) != len(self.tasks):
                raise ValueError(
                    f"`against` must be a folder of as many images as there are prompts, {len(self.tasks)}, in their "
                    f"order, for `checks` {' '.join(OF_PAIRS)}; {self.against} has {len(self.others)}"
                )
        if (of_sets := [name for name in OF_SETS if name in measures]) and len(self.tasks) < 2:
            advice = "give more `prompts`" if self.limit is None else "raise `limit`"
            raise ValueError(f"`checks` {' '.join(of_sets)} must be of two prompts or more, got one; {advice}")
        if "fid" in measures and not (self.of_emoji or self.reference_model or self.others):
            raise ValueError("`checks` fid needs `reference_model` or `against` with images")
        if "kid" in measures and not (self.of_emoji or self.others):
            raise ValueError(
                "`checks` kid needs `against` with images: it is unbiased for independent sets, and the images of "
                "`reference_model` have the same seeds"
            )
        if not self.clip and ("clip" in measures or self.feature_network == "clip"):
            asked = "`checks` clip" if "clip" in measures else "`features` clip"
            raise ValueError(f"{asked} needs `clip`: a folder or name such as openai/clip-vit-base-patch16")
        if answered := [name for name in ("vqascore", "dpg") if name in measures and not self.vqa]:
            raise ValueError(
                f"`checks` {answered[0]} needs `vqa`: a folder or name such as llava-hf/llava-1.5-7b-hf, or "
                "module:function"
            )
        if ("dpg" in measures) > self._has_questions or ("scenes" in measures and self._has_questions):
            raise ValueError(
                "`checks` dpg, and not scenes, must be measured of the prompts and questions of DPG-Bench, `prompts` "
                f"dpg_bench.csv; got `prompts` {self.prompt_set}"
            )
        if self.other_report and not {image["prompt"] for image in self.other_report["images"]} & {
            task.prompt for task in self.tasks
        }:
            raise ValueError(f"`against` must be a report of some of the same prompts, but {self.against} has none")
        if "scenes" in measures and not (self.of_emoji or self.detector):
            raise ValueError(
                "`checks` scenes needs `detector`, a folder or name such as facebook/detr-resnet-101, for prompts "
                "other than `prompts` emoji"
            )
        for name in (*self.measures, self.feature_network):
            if name in PACKAGES:
                check_installed(PACKAGES[name], f"`{'features' if name in FEATURES else 'checks'}` {name}")
        if "scenes" in measures and self.detector:
            check_detectable(self.tasks, has_clip=self.clip is not None)


def spread(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """`limit` of the rows, at even distances; None: all."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def images_in(folder: Path) -> list[Path]:
    """All image files of a folder, sorted by name; hidden ones, which a killed process may leave, are left out.

    Raises:
        OSError: where there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise OSError(f"`folder` must be a folder of images, but there is no folder {folder}")
    found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    paths = sorted(path for path in found if not path.name.startswith("."))
    if not paths:
        raise OSError(f"`folder` must have images in it ({', '.join(IMAGE_SUFFIXES)}), but {folder} has none")
    return paths
