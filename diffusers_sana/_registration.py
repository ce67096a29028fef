"""Entries of this package in the tables of diffusers and transformers: the only file that touches them.

Nothing is patched: `register` adds keys to dictionaries that the hosts look things up in, `unregister` takes them out.
Importing the modules that hold those dictionaries costs seconds, so an entry waits until its host is imported by
whoever needs it: a finder in `sys.meta_path` notices that import and adds the entry right after it. Hence the order
of `import diffusers_sana` and the imports of diffusers does not matter.
"""

import logging
import sys
from collections.abc import Hashable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any

from diffusers_sana._entries import ENTRIES, PACKAGE, Entry


logger = logging.getLogger(__name__)

_added: dict[Entry, tuple[dict, Hashable, Any]] = {}
_refused: set[Entry] = set()
_waiting: list[Entry] = []


def register(strict: bool = False) -> None:
    """Adds our entries to the tables of the hosts. Importing the package calls it; calling it again changes nothing.

    An entry of somebody else is never replaced: ours is left out, with one warning that names both.

    Args:
        strict: import every host now and raise where somebody else's entry is in the way.

    Raises:
        RuntimeError: with `strict`, before any entry is added.
    """
    if strict:
        for entry in ENTRIES:
            import_module(entry.trigger)
        conflicts = [message for entry in ENTRIES if (message := _conflict(entry))]
        if conflicts:
            raise RuntimeError("; ".join(conflicts))
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _add_all([entry for entry in ENTRIES if entry.trigger in sys.modules])


def unregister() -> None:
    """Takes every entry out that `register` added, and stops waiting for hosts. Entries of others stay."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for entry, (table, key, value) in _added.items():
        if table.get(key) is value:
            del table[key]
            if entry.table == "_class_to_module":
                vars(import_module(entry.host)).pop(str(key), None)  # a lazy module keeps what was asked for
    _added.clear()
    _refused.clear()


def _table(entry: Entry) -> dict:
    return attrgetter(entry.table)(import_module(entry.host))


def _conflict(entry: Entry) -> str | None:
    """What is in the way of `entry`, or None."""
    try:
        present = _table(entry).get(entry.key())
    except (AttributeError, ModuleNotFoundError) as error:
        return f"{PACKAGE} cannot register in {entry.host}.{entry.table} of this version of diffusers: {error}"
    if present is None or (entry in _added and present is _added[entry][2]):
        return None
    return f"{entry} is {present!r} and not {entry.value()!r} of {PACKAGE}: another package registered it first"


def _add_all(entries: list[Entry]) -> None:
    """One after the other: making an entry may import another host, whose entries then wait for this one."""
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
    if entry in _added or entry in _refused:
        return
    if message := _conflict(entry):
        logger.warning("%s; left as it is.", message)
        _refused.add(entry)
        return
    table, key, value = _table(entry), entry.key(), entry.value()
    table[key] = value
    if entry.first:
        table.move_to_end(key, last=False)  # type: ignore[attr-defined]  # an OrderedDict
    _added[entry] = (table, key, value)


class _HostFinder(MetaPathFinder):
    """Finds the hosts by means of the other finders, and has the entries added once a host is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(entry.trigger == fullname for entry in ENTRIES):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _HostLoader(spec.loader)
                return spec
        return None


class _HostLoader(Loader):
    """The loader of a host; afterwards adds our entries and leaves the module with its own loader."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _add_all([entry for entry in ENTRIES if entry.trigger == module.__name__])


_finder = _HostFinder()
