"""Packs what a GPU run needs, for a machine that no index and no Hub can be reached from, and prints its size.

    python tools/gpu_pack.py FOLDER [--add FILE_OR_FOLDER ...]

FOLDER, which must be new, receives the tracked files that are present in the working tree, the commit in a file
`COMMIT`, and what `--add` names (wheels, a kernel cache) in `FOLDER/added`. Left out are the bundled checkpoints, the
weights of unfinished trainings and the images that neither the tests for a GPU nor the benchmarks read. More than
60 MiB is an error.
"""

import argparse
import shutil
import subprocess
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LIMIT_MIB = 60
CHECKPOINTS = "diffusers_sana/checkpoints/"
NOT_NEEDED = (
    "docs/",
    "examples/notebooks/",
    "examples/train_emoji/state/",
    *(CHECKPOINTS + name for name in ("emoji-probe/", "vila-u-emoji/")),
    *(CHECKPOINTS + f"sana-emoji-{name}/" for name in ("edges", "pixel-art", "sprint")),
)


def needed_files(root: Path = ROOT) -> list[str]:
    """The tracked files that travel, relative to `root`."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    return [
        name for name in tracked.split("\0") if name and not name.startswith(NOT_NEEDED) and (root / name).exists()
    ]


def mib(*paths: Path) -> float:
    """The size of files and folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="PATH", help="what else travels")
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"`folder` must be new, got {str(args.folder)!r}, which exists. Delete it, or choose another.")
    if missing := [str(path) for path in args.add if not path.exists()]:
        parser.error(f"`--add` must name files or folders that exist, got {', '.join(missing)}.")
    for name in needed_files():
        (args.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, args.folder / name)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    (args.folder / "COMMIT").write_text(commit, encoding="utf-8")
    for path in args.add:
        target = args.folder / "added" / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(path, target) if path.is_dir() else shutil.copy2(path, target)
    total = mib(args.folder)
    print(f"{args.folder}: {total:.1f} MiB, of which checkpoints {mib(args.folder / CHECKPOINTS):.1f} MiB")
    for path in args.add:
        print(f"  added {path.name}: {mib(path):.1f} MiB")
    if total > LIMIT_MIB:
        raise SystemExit(f"The pack must be at most {LIMIT_MIB} MiB, got {total:.1f} MiB. Add less.")


if __name__ == "__main__":
    main()
