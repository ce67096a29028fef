"""What the uploads to the Hub share: folders are written and listed; only `--push` sends them."""

import argparse
import shutil
from collections import Counter
from pathlib import Path

from huggingface_hub import HfApi


ROOT = Path(__file__).resolve().parents[2]


def parse_args(description: str | None, out: Path, argv: list[str] | None) -> argparse.Namespace:
    """`--owner`, `--out`, `--push`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owner", default="OWNER", help="user or organization on the Hub")
    parser.add_argument(
        "--out", type=Path, default=out, metavar="DIR", help=f"what to write, replacing what is there; default: {out}"
    )
    parser.add_argument("--push", action="store_true", help="upload with the token of `hf auth login` or HF_TOKEN")
    args = parser.parse_args(argv)
    if args.push and args.owner == "OWNER":
        parser.error("--push needs --owner, a user or organization on the Hub")
    return args


def fresh(folder: Path) -> Path:
    """An empty folder in place of what an earlier run has written there.

    Raises:
        ValueError: there is something else.
    """
    marker = folder / ".gitignore"
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists() or marker.read_text(encoding="utf-8") != "*\n":
            raise ValueError(f"`--out` must be new, empty or of an earlier run, got {str(folder)!r}; choose another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("*\n", encoding="utf-8")
    return folder


def publish(folder: Path, repo_id: str, repo_type: str, push: bool) -> None:
    """Lists what goes into a repository, and sends it there if asked to."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{repo_type} {repo_id}: {len(files)} files, {size:.1f} MB, in {folder}")
    sizes: Counter[str] = Counter()
    for path in files:
        sizes["/".join(path.relative_to(folder).parts[:2])] += path.stat().st_size
    for name, count in sizes.items():
        print(f"  {count:>11,}  {name}")
    if push:
        api = HfApi()
        api.create_repo(repo_id, repo_type=repo_type, exist_ok=True)
        print(api.upload_folder(repo_id=repo_id, repo_type=repo_type, folder_path=folder))
    else:
        print("  not uploaded: pass --push to do it")
