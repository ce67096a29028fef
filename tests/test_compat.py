"""Private and young names of the hosts: there in the installed versions, looked up late, and missed with a message."""

import importlib
import inspect
import logging
import pkgutil
import re
import subprocess
import sys
from operator import attrgetter
from types import SimpleNamespace

import pytest

import diffusers_sana
from diffusers_sana import _compat


def owner_of(name: _compat.HostName):
    module, _, path = name.where.partition(":")
    module = importlib.import_module(module)
    return attrgetter(path)(module) if path else module


@pytest.mark.parametrize("name", _compat.IMPORTS)
def test_import_exists(name: str):
    assert getattr(_compat, name) is owner_of(_compat.IMPORTS[name])
    assert name in dir(_compat)


@pytest.mark.parametrize("attribute", _compat.ATTRIBUTES)
def test_attribute_exists(attribute: str):
    for name in _compat.ATTRIBUTES[attribute]:
        owner = owner_of(name)
        if name.in_source:
            assert attribute in inspect.getsource(inspect.getmodule(owner))
        else:
            assert hasattr(owner, attribute) or attribute in getattr(owner, "__dataclass_fields__", ())


def test_attributes_that_the_hosts_look_for_are_listed():
    """A private attribute of ours with the name of one of the host's classes is one that the host reads or calls."""
    classes = set()
    for module in pkgutil.walk_packages(diffusers_sana.__path__, "diffusers_sana."):
        if ".triton." in module.name or module.name.endswith("__main__"):
            continue
        members = vars(importlib.import_module(module.name)).values()
        classes |= {item for item in members if inspect.isclass(item) and item.__module__.startswith("diffusers_sana")}
    made_by_hosts = {"_abc_impl", "_backward_cls"}
    for cls in classes:
        for base in cls.__mro__[1:]:
            if base.__module__.split(".")[0] not in _compat.HOSTS:
                continue
            shared = {name for name in vars(cls).keys() & vars(base).keys() if name.startswith("_")}
            ours = {name for name in shared if not name.startswith("__")} - made_by_hosts
            assert ours <= _compat.ATTRIBUTES.keys(), f"{cls.__name__}: {sorted(ours - _compat.ATTRIBUTES.keys())}"


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
    [("3.0", r'a_host 3\.0 to 3\.1 have it\. Run `pip install -U "a_host>=3\.0"`'), ("", "Upgrade diffusers_sana")],
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
