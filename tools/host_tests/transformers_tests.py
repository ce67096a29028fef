"""The folder `tests` of the unpacked source distribution of transformers as the package `tests`.

To be imported before anything of it, in that folder. The distribution lacks the tests of generation and export, and
what fetches files for the hosts' own machines; empty classes and the identity stand in for them.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


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
fetching.url_to_local_path = lambda url: url
sys.modules["fetch_hub_objects_for_ci"] = fetching
