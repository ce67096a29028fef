"""Names of layers in files of other runtimes, which fuse layers that share their input and rename others.

A scheme maps the name of a layer in the file to the layers of the model that are its rows, in order. `*` stands for
anything and has the same value on both sides. Layers that no rule names have the same name in the file.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache


Scheme = Mapping[str, tuple[str, ...]]


def file_names(names: Iterable[str], scheme: Scheme, in_file: set[str] | None = None) -> dict[str, list[str]]:
    """The layers of a model by their place in a file.

    Args:
        names: of layers in the model.
        scheme: of the file.
        in_file: names of layers in the file, if it exists; rules for names that it does not have are ignored, because
            some writers fuse and others do not.

    Returns:
        Name in the file -> names in the model, in the order of their rows.

    Raises:
        ValueError: the model has only some of the layers that are fused.
    """
    places: dict[str, dict[int, str]] = {}
    for name in names:
        place, part = _place(name, scheme)
        if in_file is not None and place not in in_file:
            place, part = name, 0
        places.setdefault(place, {})[part] = name
    for place, members in places.items():
        if sorted(members) != list(range(len(members))) or len(members) not in _sizes(place, scheme):
            raise ValueError(f"{place!r} is made of layers that the model lacks; it has {sorted(members.values())}.")
    return {place: [members[part] for part in sorted(members)] for place, members in places.items()}


def _place(name: str, scheme: Scheme) -> tuple[str, int]:
    for target, parts in scheme.items():
        for part, source in enumerate(parts):
            if match := _pattern(source).fullmatch(name):
                pieces = target.split("*")
                return pieces[0] + "".join(map("".join, zip(match.groups(), pieces[1:], strict=True))), part
    return name, 0


def _sizes(place: str, scheme: Scheme) -> set[int]:
    """How many layers may stand at a place."""
    return {len(parts) for target, parts in scheme.items() if _pattern(target).fullmatch(place)} or {1}


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*", "(.*)"))
