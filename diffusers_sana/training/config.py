"""Options of a training as dataclasses, the command line made from them, and what a resumed run compares.

Options come in groups: `TrainingConfig` and its subclasses say how to train, others which data and which models a
script loads. Nothing here imports torch, so a mistyped option costs a fraction of a second.
"""

import argparse
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusers_sana.arguments import ArgumentParser
from diffusers_sana.files import UserError, differences
from diffusers_sana.training.run_folder import check_run_folder


OPTIMIZERS = ("adamw", "adamw8bit", "came", "lion", "lion8bit", "muon", "prodigy", "schedulefree")
PERCEPTUAL = ("random", "lpips")


# Trackers of Accelerate -> the packages of which one is needed.
TRACKER_PACKAGES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


class RunError(UserError):
    """A run that cannot continue; the message says why, what is safe, and what to do."""


def option(default: Any, help: str, changeable: bool = False, choices: tuple[Any, ...] = ()) -> Any:
    """A dataclass field whose help text is shown on the command line.

    Args:
        default: its value.
        help: its help text.
        changeable: whether a run may be resumed with another value, which then holds from there on. False for what
            defines the model, what it starts from, or the order of the data.
        choices: the values it may have; empty for any.
    """
    return field(default=default, metadata={"help": help, "changeable": changeable, "choices": choices})


@dataclass(kw_only=True)
class Options:
    """A group of options; raises a ValueError for a value that is not among the choices of its option."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if choices := item.metadata.get("choices"):
                check_choice(item.name, getattr(self, item.name), choices)


@dataclass(kw_only=True)
class TrainingConfig(Options):
    """Budget, optimizer, precision and outputs of a training run.

    The run ends when `max_steps` or `max_minutes` is reached, whichever is first. The learning rate follows the
    larger of the two fractions of the budget used, so that a cosine also ends where the clock ends.
    """

    output_dir: str = option("outputs/training", "folder for checkpoints, samples, log and result", changeable=True)
    max_steps: int = option(100_000, "optimizer steps", changeable=True)
    max_minutes: float | None = option(
        None, "stop after this many minutes of training, resumed time included", changeable=True
    )
    optimizer: str = option(
        "adamw",
        "`adamw`, `came`, `lion`, `muon`, `prodigy`, `schedulefree`, or `adamw8bit` or `lion8bit` with a quarter of"
        " the memory; all but `adamw` and `muon` need a package",
        choices=OPTIMIZERS,
    )
    learning_rate: float = option(1e-4, "peak learning rate; a factor of about 1 for `prodigy`", changeable=True)
    lr_schedule: str = option(
        "constant", "`constant` or `cosine`, after the warm-up", changeable=True, choices=("constant", "cosine")
    )
    warmup_steps: int = option(0, "steps of linear warm-up", changeable=True)
    betas: tuple[float, float] = option((0.9, 0.999), "the optimizer's betas", changeable=True)
    weight_decay: float = option(0.0, "weight decay of matrices and kernels", changeable=True)
    max_grad_norm: float = option(1.0, "clip the gradient norm; 0 does not clip", changeable=True)
    max_skipped_steps: int = option(
        20, "end the run after this many steps in a row whose gradients are NaN or infinite", changeable=True
    )
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", changeable=True)
    mixed_precision: str = option(
        "no", "`no` or `bf16` autocast; fp16 overflows in Sana", changeable=True, choices=("no", "bf16")
    )
    ema_decay: float = option(
        0.0, "decay of the EMA weights that are saved; 0 saves the trained weights", changeable=True
    )
    compile: bool = option(False, "torch.compile the model's parts in place", changeable=True)
    seed: int = option(0, "seed of all random numbers")
    resume: bool = option(False, "continue from the newest checkpoint in the output folder", changeable=True)
    save_minutes: float = option(10.0, "minutes between checkpoints", changeable=True)
    keep_checkpoints: int = option(2, "number of newest checkpoints to keep", changeable=True)
    sample_minutes: float = option(5.0, "minutes between sample grids", changeable=True)
    log_every: int = option(10, "steps between lines of log.jsonl", changeable=True)
    report_to: tuple[str, ...] = option(
        (), "trackers that log and sample grids also go to, such as `tensorboard`, `wandb`, `trackio`", changeable=True
    )
    tracker_project: str = option("diffusers_sana", "name of the project in the trackers", changeable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, got {self.max_steps}. Use `max_minutes` to limit time.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}. Use 0 to switch it off.")
        if self.optimizer == "prodigy" and (self.learning_rate or 0) < 0.1:
            raise ValueError(
                f"`learning_rate` must be about 1 with `optimizer` 'prodigy', got {self.learning_rate}: it is a "
                "factor on the rate that Prodigy finds. Pass --learning-rate 1."
            )
        if self.optimizer == "schedulefree" and (self.lr_schedule != "constant" or self.ema_decay):
            raise ValueError(
                f"`lr_schedule` must be 'constant' and `ema_decay` 0 with `optimizer` 'schedulefree', whose average "
                f"takes the place of both, got {self.lr_schedule!r} and {self.ema_decay}. Pass both."
            )
        for name in self.report_to:
            packages = TRACKER_PACKAGES.get(name, ())
            if packages and not any(find_spec(package) for package in packages):
                raise ValueError(
                    f"`report_to` {name!r} needs a package that is not installed. `pip install {packages[0]}`, or "
                    "leave it out: log.jsonl is always written."
                )
        check_positive(self, "max_skipped_steps", "gradient_accumulation_steps", "keep_checkpoints", "log_every")


@dataclass(kw_only=True)
class ImageDataOptions(Options):
    """Images to train on."""

    data: str = option(
        "",
        "folder of images; WebDataset tars such as `shards/{000..099}.tar`; or the name of a dataset of the Hub",
        changeable=True,
    )
    data_split: str = option("train", "split of the dataset, or of a folder that has some")
    data_config: str = option("", "configuration of a dataset of the Hub")
    image_column: str = option("", "column of the images; default: the only one")
    caption_column: str = option("", "column of the captions; default: `text` or `caption`")
    allow_outside: bool = option(
        False, "read images outside of the data folder that its metadata names", changeable=True
    )
    batch_size: int = option(16, "images per batch and process")
    num_workers: int = option(4, "processes that load images", changeable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError(
                "`data` must be a folder of images, WebDataset tars or the name of a dataset of the Hub, got ''."
                " Pass --data."
            )
        if ".tar" not in self.data:
            check_exists("data", self.data)
        check_positive(self, "batch_size")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise a ValueError that names the argument and lists what it may be."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}. Use one of these.")


def check_positive(options: Any, *names: str) -> None:
    """Raise a ValueError that names the first of these integer options that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(options, name)}.")


def check_exists(name: str, place: str) -> None:
    """Raise a ValueError for a local path that does not exist. `owner/name` may be a repository of the Hub."""
    is_local = Path(place).is_absolute() or place.startswith((".", "~")) or len(Path(place).parts) > 2
    if is_local and not Path(place).exists():
        raise ValueError(f"`{name}` is {place!r}, but there is no such file or folder. Check the path.")


def check_file(name: str, place: str) -> None:
    """Raise a ValueError where a file is named that does not exist."""
    if place and not Path(place).is_file():
        raise ValueError(f"`{name}` must be a file, but there is no file {place!r}. Check the path.")


def check_one_of(options: Any, *names: str) -> None:
    """Raise a ValueError unless exactly one of these options is given."""
    given = [name for name in names if getattr(options, name)]
    if len(given) != 1:
        listed = f"{', '.join(f'`{name}`' for name in names[:-1])} and `{names[-1]}`"
        got = " and ".join(f"`{name}`" for name in given) or "none"
        raise ValueError(f"exactly one of {listed} must be given, got {got}. Pass one of them.")


def check_pretrained(place: str, what: str = "a SanaPipeline folder or repository") -> None:
    """Raise a ValueError where `pretrained` is not given, or is a local folder that does not exist."""
    if not place:
        raise ValueError(f"`pretrained` must be {what}, got ''. Pass --pretrained.")
    check_exists("pretrained", place)


def record(groups: Sequence[Any]) -> dict[str, Any]:
    """The options of all groups by name, as after a round trip through JSON: tuples are lists."""
    values = {name: value for group in groups for name, value in asdict(group).items()}
    return json.loads(json.dumps(values, default=str))


def check_resumable(groups: Sequence[Any], recorded: Mapping[str, Any]) -> list[str]:
    """What differs from the options that a run began with, one phrase each, where it may differ.

    Args:
        groups: option dataclasses, the `TrainingConfig` first.
        recorded: a `record`. An option that it lacks, since it is newer than the run, had its default.

    Raises:
        ValueError: an option differs that must not.
    """
    now, items = record(groups), [item for group in groups for item in fields(group)]
    defaults = json.loads(json.dumps({item.name: item.default for item in items}, default=str))
    changed: dict[bool, list[str]] = {True: [], False: []}
    for item in items:
        before = recorded.get(item.name, defaults[item.name])
        if item.name not in ("output_dir", "resume"):  # which say nothing about the training
            may_change = item.metadata.get("changeable", False)
            changed[may_change] += differences({item.name: before}, {item.name: now[item.name]})
    if changed[False]:
        raise ValueError(
            f"a run must be resumed with the settings it began with: {'; '.join(changed[False])}. Use the old "
            f"values, or begin a new run in another folder, from {groups[0].output_dir}/model."
        )
    return changed[True]


def parse_options(
    groups: Sequence[type], arguments: Sequence[str] | None = None, description: str | None = None
) -> list[Any]:
    """Read groups of options from the command line: one `--option` per field, with the field's help and default.

    Args:
        groups: dataclasses whose fields are made by `option`; the first line of each docstring heads its options.
        arguments: the command line; None: that of the process.
        description: shown above the options.

    Returns:
        An instance of each class.

    Raises:
        SystemExit: an unknown option or a value of a wrong type, as in `argparse`.
        ValueError: what the groups raise, and where `output_dir` has nothing to resume or holds another run.
    """
    parser = ArgumentParser(usage="%(prog)s [options]", description=description, formatter_class=_HelpFormatter)
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or group.__name__).splitlines()[0].rstrip("."))
        hints = typing.get_type_hints(group)
        for item in fields(group):
            if item.default is MISSING:
                raise TypeError(f"`{item.name}` of {group.__name__} must have a default, got none. Use `option`.")
            name, help = "--" + item.name.replace("_", "-"), item.metadata.get("help")
            section.add_argument(name, default=item.default, help=help, **_argument(hints[item.name]))
    values = vars(parser.parse_args(arguments))
    parsed = [group(**{item.name: values[item.name] for item in fields(group)}) for group in groups]
    for config in parsed:
        if isinstance(config, TrainingConfig):
            check_run_folder(config.output_dir, config.resume)
    return parsed


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, unless they are empty, and leaves the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", ()) else super()._get_help_string(action)


def _argument(hint: Any) -> dict[str, Any]:
    """The `add_argument` keywords for a field's type."""
    if isinstance(hint, types.UnionType):  # `X | None`
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        element, *rest = typing.get_args(hint)
        return {"type": element, "nargs": "*" if rest == [Ellipsis] else len(rest) + 1, "action": _StoreTuple}
    return {"type": hint}


class _StoreTuple(argparse.Action):
    """Keeps several values as a tuple, as the dataclass declares them."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))
