"""Runs the tests that depend on versions in environments of other versions of torch, transformers and the rest.

    python -m tools.test_versions lowest             the oldest versions that pyproject.toml allows
    python -m tools.test_versions gpu-host           those of the GPU host: torch 2.11, triton 3.6; 5 GB of downloads
    python -m tools.test_versions gpu-host-overlay   the same with a newer transformers, which VILA-U needs

An environment is made in build/envs/NAME from constraints-NAME.txt. Some hold only the packages of that file, in front
of those of another environment: "lowest" sees torch and pytest of the interpreter that runs this. Versions, counts and
the commands that gave them are written into a JSON file for each environment. A run of some groups (`--only`) keeps
the counts of the others, unless a version has changed.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


ROOT = Path(__file__).parents[1]
GROUPS = {
    "import": ["tests/test_import.py", "tests/test_compat.py"],
    "registration": ["tests/test_registration.py"],
    "pipelines": ["tests/pipelines"],
    "quantizer": ["tests/quantizers"],
    "kernels": ["tests/kernels"],
}
PACKAGES = ("accelerate", "diffusers", "huggingface_hub", "peft", "safetensors", "transformers")
TEST_PACKAGES = ("matplotlib", "optimum-quanto", "pytest", "pytest-xdist", "scikit-image")
# What continuous integration runs: import, generate, quantize.
SMOKE = """
import torch, diffusers_sana
from diffusers_sana.checkpoints import SANA_EMOJI
diffusers_sana.register(strict=True)
pipe = diffusers_sana.SanaPipeline.from_pretrained(SANA_EMOJI)
make = lambda: torch.tensor(pipe("a fox", num_inference_steps=4, generator=torch.Generator().manual_seed(0),
                                 output_type="np").images)
image = make()
diffusers_sana.quantize(pipe)
error = (make() - image).square().mean().sqrt()
assert image.std() > 0.05 and 0 < error < 0.2, (image.std(), error)
print(f"generated and quantized; root mean square between the images: {error:.4f}")
"""


@dataclass(frozen=True)
class Environment:
    """Versions to test with.

    Attributes:
        behind: the environment whose packages it sees behind its own, "this" for that of the running interpreter.
        skip: arguments of pytest that leave out what these versions do not support.
    """

    behind: str = ""
    skip: tuple[str, ...] = ()


WITHOUT_VILA_U = ("-k", "not vila_u and not VilaU and not vila-u", "--ignore-glob=*test_*vila_u*.py")
ENVIRONMENTS = {
    "lowest": Environment(behind="this", skip=WITHOUT_VILA_U),
    "gpu-host": Environment(skip=WITHOUT_VILA_U),
    "gpu-host-overlay": Environment(behind="gpu-host"),
}


def make(name: str, envs: Path) -> Path:
    """The interpreter of the environment, which is made if its constraints have changed since."""
    behind, constraints = ENVIRONMENTS[name].behind, ROOT / f"constraints-{name}.txt"
    folder = envs / name
    python, stamp = folder / "bin/python", folder / "constraints.txt"
    if behind in ENVIRONMENTS:
        make(behind, envs)
    if stamp.exists() and stamp.read_text() == constraints.read_text():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    if behind:
        back = Path(sysconfig.get_path("purelib")) if behind == "this" else _site_packages(envs / behind)
        (_site_packages(folder) / "behind.pth").write_text(f"{back}\n")
        packages = ["--no-deps", *(line for line in constraints.read_text().splitlines() if "==" in line)]
    else:
        packages = [*PACKAGES, "torch", "triton", "numpy", "pillow", "filelock", *TEST_PACKAGES]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "-c", constraints]
    subprocess.run([*pip, *packages], check=True)
    stamp.write_text(constraints.read_text())
    return python


def _site_packages(environment: Path) -> Path:
    return next(environment.resolve().glob("lib/python*/site-packages"))


def run_group(python: Path, tests: list[str], skip: tuple[str, ...], jobs: int, report: Path) -> dict[str, Any]:
    """Runs tests in an environment and counts them: passed, failed (errors too), skipped."""
    command = [python, "-m", "pytest", *tests, *skip, "-m", "not gpu"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
    subprocess.run(command, cwd=ROOT, env=environment_variables(), check=False)
    return count(report)


def count(report: Path) -> dict[str, Any]:
    """Tests in a report of pytest (`--junitxml`): passed, failed (errors too), skipped, and names of the failures."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    return {
        "passed": total - failures - errors - skipped,
        "failed": failures + errors,
        "skipped": skipped,
        "failures": sorted(
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ),
    }


def environment_variables() -> dict[str, str]:
    """This checkout in front, one thread a process, no progress bars."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return os.environ | own


def versions(python: Path) -> dict[str, str]:
    """What is installed in an environment, by name."""
    names = [*PACKAGES, "torch", "triton", "numpy", "tokenizers"]
    code = f"import sys; from importlib.metadata import version; print(*map(version, {names}), sys.version.split()[0])"
    output = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip([*names, "python"], output, strict=True))


def earlier_counts(path: Path, installed: dict[str, str]) -> dict[str, dict]:
    """The result file to go on with: that of earlier runs, or an empty one if they had other versions."""
    report = json.loads(path.read_text()) if path.exists() else {}
    return report if report.get("versions") == installed else {"versions": installed, "tests": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=ENVIRONMENTS)
    parser.add_argument("--smoke", action="store_true", help="only import, generate and quantize, within a minute")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--envs", type=Path, default=ROOT / "build/envs", help="folder of the environments")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/versions")
    arguments = parser.parse_args()
    failed = 0
    for name in arguments.names:
        python = make(name, arguments.envs)
        if arguments.smoke:
            subprocess.run([python, "-W", "ignore", "-c", SMOKE], cwd=ROOT, env=environment_variables(), check=True)
            continue
        arguments.results.mkdir(parents=True, exist_ok=True)
        path = arguments.results / f"{name}.json"
        report = earlier_counts(path, versions(python))
        for group in arguments.only:
            counts = run_group(
                python, GROUPS[group], ENVIRONMENTS[name].skip, arguments.jobs, arguments.envs / f"{name}.xml"
            )
            failed += counts["failed"]
            command = f"python -m tools.test_versions {name} --only {group} --jobs {arguments.jobs}"
            report["tests"][group] = {"command": command} | counts
            path.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
