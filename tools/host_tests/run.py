"""The hosts' own tests on our classes: runs them, counts them, and writes the counts beside those of versions.

See `README.md` of this folder for where the tests come from.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tools.test_versions import ROOT, count, environment_variables, versions


HERE = Path(__file__).parent
OF_DIFFUSERS = (
    "tests/models/transformers/test_models_transformer_sana.py",
    "tests/models/transformers/test_models_transformer_sana_video.py",
    "tests/models/autoencoders/test_models_autoencoder_dc.py",
    "tests/pipelines/sana",
    "tests/pipelines/sana_video",
    "tests/pipelines/pag/test_pag_sana.py",
    "tests/lora/test_lora_layers_sana.py",
    # Calls a private method of diffusers' class.
    "--deselect=tests/pipelines/pag/test_pag_sana.py::SanaPAGPipelineFastTests::test_pag_applied_layers",
    # Want float16 everywhere; ours leaves what overflows it in bfloat16 (docs/differences.md).
    "-knot (test_to_dtype or test_dtype_dict or test_dtype_alias)",
    "-p",
    "our_classes",
)
GROUPS = {
    "diffusers: Sana and DC-AE": ("diffusers", OF_DIFFUSERS),
    "transformers: models": ("transformers", (f"{HERE}/vila_u_in_transformers.py",)),
    "transformers: processors": ("transformers", (f"{HERE}/test_processing_vila_u.py",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diffusers", type=Path, help="folder with its `tests`")
    parser.add_argument("--transformers", type=Path, help="folder with its `tests`")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/versions")
    arguments = parser.parse_args()
    is_baseline = os.environ.get("CLASSES") == "diffusers"
    path = arguments.results / ("host_tests_baseline.json" if is_baseline else "host_tests.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(path.read_text()) if path.exists() else {}
    command = "make host-tests DIFFUSERS=checkout TRANSFORMERS=sources" + " CLASSES=diffusers" * is_baseline
    report |= {"command": command, "versions": versions(Path(sys.executable))}
    environment = environment_variables()
    own = [str(HERE), *filter(None, [environment["PYTHONPATH"], os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(own)
    xml, failed = (path.parent / "host_tests.xml").resolve(), 0
    for name, (host, tests) in GROUPS.items():
        sources = getattr(arguments, host)
        if sources is None or (is_baseline and host != "diffusers"):
            continue
        configuration = ["-c", os.devnull, "--rootdir=."] if host == "transformers" else []
        pytest = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", f"--junitxml={xml}"]
        subprocess.run([*pytest, *configuration, *tests], cwd=sources, env=environment, check=False)
        counts = count(xml)
        xml.unlink()
        failed += counts["failed"]
        report.setdefault("tests", {})[name] = counts
        path.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
