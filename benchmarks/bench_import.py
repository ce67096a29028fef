"""Seconds that `from diffusers_sana import SanaPipeline` adds to diffusers' own import: results/cpu/import.json.

    python -m benchmarks.bench_import [--rounds 5]

Each round is a separate process, after one that leaves the compiled bytecode. Seconds are of processor time.
Python's garbage collector is off while our modules are imported: a collection of all that diffusers has imported
takes longer than they do, and would fall into one of them or into what comes next.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import RESULTS, environment, write_results


CODE = """
import gc, json, sys, time
started = time.process_time()
from diffusers import SanaPipeline
gc.disable()
between, before = time.process_time(), set(sys.modules)
from diffusers_sana import SanaPipeline
ours = time.process_time() - between
others = {name.partition(".")[0] for name in set(sys.modules) - before} - {"diffusers_sana"}
print(json.dumps({"diffusers": between - started, "diffusers_sana": ours, "other_packages": sorted(others)}))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as bytecode:
        variables = os.environ | {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        rounds = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", CODE], env=variables, stdout=subprocess.PIPE, text=True, check=True
                ).stdout
            )
            for _ in range(args.rounds + 1)
        ][1:]
    seconds = {name: [round(each[name], 3) for each in rounds] for name in ("diffusers", "diffusers_sana")}
    report = environment() | {
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "other_packages": rounds[0]["other_packages"],
    }
    write_results("import", report, args.results)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
