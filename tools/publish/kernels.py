"""The operations as a kernel repository of the Hub, which `kernels.get_kernel` loads without this package.

    python -m tools.publish.kernels [--owner NAME] [--push]

The folder is a project of kernel-builder (`build.toml`, `flake.nix`, `torch-ext/`) and, because nothing has to be
compiled, also what that would build: `build/torch-cuda` and so on, with the digests of their files. All imports within
are relative, and each variant registers its operators in its own namespace, so several versions can be loaded at
once. The kernels are ours, word for word: `diffusers_sana/kernels` and `_compat.py`.
"""

import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

from tools.publish.hub import ROOT, fresh, parse_args, publish


TEMPLATE = Path(__file__).parent / "kernel_repository"
NAME = "diffusers_sana_kernels"
KERNELS = ROOT / "diffusers_sana" / "kernels"
NAMESPACE = '_NAMESPACE = "diffusers_sana"\n'
OPS = '''"""The namespace of the operators, which no other version of this kernel shares."""

import torch


NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The name by which PyTorch knows an operator."""
    return f"{{NAMESPACE}}::{{op_name}}"
'''
# Older versions of `kernels` import the folder that is named like the kernel.
COMPATIBILITY = '''"""The module that this folder is in, for older versions of `kernels`."""

import importlib.util
import sys
from pathlib import Path


_path = Path(__file__).resolve().parents[1] / "__init__.py"
_name = f"{namespace}_{{abs(hash(str(_path)))}}"
_spec = importlib.util.spec_from_file_location(_name, _path)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
__all__ = _module.__all__
'''


def operations() -> list[str]:
    """Names of the operations that have a Triton kernel."""
    names = sorted(path.stem for path in (KERNELS / "triton").glob("*.py") if (KERNELS / path.name).exists())
    return [name for name in names if f"\ndef {name}_reference(" in (KERNELS / f"{name}.py").read_text("utf-8")]


def sources() -> dict[str, str]:
    """Path -> text of the Python package, without `_ops.py`."""
    files = {path.relative_to(KERNELS).as_posix(): path for path in sorted(KERNELS.rglob("*.py"))}
    files["_compat.py"] = KERNELS.parent / "_compat.py"
    texts = {name: relative_imports(name, path.read_text(encoding="utf-8")) for name, path in files.items()}
    dispatch = texts["dispatch.py"]
    if dispatch.count(NAMESPACE) != 1:
        raise ValueError(f"kernels/dispatch.py must have the line {NAMESPACE!r} once; adapt {Path(__file__).name}")
    own = '_NAMESPACE = add_op_namespace_prefix("").removesuffix("::")\n'
    texts["dispatch.py"] = dispatch.replace(NAMESPACE, f"from ._ops import add_op_namespace_prefix\n\n\n{own}")
    names = operations()
    lines = [f"from .{name} import {name}, {name}_reference\n" for name in names]
    exported = sorted([*names, *(f"{name}_reference" for name in names), "kernel_mode"])
    texts["__init__.py"] = (
        '"""Operations of Sana, DC-AE and SVDQuant: each a PyTorch reference and a Triton kernel."""\n\n'
        f"from .dispatch import kernel_mode\n{''.join(lines)}\n\n__all__ = {json.dumps(exported, indent=4)}\n"
    )
    return texts


def relative_imports(name: str, text: str) -> str:
    """The text of a file of the package `name` is in, with its imports of our modules made relative."""
    dots = "." * (1 + name.count("/"))
    text = re.sub(r"from diffusers_sana\.(?:kernels\.)?(\w[\w.]*) import", rf"from {dots}\1 import", text)
    if match := re.search(r"^\s*(?:from|import) diffusers_sana.*", text, re.MULTILINE):
        raise ValueError(f"kernels/{name} imports `{match[0].strip()}`, which a kernel repository cannot have")
    return text


def write(folder: Path, owner: str) -> None:
    """Writes the repository."""
    shutil.copytree(TEMPLATE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    functions = "\n".join(f"- `{name}`: {summary(name)}" for name in operations())
    for path in (folder / "build.toml", folder / "CARD.md"):
        text = path.read_text(encoding="utf-8").replace("OWNER", owner).replace("FUNCTIONS", functions)
        path.write_text(text, encoding="utf-8")
    shutil.copy(folder / "CARD.md", folder / "README.md")
    for file in ("LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, folder)
    texts = sources()
    write_files(folder / "torch-ext" / NAME, texts)
    build = tomllib.loads((folder / "build.toml").read_text(encoding="utf-8"))["general"]
    version = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:7]
    for backend in build["backends"]:
        namespace = f"_{NAME}_{backend}_{version}"
        variant = folder / "build" / f"torch-{backend}"
        own = {"_ops.py": OPS, f"{NAME}/__init__.py": COMPATIBILITY}
        write_files(variant, texts | {file: text.format(namespace=namespace) for file, text in own.items()})
        metadata = {
            "name": build["name"],
            "id": namespace,
            "version": build["version"],
            "license": build["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests(variant)},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def summary(name: str) -> str:
    """The first sentence of an operation's file."""
    text = (KERNELS / f"{name}.py").read_text(encoding="utf-8")
    return " ".join(text.split('"""')[1].split("\n\n")[0].split()).rstrip(".")


def write_files(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 in base 64 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(__doc__, ROOT / "build" / "hub" / "kernels", argv)
    folder = fresh(args.out) / "diffusers-sana-kernels"
    write(folder, args.owner)
    publish(folder, f"{args.owner}/diffusers-sana-kernels", "kernel", args.push)


if __name__ == "__main__":
    main()
