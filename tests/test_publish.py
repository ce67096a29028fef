"""What is published: a wheel below the limit, a kernel repository that works without this package, cards for the Hub.

And the first minutes of a user: `make demo` installs what an image needs, and no more.
"""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import pytest
import torch
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from diffusers_sana.checkpoints import SANA_EMOJI_SPRINT, VILA_U_EMOJI
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.rms_norm import rms_norm
from tools.publish import checkpoints, dist, hub, kernels


def included(builder):
    return {file.distribution_path: Path(file.path) for file in builder.recurse_included_files()}


def test_the_published_wheel_is_small_enough():
    """It is built from the sdist. Deflate is what wheels are compressed with."""
    files = included(SdistBuilder(str(dist.ROOT)))
    names = set(files)
    assert {"diffusers_sana/cli/verify.py", "diffusers_sana/checkpoints/sana-emoji/model_index.json"} <= names
    assert not any(name.startswith(("tests", "docs", "diffusers_sana/checkpoints/vila-u-emoji")) for name in names)
    size = sum(len(zlib.compress(path.read_bytes(), 6)) for path in files.values())
    assert 10e6 < size < 0.98 * dist.LIMIT_MB * 1e6


def test_the_other_wheel_has_the_rest():
    builder = WheelBuilder(str(dist.VILA_U))
    forced = {Path(source).resolve(): target for source, target in builder.config.force_include.items()}
    assert forced[Path(VILA_U_EMOJI)] == "diffusers_sana/checkpoints/vila-u-emoji"
    everything = included(WheelBuilder(str(dist.ROOT)))  # what `pip install .` installs
    assert "diffusers_sana/checkpoints/vila-u-emoji/model.safetensors" in everything


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "repository"
    kernels.write(folder, "someone")
    return folder


def test_layout_of_the_kernel_repository(repository):
    build = tomllib.loads((repository / "build.toml").read_text())
    assert build["general"]["hub"] == {"repo-id": "someone/diffusers-sana-kernels"}
    assert "torch-noarch" in build
    assert (repository / "torch-ext" / kernels.NAME / "__init__.py").is_file()
    assert not (repository / "torch-ext" / kernels.NAME / "_ops.py").exists()  # kernel-builder writes it
    ids = set()
    for backend in build["general"]["backends"]:
        variant = repository / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        (variant / "metadata.json").rename(repository / "kept.json")
        assert metadata["digest"]["files"] == kernels.digests(variant)
        (repository / "kept.json").rename(variant / "metadata.json")
        ids.add(metadata["id"])
    assert len(ids) == len(build["general"]["backends"])
    assert "someone" in (repository / "README.md").read_text()
    assert all(f"- `{name}`: " in (repository / "README.md").read_text() for name in kernels.operations())


def test_the_kernel_repository_imports_nothing_else(repository):
    for path in (repository / "build" / "torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            roots = {name.split(".")[0] for name in names}
            assert roots <= {"torch", "triton", *sys.stdlib_module_names}, f"{path.name} imports {roots}"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_kernels_run_under_any_name_and_beside_ours(repository):
    """In the interpreter where there is no GPU; two variants at once, as two versions would be."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(5, 48, device=device), torch.randn(48, device=device)
    with kernel_mode("triton"):
        ours = rms_norm(x, weight)
    for name in ("cpu", "cuda"):
        module = load(f"some_unique_name_{name}", repository / "build" / f"torch-{name}")
        with module.kernel_mode("triton"):
            assert torch.equal(module.rms_norm(x, weight), ours)
        torch.testing.assert_close(module.rms_norm_reference(x, weight), ours)
        namespace = json.loads((repository / "build" / f"torch-{name}" / "metadata.json").read_text())["id"]
        assert hasattr(getattr(torch.ops, namespace), "rms_norm_forward")
    older = load("older", repository / "build" / "torch-xpu" / kernels.NAME)  # what older versions of `kernels` import
    assert older.__all__ == module.__all__
    assert torch.equal(older.rms_norm_reference(x, weight), module.rms_norm_reference(x, weight))


def test_cards_for_the_hub():
    """They load from the Hub, and link to no file that is not there."""
    for bundled in (*checkpoints.AS_THEY_ARE, SANA_EMOJI_SPRINT):
        text = checkpoints.hub_card((Path(bundled) / "README.md").read_text(), "someone")
        assert "](../" not in text
        assert "SANA_EMOJI" not in text
        assert "VILA_U_EMOJI" not in text
        assert "from diffusers_sana.checkpoints" not in text
    card = (Path(checkpoints.SANA_EMOJI_EDGES) / "README.md").read_text()
    card = checkpoints.hub_card(card, "someone")
    assert 'from_pretrained("someone/sana-emoji-edges", ' in card
    assert 'from_pretrained("someone/sana-emoji", controlnet=controlnet' in card
    assert "(https://huggingface.co/someone/sana-emoji)" in card


def test_sprint_and_four_bits_for_the_hub(tmp_path):
    """The bundled parts become a pipeline that loads by itself; in 4 bits its card names both repositories."""
    folder = tmp_path / "sana-emoji-sprint-int4"
    checkpoints.write_quantized(checkpoints.sprint(), folder, "int4", "someone")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: someone/sana-emoji-sprint\nbase_model_relation: quantized\n")
    assert 'from_pretrained("someone/sana-emoji-sprint-int4"' in card
    from diffusers_sana import SanaSprintPipeline

    pipe = SanaSprintPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a fox", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0].size == (
        256,
        256,
    )


def test_pushing(tmp_path, monkeypatch, capsys):
    """Nothing is sent unless asked for; then repository and folder are."""
    sent = []

    class Api:
        def create_repo(self, repo_id, **options):
            sent.append((repo_id, options["repo_type"]))

        def upload_folder(self, **options):
            sent.append(options)

    monkeypatch.setattr(hub, "HfApi", Api)
    (tmp_path / "file.txt").write_text("x" * 1000)
    hub.publish(tmp_path, "someone/name", "kernel", push=False)
    assert not sent
    assert "not uploaded: pass --push" in capsys.readouterr().out
    hub.publish(tmp_path, "someone/name", "kernel", push=True)
    assert sent[0] == ("someone/name", "kernel")
    assert sent[1] == {"repo_id": "someone/name", "repo_type": "kernel", "folder_path": tmp_path}
    with pytest.raises(SystemExit):
        hub.parse_args("", tmp_path, ["--push"])
    assert "--push needs --owner" in capsys.readouterr().err


def test_folders_of_others_are_not_replaced(tmp_path):
    folder = tmp_path / "out"
    hub.fresh(folder)
    (folder / "old").write_text("")
    hub.fresh(folder)
    assert [path.name for path in folder.iterdir()] == [".gitignore"]
    (folder / ".gitignore").unlink()
    (folder / "mine").write_text("")
    with pytest.raises(ValueError, match="`--out` must be new, empty or of an earlier run"):
        hub.fresh(folder)
    assert (folder / "mine").exists()


def test_make_demo_installs_what_an_image_needs(tmp_path):
    """And says what it does before it does it."""
    shutil.copy(dist.ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()

    def plan(target):
        return subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    demo = plan("demo")
    (install,) = [line for line in demo.splitlines() if "pip install" in line]
    assert install.endswith("-e .")
    assert demo.index("Installing PyTorch") < demo.index("pip install") < demo.index("diffusers-sana generate")
    assert ".[dev]" in plan("test")
