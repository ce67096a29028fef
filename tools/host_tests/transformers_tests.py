"""The folder `tests` of the unpacked source distribution of transformers as the package `tests`.

To be imported before anything of it, in that folder. The distribution lacks the tests of generation and export, and
what fetches files for the hosts' own machines; empty classes and images of our own stand in for them.
"""

import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image


def local_file(url: str) -> str:
    """In place of a download: of an image, one of another content; else the address."""
    if Path(url).suffix not in (".jpg", ".png"):
        return url
    file = Path(tempfile.gettempdir(), f"host_tests_{Path(url).name}")
    Image.linear_gradient("L").convert("RGB").save(file)
    return str(file)


package: Any = ModuleType("tests")
package.__path__ = [str(Path.cwd() / "tests")]
sys.modules["tests"] = package
for module, name in (
    ("generation.test_utils", "GenerationTesterMixin"),
    ("exporters.test_export", "ExportTesterMixin"),
):
    stand_in: Any = ModuleType(f"tests.{module}")
    setattr(stand_in, name, type(name, (), {}))
    folder = module.partition(".")[0]
    sys.modules[f"tests.{folder}"] = ModuleType(f"tests.{folder}")
    sys.modules[f"tests.{module}"] = stand_in

fetching: Any = ModuleType("fetch_hub_objects_for_ci")
fetching.url_to_local_path = local_file
sys.modules["fetch_hub_objects_for_ci"] = fetching
