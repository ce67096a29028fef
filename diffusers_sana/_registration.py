"""Adds entries of this package to the tables of diffusers and transformers: the only file that modifies them.

No class or module of a host is replaced. Two functions of `DiffusionPipeline.from_pretrained` are wrapped, because it
has no table for them: the one that selects the class that a folder names, and the one that loads a component, for the
dtypes of our pipelines' components. Otherwise `register` adds keys to dictionaries in which the hosts look names up,
and never overwrites a key. `unregister` removes all of it.
Importing the modules with those dictionaries takes seconds, so an entry waits until its host is imported: a finder in
`sys.meta_path` notices that import and adds the entry right after it. Hence `import diffusers_sana` and the imports of
diffusers may come in any order. The finder also creates the modules in which the hosts look up our classes
(`GUEST_MODULES`).

A failing entry, because of our code or of a changed host, never breaks the import of the host: the entry is left out,
with one warning. A class that cannot be imported when a host looks it up is replaced by one that raises the reason
when it is used, as the hosts do for missing dependencies.
"""

import logging
import sys
from collections.abc import Hashable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any, cast

from diffusers_sana import _compat
from diffusers_sana._entries import ENTRIES, GUEST_MODULES, PACKAGE, Entry


logger = logging.getLogger(__name__)

_added: dict[Entry, tuple[dict, Hashable, Any]] = {}
_refused: set[Entry] = set()
_waiting: list[Entry] = []


def register(strict: bool = False) -> None:
    """Adds our entries to the tables of the hosts. Importing the package calls it; calling it again changes nothing.

    An entry of another package is never replaced: ours is left out, with one warning that names both. An entry that
    cannot be made with the installed versions is left out too, with one warning that names the feature.

    Args:
        strict: import every host now and raise if an entry cannot be made.

    Raises:
        RuntimeError: with `strict`, before any entry is added, naming all entries that cannot be made and why.
    """
    if strict:
        problems = [problem for entry in ENTRIES if (problem := _problem(entry))]
        if problems:
            raise RuntimeError("; ".join(dict.fromkeys(problems)))
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _add_all([entry for entry in ENTRIES if entry.trigger in sys.modules])


def unregister() -> None:
    """Removes every entry that `register` added, and stops waiting for hosts. Entries of other packages stay."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for entry, (table, key, value) in _added.items():
        if table.get(key) is not value:
            continue
        if entry.wraps:
            table[key] = value.__wrapped__  # type: ignore[union-attr]  # it is no None
            continue
        del table[key]
        if entry.table == "_class_to_module":
            vars(import_module(entry.host)).pop(str(key), None)  # a lazy module keeps what was asked for
    for name in GUEST_MODULES:
        if isinstance(getattr(sys.modules.get(name), "__loader__", None), _GuestLoader):
            parent, _, leaf = name.rpartition(".")
            vars(sys.modules[parent]).pop(leaf, None)
            del sys.modules[name]
    _added.clear()
    _refused.clear()


def _table(entry: Entry) -> dict:
    try:
        host = import_module(entry.host)
        return attrgetter(entry.table)(host) if entry.table else vars(host)
    except (AttributeError, ModuleNotFoundError) as error:
        raise AttributeError(f"cannot register in {entry.host}.{entry.table}: {error}") from error


def _conflict(entry: Entry) -> str | None:
    """What conflicts with `entry`, or None."""
    if entry.wraps:
        getattr(import_module(entry.host), str(entry.key()))  # raises where there is nothing to wrap
        return None
    present = _table(entry).get(entry.key())
    if present is None or present == entry.value():
        return None
    return f"{entry} is {present!r} and not {entry.value()!r} of {PACKAGE}: another package registered it first"


def _problem(entry: Entry) -> str | None:
    """Why `entry` cannot be made, or None; imports its host."""
    try:
        import_module(entry.trigger)
        entry.value()
        return _conflict(entry)
    except Exception as error:
        return _left_out(entry, error)


def _left_out(entry: Entry, error: Exception) -> str:
    return f"{PACKAGE} leaves out {entry.feature}: {_compat.explain(entry.host, error)}"


def _add_all(entries: list[Entry]) -> None:
    """One entry after the other: making one may import another host, whose entries then wait."""
    is_busy = bool(_waiting)
    _waiting.extend(entries)
    if is_busy:
        return
    try:
        while _waiting:
            _add(_waiting[0])
            _waiting.pop(0)
    finally:
        _waiting.clear()


def _add(entry: Entry) -> None:
    """Adds an entry, or warns why it is left out. Runs during the host's import, so nothing may raise here."""
    if entry in _added or entry in _refused:
        return
    try:
        _compat.warn_if_untested(entry.host.partition(".")[0])
        if message := _conflict(entry):
            _refuse(entry, f"{message}; left as it is.")
            return
        table, key, value = _table(entry), entry.key(), entry.value()
        if entry.wraps:
            value = value(table[key])
        table[key] = value
        _added[entry] = (table, key, value)
        if entry.first:
            table.move_to_end(key, last=False)  # type: ignore[attr-defined]  # an OrderedDict
    except Exception as error:
        if entry in _added:  # added, but not in front, where it would be mistaken for another
            table, key, _ = _added.pop(entry)
            del table[key]
        _refuse(entry, _left_out(entry, error), once_for_feature=True)


def _refuse(entry: Entry, message: str, once_for_feature: bool = False) -> None:
    has_warned = once_for_feature and any(other.feature == entry.feature for other in _refused)
    _refused.add(entry)
    if not has_warned:
        logger.warning(message)


# Finder and loaders are not derived from `importlib.abc`, whose import takes longer than the rest of this package.
class _HostFinder:
    """Finds the hosts with the other finders, and adds the entries once a host is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_host = any(entry.trigger == fullname for entry in ENTRIES)
        if not is_host and fullname not in GUEST_MODULES:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find and find(fullname, path, target)
            if spec is not None:
                if is_host and spec.loader is not None:
                    spec.loader = cast(Any, _HostLoader(spec.loader))
                return spec
        return ModuleSpec(fullname, cast(Any, _GuestLoader())) if fullname in GUEST_MODULES else None


class _HostLoader:
    """Wraps the loader of a host: afterwards adds our entries and restores the module's own loader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _add_all([entry for entry in ENTRIES if entry.trigger == module.__name__])


class _GuestLoader:
    """Creates a module of a host whose names are those of one of our modules."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__

        def look_up(attribute: str) -> Any:
            try:
                return getattr(import_module(GUEST_MODULES[name]), attribute)
            except AttributeError:
                raise AttributeError(f"module {name!r} has no attribute {attribute!r}") from None
            except Exception as error:
                # Hosts also look up everything they list, so raising here would affect users who did not ask for this
                # class.
                reason = f"{attribute} of {PACKAGE} cannot be imported: " + _compat.explain(name, error)
                logger.warning(reason)
                unusable = vars(module)[attribute] = _compat.unusable(attribute, reason)
                return unusable

        module.__dict__["__getattr__"] = look_up


_finder = _HostFinder()
