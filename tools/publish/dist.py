"""What goes to a package index: wheel and sdist, checked by twine, with their sizes. Uploads nothing.

    python -m tools.publish.dist [--out dist]

The sdist leaves out tests, docs and vila-u-emoji, and the wheel is built from it, so both stay below 45 MB.
vila-u-emoji becomes a separate wheel that installs into the same folder. `pip install .` in a clone has everything.
Then `twine upload dist/*` publishes them, with the owner's token.
"""

import argparse
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 45
VILA_U = Path(__file__).parent / "vila_u_emoji"


def run(module: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, cwd=ROOT)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", metavar="DIR", help="what to write, replacing what is there"
    )
    out = parser.parse_args(argv).out.resolve()
    for old in [*out.glob("diffusers_sana*.whl"), *out.glob("diffusers_sana*.tar.gz")]:
        old.unlink()
    run("build", "--outdir", out)
    run("build", "--wheel", "--outdir", out, VILA_U)
    files = sorted([*out.glob("diffusers_sana*.whl"), *out.glob("diffusers_sana*.tar.gz")])
    run("twine", "check", "--strict", *files)
    for path in files:
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path.name}")
    if large := [path.name for path in files if path.stat().st_size > LIMIT_MB * 1e6]:
        sys.exit(f"larger than {LIMIT_MB} MB: {', '.join(large)}. Move a checkpoint to a separate distribution.")


if __name__ == "__main__":
    main()
