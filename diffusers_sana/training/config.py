"""Training settings as dataclasses, and the command line made from them."""

import argparse
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from diffusers_sana.files import differences


Config = TypeVar("Config", bound="TrainingConfig")


class RunError(RuntimeError):
    """A run that cannot go on; the message says why, what is safe, and what to do."""


def option(default: Any, help: str, changeable: bool = False) -> Any:
    """A dataclass field whose help text is shown on the command line.

    Args:
        default: its value.
        help: its help text.
        changeable: whether a run may be resumed with another value, which then holds from there on. False for what
            defines the model, what it starts from, or the order of the data.
    """
    return field(default=default, metadata={"help": help, "changeable": changeable})


@dataclass(kw_only=True)
class TrainingConfig:
    """The settings every training run has: its budget, optimiser, precision and outputs.

    The run ends when `max_steps` or `max_minutes` is reached, whichever is first. The learning rate follows the
    larger of the two fractions of the budget used, so that a cosine also ends where the clock ends.
    """

    output_dir: str = option("outputs/training", "folder for checkpoints, samples, log and result", changeable=True)
    max_steps: int = option(100_000, "optimizer steps", changeable=True)
    max_minutes: float | None = option(
        None, "stop after this many minutes of training, resumed time included", changeable=True
    )
    learning_rate: float | None = option(None, "peak learning rate; None takes the paper's", changeable=True)
    lr_schedule: str = option("constant", "`constant` or `cosine`, after the warm-up", changeable=True)
    warmup_steps: int = option(0, "steps of linear warm-up", changeable=True)
    betas: tuple[float, float] | None = option(None, "AdamW betas; None takes the paper's", changeable=True)
    weight_decay: float | None = option(
        None, "AdamW weight decay of matrices and kernels; None takes the paper's", changeable=True
    )
    max_grad_norm: float = option(1.0, "clip the gradient norm; 0 does not clip", changeable=True)
    max_skipped_steps: int = option(
        20, "end the run after so many steps in a row whose gradients are NaN or infinite", changeable=True
    )
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", changeable=True)
    mixed_precision: str = option("no", "`no` or `bf16` autocast; fp16 overflows in Sana", changeable=True)
    ema_decay: float = option(
        0.0, "decay of the averaged weights that are saved; 0 saves the trained weights", changeable=True
    )
    compile: bool = option(False, "torch.compile the model's parts in place", changeable=True)
    seed: int = option(0, "seed of all random numbers")
    resume: bool = option(False, "continue from the newest checkpoint in `output_dir`", changeable=True)
    save_minutes: float = option(10.0, "minutes between checkpoints", changeable=True)
    keep_checkpoints: int = option(2, "so many of the newest checkpoints are kept", changeable=True)
    sample_minutes: float = option(5.0, "minutes between sample grids", changeable=True)
    log_every: int = option(10, "steps between lines of log.jsonl", changeable=True)

    def __post_init__(self) -> None:
        check_choice("lr_schedule", self.lr_schedule, ("constant", "cosine"))
        check_choice("mixed_precision", self.mixed_precision, ("no", "bf16"))
        if self.max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, got {self.max_steps}. Use `max_minutes` to limit time.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}. Use 0 to switch it off.")
        for name in ("max_skipped_steps", "gradient_accumulation_steps", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def record(self) -> dict[str, Any]:
        """The settings as they look after a round trip through JSON: tuples are lists."""
        return json.loads(json.dumps(asdict(self), default=str))

    def check_resumable(self, recorded: Mapping[str, Any]) -> list[str]:
        """What differs from the settings that a run was begun with, one phrase each, where it may differ.

        Args:
            recorded: a `record`. A setting that it lacks, since it is newer than the run, had its default.

        Raises:
            ValueError: a setting differs that must not.
        """
        now = self.record()
        defaults = json.loads(json.dumps({item.name: item.default for item in fields(self)}, default=str))
        changed: dict[bool, list[str]] = {True: [], False: []}
        for item in fields(self):
            before = recorded.get(item.name, defaults[item.name])
            may_change = item.metadata.get("changeable", False)
            if item.name not in ("output_dir", "resume"):  # which say nothing about the training
                changed[may_change] += differences({item.name: before}, {item.name: now[item.name]})
        if changed[False]:
            raise ValueError(
                f"a run must be resumed with the settings it was begun with: {'; '.join(changed[False])}. Use the old "
                f"values, or begin a new run in another folder, from {self.output_dir}/model."
            )
        return changed[True]


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise a ValueError that names the argument and lists what it may be."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}. Use one of these.")


def parse_config(config_class: type[Config], argv: list[str] | None, description: str | None = None) -> Config:
    """Read a config from the command line: one `--option` a field, with the field's help and default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = typing.get_type_hints(config_class)
    for item in fields(config_class):
        if item.default is MISSING:
            raise TypeError(f"`{item.name}` of {config_class.__name__} must have a default, got none. Use `option`.")
        parser.add_argument(
            f"--{item.name}", default=item.default, help=item.metadata.get("help"), **_argument(hints[item.name])
        )
    return config_class(**vars(parser.parse_args(argv)))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; what its user can mend ends it with one line in the place of a traceback."""
    try:
        main()
    except (ValueError, OSError, RunError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


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
