"""The architecture as a test: who may import whom, what is documented, which names of hosts are used."""

import ast
import sys
from pathlib import Path

import pytest

import diffusers_sana
from diffusers_sana import _compat


ROOT = Path(diffusers_sana.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TEXTS = (".ipynb", ".md", ".py")

# Modules of the package's root that everything may import: they import nothing of ours but each other.
COMMON = {
    "_compat",
    "arguments",
    "cards",
    "checkpoint_files",
    "checks",
    "files",
    "images",
    "locks",
    "preprocessors",
    "saving",
}
# Folder -> what else its files may import from this package. A folder's own files are always allowed. For a file in
# several of these folders the innermost counts. Only recipes may import recipes.
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "schedulers": {"kernels"},
    "prompts": {"models"},
    "pipelines": {"kernels", "loaders", "models", "prompts", "schedulers", "_entries"},
    "quantizers": {"kernels"},
    "loaders": {"kernels", "models", "quantizers"},
    "training": {"models", "prompts", "schedulers"},
    "training/recipes": {
        "evaluation",
        "kernels",
        "loaders",
        "loading",
        "models",
        "pipelines",
        "prompts",
        "quantizers",
        "schedulers",
    },
    "evaluation": {"checkpoints", "kernels", "loading", "quantizers"},
    "checkpoints": set(),
}
# Nothing in the package but these and recipes may import a pipeline: data flows from pipelines down.
TOP_LEVEL = {"__init__.py", "_entries.py", "_registration.py", "loading.py", "cli", "demo", "modular"}
# `from_single_file` of the models is one call of the loaders, imported inside the method.
DELEGATIONS = {"models/loading.py": {"diffusers_sana.loaders.nvlabs.load"}}
MAY_IMPORT |= {f"{name}.py": set() for name in COMMON}
MAY_IMPORT["arguments.py"] = {"loading"}  # `--model` takes names of bundled checkpoints


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports at run time, also inside functions, as dotted names."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively; name the module"
            names.add(node.module or "")
            if node.module == "diffusers_sana":  # public names, and modules of the package's root
                names |= {
                    diffusers_sana._EXPORTS.get(alias.name, f"diffusers_sana.{alias.name}") for alias in node.names
                }
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path: Path):
    place, folder = path.relative_to(ROOT).as_posix(), path.relative_to(ROOT).parts[0]
    modules = imported_modules(path) - DELEGATIONS.get(place, set())
    if folder not in TOP_LEVEL:
        room = max((room for room in MAY_IMPORT if f"{place}/".startswith(f"{room}/")), key=len)
        allowed = MAY_IMPORT[room] | {folder} | COMMON
        ours = {name.split(".")[1] for name in modules if name.startswith("diffusers_sana.")}
        assert ours <= allowed, f"{room} may not import {sorted(ours - allowed)}"
        recipes = {name for name in modules if name.startswith("diffusers_sana.training.recipes")}
        assert room == "training/recipes" or not recipes, f"{room} may not import {sorted(recipes)}"
    roots = {name.split(".")[0] for name in modules}
    if folder == "kernels":
        of_its_own = set()  # no diffusers: the folder is also published as a package of kernels
        if path.parent.name == "triton":
            of_its_own = {"triton"}
            allowed = ("diffusers_sana.kernels.triton", "diffusers_sana._compat")
            assert all(name.startswith(allowed) for name in modules if "sana" in name)
        assert roots <= {"torch", "diffusers_sana", *of_its_own, *sys.stdlib_module_names}
    assert "triton" not in roots or path.parent == ROOT / "kernels" / "triton"
    assert "pickle" not in roots


def own_names() -> set[str]:
    """Every name that some file of the package defines, as a function, class, variable or attribute."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return names


OWN_NAMES = own_names()
# Fields of the files of diffusers and transformers, a method of Python's named tuples, and the options of argparse.
NOT_OF_HOSTS = {"_actions", "_asdict", "_class_name", "_fields", "_name_or_path", "_use_default_values"}


def host_names_in(path: Path) -> set[tuple[int, str]]:
    """Private names that the file imports from hosts, or asks an object for, and that are not the package's own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("diffusers_sana"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Subscript):
            names = [node.slice.value] if isinstance(node.slice, ast.Constant) else []
        elif isinstance(node, ast.Call):  # getattr(x, "_name"), vars(x).get("_name")
            asks = ast.unparse(node.func).endswith(("getattr", "setattr", "hasattr", ".get", ".pop"))
            names = [argument.value for argument in node.args[:2] if asks and isinstance(argument, ast.Constant)]
        found |= {
            (node.lineno, name)
            for name in names
            if isinstance(name, str) and name.startswith("_") and not name.startswith("__")
            if name not in OWN_NAMES | NOT_OF_HOSTS
        }
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_hosts(path: Path):
    """They stand in `_compat.py`, with what is lost where a version lacks them."""
    if path.name == "_compat.py":
        return
    unlisted = {(line, name) for line, name in host_names_in(path) if name not in _compat.ATTRIBUTES}
    assert not unlisted, f"list in ATTRIBUTES or IMPORTS of _compat.py: {sorted(unlisted)}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed = {(name.where.partition(":")[0], name.where.partition(":")[2]) for name in _compat.IMPORTS.values()}
    imported = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert not imported & listed, "import these from _compat.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_length(path: Path):
    """A file holds one whole thought. Above 700 lines it holds two."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 700


def test_no_folder_is_named_like_a_diffusers_pipeline():
    """diffusers would take the components in it for its own when it saves a pipeline."""
    import diffusers.pipelines

    taken = {path.name for path in Path(diffusers.pipelines.__file__).parent.iterdir() if path.is_dir()}
    ours = {path.parent.name for path in FILES if path.parent != ROOT}
    assert not ours & (taken - {"__pycache__"})


def test_no_deprecated_arguments_of_hosts():
    """Calls, docs, model cards and notebooks say `dtype`: diffusers and transformers warn of the earlier name."""
    earlier = "torch_" + "dtype="
    folders = ("benchmarks", "comfyui", "diffusers_sana", "docs", "examples", "tests", "tools")
    files = [path for name in folders for path in (ROOT.parent / name).rglob("*") if path.suffix in TEXTS]
    assert len(files) > 400
    found = [path for path in [*files, *ROOT.parent.glob("*.md")] if earlier in path.read_text(encoding="utf-8")]
    assert found == []


def test_exports():
    """All of them can be had; the other tests of the top level are in `test_import.py`."""
    for name in diffusers_sana._EXPORTS:
        value = getattr(diffusers_sana, name)
        assert name.isupper() or value.__name__ == name
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = diffusers_sana.NoSuchName


def test_type_checkers_see_the_exports():
    """The half of `__init__.py` that type checkers read names what `_EXPORTS` names, from the same modules."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    half = next(node for node in tree.body if isinstance(node, ast.If))
    named = {alias.name: node.module for node in half.body for alias in node.names}
    assert named == diffusers_sana._EXPORTS
    assert all(alias.asname == alias.name for node in half.body for alias in node.names)


def public(node: ast.AST) -> list[ast.ClassDef | ast.FunctionDef]:
    """The classes and functions in a module or class whose names are public."""
    body = getattr(node, "body", [])
    return [item for item in body if isinstance(item, ast.ClassDef | ast.FunctionDef) and item.name[0] != "_"]


def test_public_docstrings():
    """Every module, and every public class, function and method has a docstring."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) or not tree.body, f"{path.name} has no docstring"
        for item in public(tree):
            assert ast.get_docstring(item), f"{path.name}: {item.name} has no docstring"
            methods = public(item) if isinstance(item, ast.ClassDef) else []
            missing = {f"{item.name}.{method.name}" for method in methods if not ast.get_docstring(method)}
            assert not missing, f"{path.name}: {sorted(missing)} have no docstring"
