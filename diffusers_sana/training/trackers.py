"""Trackers of experiments beside log.jsonl: TensorBoard, Weights & Biases, Trackio and the others of Accelerate."""

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusers_sana._compat import LOGGER_TYPE_TO_CLASS
from diffusers_sana.files import atomic_write, read_text
from diffusers_sana.training.config import TrainingConfig
from diffusers_sana.training.data.batches import unchanged_random_state


IMAGES = "samples"  # what sample grids are called


class Trackers:
    """The trackers that `config.report_to` names.

    They are those of `accelerate.tracking`, including classes that were given to its `register_tracker_class`.

    Args:
        config: names the trackers, the project and the folder of the run.

    Raises:
        ValueError: a name that Accelerate does not know.
    """

    def __init__(self, config: TrainingConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self._trackers: list[Any] = []
        for name in config.report_to:
            if name not in LOGGER_TYPE_TO_CLASS:
                raise ValueError(
                    f"`report_to` must name trackers of Accelerate, got {name!r}. It has "
                    f"{sorted(LOGGER_TYPE_TO_CLASS)}; `accelerate.tracking.register_tracker_class` adds more."
                )

    @contextlib.contextmanager
    def running(self, settings: Mapping[str, Any], step: int) -> Iterator[None]:
        """Inside, `log` and `show` reach the trackers; at the end they are closed.

        Args:
            settings: of the run, which trackers show beside it.
            step: that the run continues from; 0 for a new one.
        """
        try:
            with unchanged_random_state():  # some make a random name
                for name in self.config.report_to:
                    self._trackers.append(self._start(name, step))
                    self._trackers[-1].store_init_configuration({key: _plain(settings[key]) for key in settings})
            yield
        finally:
            while self._trackers:
                self._trackers.pop().finish()

    def log(self, row: Mapping[str, float | None]) -> None:
        """Report a line of log.jsonl; a value that is not finite is left out."""
        values = {name: value for name, value in row.items() if value is not None and name != "step"}
        with unchanged_random_state():
            for tracker in self._trackers:
                tracker.log(values, step=row["step"])

    def show(self, path: Path, step: int) -> None:
        """Show a sample grid, if it was written, in the trackers that can show images."""
        if not self._trackers or not path.exists():
            return
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))[None]  # [1, H, W, 3]
        with unchanged_random_state():
            for tracker in self._trackers:
                if tracker.name == "trackio":
                    import trackio

                    tracker.log({IMAGES: trackio.Image(pixels[0])}, step=step)
                elif hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({IMAGES: pixels}, step=step, **layout)

    def _start(self, name: str, step: int) -> Any:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        places = (str(self.folder / name),) if tracker_class.requires_logging_directory else ()
        tracker = tracker_class(self.config.tracker_project, *places, **self._arguments(name, step))
        if hasattr(tracker, "start"):  # since Accelerate 1.9; before, they began at once
            tracker.start()
        return tracker

    def _arguments(self, name: str, step: int) -> dict[str, Any]:
        """What makes a resumed run continue the tracker's run of the same folder."""
        if name == "tensorboard":
            return {"purge_step": step + 1} if step else {}  # later events are of steps that a kill has lost
        if name == "wandb":
            return {"name": self.folder.name, "dir": str(self.folder), "id": self._identity(), "resume": "allow"}
        if name == "trackio":
            return {"name": self.folder.name, "resume": "allow"}
        return {}

    def _identity(self) -> str:
        """Of this run among those of its project; kept in the run's folder."""
        path = self.folder / "run_id.txt"
        if not path.exists():
            with atomic_write(path) as temporary:
                temporary.write_text(secrets.token_hex(8), encoding="utf-8")
        return read_text(path).strip()


def _plain(value: Any) -> bool | int | float | str:
    """A setting as all trackers take it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
