"""The files of a run: complete checkpoints, folders replaced in one go, a log without a future."""

import json
import os
import shutil
from pathlib import Path

from diffusers_sana.files import atomic_write, read_json_lines


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (output_dir / "checkpoints").glob("step_*") if not path.suffix]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def check_run_folder(output_dir: str, resume: bool) -> None:
    """Raises a ValueError where there is nothing to resume, or a run that a new one would be mixed with."""
    found = checkpoints(Path(output_dir))
    if resume and not found:
        raise ValueError(f"`resume` needs a checkpoint, got none in {output_dir}. Check `output_dir`.")
    if found and not resume:
        raise ValueError(f"`output_dir` must be new, but {output_dir} holds a run. Use `resume` or another.")


def replace_folder(source: Path, target: Path) -> None:
    """Put `source` in the place of `target`, which is whole at every moment but that between two renames."""
    for path in source.rglob("*"):
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())  # else a power cut may leave empty files under the new name
    retired = target.with_suffix(".old")
    shutil.rmtree(retired, ignore_errors=True)  # what a kill may have left
    if target.exists():
        os.replace(target, retired)
    os.replace(source, target)
    shutil.rmtree(retired, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Undo a `replace_folder` that a kill ended between its two renames."""
    retired = target.with_suffix(".old")
    if retired.exists() and not target.exists():
        os.replace(retired, target)


def drop_lines_after(log_path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that the run continues from, and a last line that a kill cut off."""
    if log_path.exists():
        rows = [row for _, row in read_json_lines(log_path, may_be_torn=True) if row["step"] <= step]
        with atomic_write(log_path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
