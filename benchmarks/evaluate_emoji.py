"""The bundled checkpoint in 4 bits beside 16, by `diffusers-sana evaluate`: results/cpu/evaluate_emoji.json.

python -m benchmarks.evaluate_emoji
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import cli


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=1000, help="prompts; default: all of them")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(argv)
    options = ["--quantize", "int4", "--reference-model", "sana-emoji", "--limit", str(args.limit)]
    with tempfile.TemporaryDirectory() as out:
        started = time.process_time()
        cli.main(["evaluate", "sana-emoji", "--out", out, *options])
        seconds = time.process_time() - started
        report = json.loads((Path(out) / "report.json").read_text(encoding="utf-8"))
    del report["settings"]["out"], report["versions"]  # of this run only; in `environment()`
    write_results("evaluate_emoji", environment() | {"core_seconds": round(seconds)} | report, args.results)


if __name__ == "__main__":
    main()
