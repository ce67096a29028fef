"""The files of a run: complete checkpoints, folders replaced in one go, a log without a future."""

import json
import os
import shutil
from pathlib import Path


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step_*") if not path.suffix)


def replace_folder(source: Path, target: Path) -> None:
    """Put `source` in the place of `target`, which is whole at every moment but that between two renames."""
    retired = target.with_suffix(".old")
    shutil.rmtree(retired, ignore_errors=True)  # what a kill may have left
    if target.exists():
        os.replace(target, retired)
    os.replace(source, target)
    shutil.rmtree(retired, ignore_errors=True)


def drop_lines_after(log_path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that the run continues from."""
    if log_path.exists():
        lines = [line for line in log_path.read_text().splitlines() if json.loads(line)["step"] <= step]
        log_path.write_text("".join(line + "\n" for line in lines))
