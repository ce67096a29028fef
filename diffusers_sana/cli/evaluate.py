"""`diffusers-sana evaluate`: measure how good a model's pictures are."""

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers_sana.cli.common import add_device, find_device
from diffusers_sana.loading import checkpoint_path, find_pipeline_class


MEASURES = ("scenes", "clip", "psnr", "ssim", "lpips", "fid", "kid")
OF_PAIRS, OF_SETS = ("psnr", "ssim", "lpips"), ("fid", "kid")
TRUE_FEATURES = "reference.safetensors"  # in the folder of the probe


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("model", help="Hub id or folder of a pipeline, or a bundled checkpoint")
    command.add_argument(
        "--out", type=Path, default=Path("outputs/evaluated"), metavar="DIR", help="pictures, report.json, report.md"
    )
    command.add_argument(
        "--checks", nargs="+", choices=MEASURES, help="what to measure; default: all that the other options allow"
    )
    command.add_argument(
        "--prompts",
        default=None,
        help="emoji, coco, or a file of checks (docs/evaluation.md); default: emoji for bundled models, else coco",
    )
    command.add_argument("--limit", type=int, metavar="N", help="only N of the prompts, evenly spread")
    command.add_argument("--quantize", choices=("int4", "nvfp4"), help="quantize the model first")
    command.add_argument("--steps", type=int, help="denoising steps; default: the pipeline's")
    command.add_argument("--guidance-scale", type=float, help="default: the pipeline's")
    command.add_argument("--batch-size", type=int, default=8, help="pictures drawn at a time")
    against = command.add_mutually_exclusive_group()
    against.add_argument(
        "--reference-model", metavar="MODEL", help="draws the same prompts and seeds, to compare with"
    )
    against.add_argument("--against", type=Path, metavar="FOLDER", help="of pictures to compare with")
    command.add_argument("--detector", metavar="MODEL", help="object detector of transformers, to judge coco prompts")
    command.add_argument("--threshold", type=float, default=0.3, help="least score of a detected object")
    command.add_argument("--clip", metavar="MODEL", help="CLIP of transformers, for clip and the colours of objects")
    command.add_argument(
        "--features", choices=("probe", "inception", "clip"), help="for fid and kid; default: probe for emoji"
    )
    command.add_argument("--inception", type=Path, metavar="FILE", help="weights of torch-fidelity's Inception")
    add_device(command, dtype="bfloat16")


def run(args: argparse.Namespace) -> None:
    """Draws pictures of pinned prompts and seeds, measures them and prints a table. Goes on where it was cut off."""
    from diffusers_sana.evaluation.report import markdown, write_report

    evaluation = Evaluation(args)  # everything that can be missing is missed before anything is drawn
    report = evaluation.report()
    path = write_report(report, args.out)
    print(markdown(report))
    print(path.resolve())


def spread(rows: Sequence[Any], limit: int | None) -> list[Any]:
    """`limit` of the rows, at even distances."""
    if limit is None or limit >= len(rows):
        return list(rows)
    if limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    return [rows[i * len(rows) // limit] for i in range(limit)]


class Evaluation:
    """What the options ask for; everything but the pipelines is loaded at once."""

    def __init__(self, args: argparse.Namespace):
        from diffusers_sana import checkpoints, evaluation
        from diffusers_sana.evaluation.checks import read_checks
        from diffusers_sana.evaluation.images import pictures_in

        self.args, self.device = args, find_device(args)
        prompts = args.prompts or ("emoji" if args.model in checkpoints.BUNDLED else "coco")
        self.emoji, self.probe_folder = prompts == "emoji", Path(checkpoints.__file__).parent / "emoji-probe"
        named = {"emoji": self.probe_folder / "checks.jsonl", "coco": Path(evaluation.__file__).parent / "coco.jsonl"}
        self.checks = spread(read_checks(named.get(prompts, Path(prompts))), args.limit)
        self.others = pictures_in(args.against) if args.against else None
        self.measures = args.checks or self._possible()
        self._check_options()
        self.clip = self._clip()
        self.observe = self._observer() if "scenes" in self.measures else None
        self.pairwise = self._pairwise()
        self.features = self._features() if set(OF_SETS) & set(self.measures) else None

    def _possible(self) -> list[str]:
        args, measures = self.args, []
        if self.emoji or args.detector:
            measures.append("scenes")
        if args.clip:
            measures.append("clip")
        if args.reference_model:
            measures += ["psnr", "ssim"]
        if self.emoji or (args.features and (args.reference_model or args.against)):
            measures.append("fid")
        if self.emoji or (args.features and args.against):
            measures.append("kid")
        if not measures:
            raise ValueError(
                "--checks has nothing to measure with: pass --detector MODEL, --clip MODEL, --reference-model MODEL, "
                "or --features with --against FOLDER; or --prompts emoji for a model that draws emoji"
            )
        return measures

    def _check_options(self) -> None:
        args, measures = self.args, set(self.measures)
        if measures & set(OF_PAIRS) and not (args.reference_model or args.against):
            raise ValueError(f"--checks {' '.join(OF_PAIRS)} need --reference-model MODEL or --against FOLDER")
        if measures & set(OF_PAIRS) and self.others is not None and len(self.others) != len(self.checks):
            raise ValueError(
                f"--against must be a folder of as many pictures as there are prompts, {len(self.checks)}, in their "
                f"order, for --checks {' '.join(OF_PAIRS)}; {args.against} has {len(self.others)}"
            )
        if "fid" in measures and not (self.emoji or args.reference_model or args.against):
            raise ValueError("--checks fid needs --reference-model MODEL or --against FOLDER")
        if "kid" in measures and not (self.emoji or args.against):
            raise ValueError(
                "--checks kid needs --against FOLDER: it is unbiased for independent sets, and pictures of "
                "--reference-model have the same seeds"
            )
        if "clip" in measures and not args.clip:
            raise ValueError("--checks clip needs --clip MODEL: a folder or name such as openai/clip-vit-base-patch16")
        if "scenes" in measures and not (self.emoji or args.detector):
            raise ValueError(
                "--checks scenes needs --detector MODEL, a folder or name such as facebook/detr-resnet-101, for "
                "prompts that are not --prompts emoji"
            )

    def _clip(self) -> Any:
        if self.args.clip is None:
            return None
        from diffusers_sana.evaluation.clip import Clip

        return Clip(self.args.clip, self.device)

    @cache  # noqa: B019, one evaluation a process
    def _probe(self) -> Any:
        from diffusers_sana.evaluation.emoji_probe import EmojiProbe

        return EmojiProbe.from_pretrained(self.probe_folder).eval()

    def _observer(self) -> Callable:
        if self.args.detector is None:
            return lambda pictures, checks: self._probe().observe(pictures)
        from diffusers_sana.evaluation.detector import Detector

        detector = Detector(self.args.detector, self.clip, self.args.threshold, device=self.device)
        detector.check_labels(self.checks)
        return detector.observe

    def _pairwise(self) -> dict[str, Callable]:
        from diffusers_sana.evaluation import similarity

        measures: dict[str, Callable] = {}
        if "psnr" in self.measures:
            measures["psnr_db"] = similarity.psnr
        if "ssim" in self.measures:
            measures["ssim"] = similarity.ssim
        if "lpips" in self.measures:
            measures["lpips"] = similarity.make_lpips(device=self.device)
        return measures

    def _features(self) -> Callable:
        name = self.args.features or ("probe" if self.emoji else "inception")
        if name == "probe":
            return self._probe().features
        if name == "clip":
            if self.clip is None:
                raise ValueError("--features clip needs --clip MODEL")
            return self.clip.features
        from diffusers_sana.evaluation.features import make_inception

        return make_inception(self.args.inception, self.device)

    def report(self) -> dict[str, Any]:
        """Draws and measures."""
        args = self.args
        name = f"{args.model}, {args.quantize}" if args.quantize else args.model
        paths = self._draw(args.model, args.quantize, args.out / "pictures")
        drawn, against = {name: paths}, {}
        if args.reference_model:
            reference = args.reference_model + (", reference" if args.reference_model == name else "")
            drawn[reference] = self._draw(args.reference_model, None, args.out / "reference")
            against[reference] = self._compare(paths, drawn[reference], set(self.measures) - {"kid"})
        if self.others is not None:
            against[str(args.against)] = self._compare(paths, self.others, set(self.measures))
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        settings |= {
            "run": None,
            "checks": self.measures,
            "prompts": args.prompts or ("emoji" if self.emoji else "coco"),
        }
        return {
            "settings": {key: value for key, value in settings.items() if value is not None} | {"device": self.device},
            "versions": {
                package: version(package) for package in ("diffusers_sana", "torch", "diffusers", "transformers")
            },
            "models": {name: self._alone(paths) for name, paths in drawn.items()},
            "against": against,
        }

    def _draw(self, model: str, quantize: str | None, folder: Path) -> list[Path]:
        from diffusers_sana.evaluation.images import draw_missing
        from diffusers_sana.files import model_identity

        options = {"num_inference_steps": self.args.steps, "guidance_scale": self.args.guidance_scale}
        options = {key: value for key, value in options.items() if value is not None}
        load = cache(lambda: _pipeline(model, quantize, self.args.dtype, self.device))

        def draw(prompts: list[str], seeds: list[int]) -> Any:
            import torch

            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]  # same noise on every device
            return load()(prompts, generator=generators, return_dict=False, **options)[0]

        return draw_missing(
            draw,
            [check.prompt for check in self.checks],
            [check.seed for check in self.checks],
            folder,
            {
                "model": model,
                "model_files": model_identity(checkpoint_path(model)),
                "quantize": quantize,
                "dtype": self.args.dtype,
                "options": options,
            },
            self.args.batch_size,
            f"drawing with {model}" + (f" in {quantize}" if quantize else ""),
        )

    def _alone(self, paths: list[Path]) -> dict[str, Any]:
        """Figures of one model's pictures."""
        from diffusers_sana.evaluation import measure

        figures: dict[str, Any] = {}
        if self.observe:
            figures["scenes"] = measure.judge_scenes(paths, self.checks, self.observe)
        if "clip" in self.measures:
            prompts = [check.prompt for check in self.checks]
            figures["clip_score"] = measure.mean_clip_score(paths, prompts, self.clip.scores)
        if self.features and self.emoji and self.args.features in (None, "probe"):
            from safetensors.torch import load_file

            true = load_file(self.probe_folder / TRUE_FEATURES)["features"]
            figures["true_pictures"] = measure.compare_sets(
                measure.collect_features(paths, self.features), true, self.measures
            )
        return figures

    def _compare(self, paths: list[Path], others: list[Path], measures: set[str]) -> dict[str, Any]:
        """Figures of one model's pictures beside others."""
        from diffusers_sana.evaluation import measure

        figures: dict[str, Any] = {}
        if self.pairwise:
            figures |= measure.compare_pairs(paths, others, self.pairwise)
        if self.features and measures & set(OF_SETS):
            ours, theirs = (measure.collect_features(files, self.features) for files in (paths, others))
            figures |= measure.compare_sets(ours, theirs, measures)
        return figures


def _pipeline(model: str, quantize: str | None, dtype: str, device: str) -> Any:
    import torch

    from diffusers_sana import SVDQuantConfig
    from diffusers_sana import quantize as quantize_pipeline

    model = checkpoint_path(model)
    pipe = find_pipeline_class(model).from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)
    if quantize:
        quantize_pipeline(pipe, SVDQuantConfig(precision=quantize), progress=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
