"""Private and young names of the hosts: there in the installed versions, looked up late, and missed with a message."""

import importlib
import inspect
import logging
import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest

import diffusers_sana
from diffusers_sana import _compat, _entries


HAS_VILA_U = all(_compat.supports(name) for name in _compat.IMPORTS.values() if name.feature == _compat.VILA_U)


def owner_of(name: _compat.HostName):
    module, _, path = name.where.partition(":")
    module = importlib.import_module(module)
    return attrgetter(path)(module) if path else module


@pytest.mark.parametrize("name", _compat.IMPORTS)
def test_import_exists(name: str):
    entry = _compat.IMPORTS[name]
    if not _compat.supports(entry):
        with pytest.raises(_compat.MissingHostName, match=f"{entry.host}>="):
            getattr(_compat, name)
        return
    assert getattr(_compat, name) is owner_of(entry)
    assert name in dir(_compat)


@pytest.mark.parametrize("attribute", _compat.ATTRIBUTES)
def test_attribute_exists(attribute: str):
    for name in filter(_compat.supports, _compat.ATTRIBUTES[attribute]):
        owner = owner_of(name)
        if name.in_source:
            assert attribute in inspect.getsource(inspect.getmodule(owner))
        else:
            assert hasattr(owner, attribute) or attribute in getattr(owner, "__dataclass_fields__", ())


def test_attributes_that_the_hosts_look_for_are_listed():
    """A private attribute of ours with the name of one of the host's classes is one that the host reads or calls."""
    classes = set()
    for module in pkgutil.walk_packages(diffusers_sana.__path__, "diffusers_sana."):
        if ".triton." in module.name or ".demo." in module.name or module.name.endswith("__main__"):
            continue  # kernels; a page, which needs gradio
        try:
            members = vars(importlib.import_module(module.name)).values()
        except _compat.MissingHostName:
            if HAS_VILA_U:
                raise
            continue  # some module of VILA-U
        classes |= {item for item in members if inspect.isclass(item) and item.__module__.startswith("diffusers_sana")}
    made_by_hosts = {"_abc_impl", "_backward_cls"}
    for cls in classes:
        for base in cls.__mro__[1:]:
            if base.__module__.split(".")[0] not in _compat.HOSTS:
                continue
            shared = {name for name in vars(cls).keys() & vars(base).keys() if name.startswith("_")}
            ours = {name for name in shared if not name.startswith("__")} - made_by_hosts
            assert ours <= _compat.ATTRIBUTES.keys(), f"{cls.__name__}: {sorted(ours - _compat.ATTRIBUTES.keys())}"


def test_private_tables_are_listed():
    parts = {part for entry in _entries.ENTRIES for part in entry.table.split(".") if part.startswith("_")}
    assert parts <= _compat.ATTRIBUTES.keys()


def test_importing_it_imports_no_host():
    check = "import sys, diffusers_sana._compat; print(sorted(sys.modules.keys() & {*diffusers_sana._compat.HOSTS}))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def host(monkeypatch):
    """A host of our own making, in version 2.5, of which 2.0 to 3.1 are tested."""
    module = SimpleNamespace(__version__="2.5", Class=SimpleNamespace(_there=1))
    monkeypatch.setitem(sys.modules, "a_host", module)
    monkeypatch.setitem(_compat.HOSTS, "a_host", _compat.Host("2.0", "3.1"))
    _compat.warn_if_untested.cache_clear()
    yield module
    _compat.warn_if_untested.cache_clear()


@pytest.mark.parametrize(
    ("since", "remedy"),
    [("3.0", r'a_host 3\.0 to 3\.1 work\. Run `pip install -U "a_host>=3\.0"`'), ("", "Upgrade diffusers_sana")],
)
def test_missing_import(host, monkeypatch, since, remedy):
    monkeypatch.setitem(_compat.IMPORTS, "Gone", _compat.HostName("a_host:Gone", "a feature", since=since))
    with pytest.raises(
        ImportError, match=rf"a feature needs `a_host\.Gone`, which a_host 2\.5 does not have; .*{remedy}"
    ):
        _ = _compat.Gone
    with pytest.raises(_compat.MissingHostName, match=r"a_host\.Gone"):
        exec("from diffusers_sana._compat import Gone")


def test_missing_host(monkeypatch):
    monkeypatch.setitem(_compat.HOSTS, "no_such_host", _compat.Host("2.0", "3.1"))
    monkeypatch.setitem(_compat.IMPORTS, "Gone", _compat.HostName("no_such_host.part:Gone", "a feature"))
    with pytest.raises(
        _compat.MissingHostName, match=r"a feature needs no_such_host, which is not installed\. Run `pip"
    ):
        _ = _compat.Gone


def test_missing_attribute(host, monkeypatch):
    monkeypatch.setitem(_compat.ATTRIBUTES, "_there", (_compat.HostName("a_host:Class", "a feature"),))
    monkeypatch.setitem(_compat.ATTRIBUTES, "_gone", (_compat.HostName("a_host:Class", "a feature"),))
    assert _compat.private(host.Class, "_there") == 1
    with pytest.raises(_compat.MissingHostName, match=r"a feature needs `a_host\.Class\._gone`, which a_host 2\.5"):
        _compat.private(host.Class, "_gone")


def test_unknown_name():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = _compat.no_such_name


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.9.2", r'a_host 1\.9\.2 is older than 2\.0.*pip install -U "a_host>=2\.0"'),
        ("2.0", None),
        ("3.1.7+cpu", None),
        ("3.2.0.dev1", r"a_host 3\.2\.0\.dev1 is newer than 3\.1"),
        ("4", "newer"),
    ],
)
def test_untested_versions_are_named_once(host, caplog, version, message):
    host.__version__ = version
    with caplog.at_level(logging.WARNING, logger="diffusers_sana._compat"):
        _compat.warn_if_untested("a_host")
        _compat.warn_if_untested("a_host")
    assert len(caplog.records) == (message is not None)
    if message is not None:
        assert re.search(message, caplog.text)


@pytest.mark.parametrize(
    ("module", "used"),
    [
        ("kernels.dispatch", "torch"),
        ("models.loading", "accelerate"),
        ("models.transformers.lora_layers", "peft"),
        ("pipelines.pipeline_vila_u", "accelerate"),
        ("quantizers.svdquant.integrations.diffusers", "accelerate"),
        ("training.loop", "accelerate"),
        ("training.recipes.adapter", "peft"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_modules_warn_of_the_hosts_that_they_use(monkeypatch, caplog, module, used):
    importlib.import_module(f"diffusers_sana.{module}")  # and what it imports, which has warned already
    for host in _compat.HOSTS:
        monkeypatch.setitem(_compat.HOSTS, host, _compat.Host("0.0", "0.0"))
    _compat.warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING, logger="diffusers_sana._compat"):
        runpy.run_module(f"diffusers_sana.{module}")  # once more, in a separate namespace
    _compat.warn_if_untested.cache_clear()
    assert [message.split()[0] for message in caplog.messages] == [used]


def test_floors_are_those_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    for host, tested in _compat.HOSTS.items():
        assert f"{host}>={tested.lowest}" in wanted
    assert not any("<" in item for item in wanted), "no upper caps"


def test_lowest_versions_are_those_of_the_constraints():
    """`make test-lowest` installs what `HOSTS` calls the oldest versions."""
    lines = (Path(__file__).parents[1] / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for host in pins.keys() & _compat.HOSTS.keys():
        assert pins[host].startswith(_compat.HOSTS[host].lowest)
    assert {"accelerate", "diffusers", "peft", "transformers"} <= pins.keys()


def test_installed_versions_are_tested_ones(caplog):
    _compat.warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING, logger="diffusers_sana._compat"):
        for host in _compat.HOSTS:
            _compat.warn_if_untested(host)
    assert not caplog.records


def test_instruction_is_that_of_diffusers(monkeypatch):
    import diffusers

    lines = _compat.upstream_instruction()
    assert lines[0].startswith("Given a user prompt")
    monkeypatch.setattr(diffusers.SanaPipeline, "__call__", lambda self, prompt: None)
    with pytest.raises(_compat.MissingHostName, match="complex_human_instruction"):
        _compat.upstream_instruction()


# Run first in a process: from then on the names look to diffusers_sana, and to nobody else, as if the hosts had none.
HIDE = """
import importlib, sys
from collections import defaultdict

def hide(places):
    hidden = defaultdict(set)
    for place in places:
        module, _, name = place.partition(":")
        hidden[importlib.import_module(module)].add(name)
    for module, names in hidden.items():
        class Hiding(type(module)):
            def __getattribute__(self, name, names=frozenset(names)):
                if name in names and sys._getframe(1).f_globals.get("__name__", "").startswith("diffusers_sana"):
                    raise AttributeError(f"hidden: {name}")
                return super().__getattribute__(name)
        module.__class__ = Hiding

hide(sys.argv[1].split())
"""
HOSTS_WORK = """
import diffusers_sana
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, Gemma2Model, MODEL_MAPPING
from diffusers import AutoencoderKL, AutoPipelineForText2Image, DiffusionPipeline
assert AutoConfig.for_model("llama").model_type == "llama"
assert MODEL_MAPPING[type(AutoConfig.for_model("gemma2"))] is Gemma2Model
from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI
pipe = SanaPipeline.from_pretrained(SANA_EMOJI)
pipe("a fox", num_inference_steps=1, output_type="latent")
"""


def run_hiding(places: list[str], code: str) -> str:
    """Standard error of a process in which diffusers_sana does not find the names at `places`."""
    command = [sys.executable, "-W", "ignore", "-c", HIDE + HOSTS_WORK + code, " ".join(places)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_all_names_missing():
    """Not one name of the table may be needed to import the hosts, or for Sana."""
    code = """
from diffusers_sana._compat import IMPORTS, MissingHostName, VILA_U
for name, entry in IMPORTS.items():
    if not name.startswith("triton"):
        try:
            exec(f"from diffusers_sana._compat import {name}")
        except MissingHostName as error:
            assert entry.feature in str(error) and entry.where.replace(":", ".") in str(error), error
        else:
            raise AssertionError(name)
for use in (lambda: AutoConfig.for_model("vila_u"), lambda: diffusers_sana.VilaUConfig):
    try:
        use()
    except ImportError as error:
        assert "VILA-U needs `transformers." in str(error), error
    else:
        raise AssertionError
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "bitsandbytes_4bit" in AUTO_QUANTIZER_MAPPING and "svdquant" not in AUTO_QUANTIZER_MAPPING
assert pipe.transformer._cp_plan is None
try:
    pipe.load_lora_weights({})
except MissingHostName as error:
    assert "loading LoRA files" in str(error)
else:
    raise AssertionError
"""
    places = [name.where for name in _compat.IMPORTS.values() if name.host != "triton"]
    messages = run_hiding(places, code)
    version = importlib.import_module("transformers").__version__
    for feature in ("SVDQuant for from_pretrained of diffusers", "SVDQuant for from_pretrained of transformers"):
        assert messages.count(f"diffusers_sana leaves out {feature}: ") == 1
    assert (
        f"which transformers {version} does not have; transformers {_compat.HOSTS['transformers'].lowest} to"
        in messages
    )


def test_all_tables_missing():
    """Every dictionary that we add entries to has another name: each costs its feature, with one warning."""
    places = {f"{entry.host}:{entry.table.split('.')[0] or entry.key()}" for entry in _entries.ENTRIES}
    code = """
from diffusers_sana._entries import ENTRIES
from diffusers_sana._registration import _added, _refused
assert not _added and len(_refused) >= len(ENTRIES) - 5, [str(entry) for entry in set(ENTRIES) - _refused]
import diffusers
assert not hasattr(diffusers, "SanaInpaintPipeline")
try:
    diffusers_sana.register(strict=True)
except RuntimeError as error:
    assert all(entry.feature in str(error) for entry in ENTRIES), error
else:
    raise AssertionError
"""
    messages = run_hiding(sorted(places), code)
    for feature in {entry.feature for entry in _entries.ENTRIES}:
        assert messages.count(f"leaves out {feature}: ") <= 1
    assert (
        "leaves out SanaPipeline for the auto pipelines of diffusers: AttributeError: cannot register in" in messages
    )
