"""Entries of this package in the tables of diffusers and transformers: the only file that touches them.

Nothing is patched: `register` adds keys to dictionaries that the hosts look things up in, `unregister` takes them out.
Importing the modules that hold those dictionaries costs seconds, so an entry waits until its host is imported by
whoever needs it: a finder in `sys.meta_path` notices that import and adds the entry right after it. Hence the order
of `import diffusers_sana` and the imports of diffusers does not matter.
"""

import logging
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any


logger = logging.getLogger(__name__)

PACKAGE = "diffusers_sana"

# Our drop-ins and the diffusers classes whose place they take. `SanaPipeline` loads the left for the right and saves
# the right for the left, so that its folders load without this package.
UPSTREAM_NAMES = {
    "AutoencoderDC": "AutoencoderDC",
    "FlowDPMSolverScheduler": "DPMSolverMultistepScheduler",
    "SanaControlNetModel": "SanaControlNetModel",
    "SanaTransformer2DModel": "SanaTransformer2DModel",
}


@dataclass(frozen=True)
class Entry:
    """One key that we add to a dictionary of a host.

    Attributes:
        host: module that holds the table.
        table: attribute path of the table in `host`.
        key, value: functions, called when the entry is made: only then may they import.
        after: module whose import calls for the entry; `host` where it is empty.
        first: put the entry in front; for hosts that search their table in order.
    """

    host: str
    table: str
    key: Callable[[], Hashable]
    value: Callable[[], Any]
    after: str = ""
    first: bool = False

    @property
    def trigger(self) -> str:
        return self.after or self.host

    def __str__(self) -> str:
        return f"{self.host}.{self.table}[{self.key()!r}]"


def _pipeline(module: str, name: str) -> Callable[[], type]:
    return lambda: getattr(import_module(f"{PACKAGE}.pipelines.pipeline_{module}"), name)


def _block() -> type:
    return import_module(f"{PACKAGE}.models.transformers.transformer_sana").SanaTransformerBlock


def _block_metadata() -> Any:
    helpers = import_module("diffusers.hooks._helpers")
    return helpers.TransformerBlockMetadata(return_hidden_states_index=0, _cls=_block())


def _loading_methods() -> dict[str, list[str]]:
    return {
        name: ["save_pretrained", "from_pretrained"] for name in ("ModelMixin", "SchedulerMixin", "DiffusionPipeline")
    }


def _svdquant(module: str, name: str) -> Callable[[], type]:
    return lambda: getattr(import_module(f"{PACKAGE}.quantizers.svdquant.{module}"), name)


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


def _vila_u(module: str, name: str) -> Callable[[], type]:
    return lambda: getattr(import_module(f"{PACKAGE}.models.vila_u.{module}"), name)


def _vila_u_package() -> ModuleType:
    return import_module(f"{PACKAGE}.models.vila_u")


_AUTO = "transformers.models.auto"
_VILA_U = "VilaUForConditionalGeneration"

ENTRIES = (
    # `model_index.json` may name our classes, in folders and on the Hub.
    Entry("diffusers.pipelines.pipeline_loading_utils", "LOADABLE_CLASSES", _always(PACKAGE), _loading_methods),
    # `DiffusionPipeline.from_pretrained` looks for the class that an index names in diffusers, which knows in which of
    # its modules each of its classes is. Ours is in a module that is this package under another name.
    *(
        Entry(host="diffusers", table="_class_to_module", key=_always(name), value=_always(PACKAGE))
        for name in ("SanaControlNetImg2ImgPipeline", "SanaImg2ImgPipeline", "SanaInpaintPipeline", "VilaUPipeline")
    ),
    Entry("sys", "modules", _always(f"diffusers.{PACKAGE}"), lambda: sys.modules[PACKAGE], after="diffusers"),
    # The auto pipelines take the first pipeline of the name that the folder states, and that is "SanaPipeline" for
    # diffusers' and for ours; from there they go to the pipeline of the same key in the table of the task. ControlNet
    # and Sprint, which diffusers has not listed, have keys of their own.
    *(
        Entry(
            host="diffusers.pipelines.auto_pipeline",
            table=f"AUTO_{task}_PIPELINES_MAPPING",
            key=_always(PACKAGE + family),
            value=_pipeline(module, name),
            first=not family,
        )
        for task, family, module, name in (
            ("TEXT2IMAGE", "", "sana", "SanaPipeline"),
            ("IMAGE2IMAGE", "", "sana_img2img", "SanaImg2ImgPipeline"),
            ("INPAINT", "", "sana_inpaint", "SanaInpaintPipeline"),
            ("TEXT2IMAGE", "-controlnet", "sana_controlnet", "SanaControlNetPipeline"),
            ("IMAGE2IMAGE", "-controlnet", "sana_controlnet_img2img", "SanaControlNetImg2ImgPipeline"),
            ("TEXT2IMAGE", "-sprint", "sana_sprint", "SanaSprintPipeline"),
            ("IMAGE2IMAGE", "-sprint", "sana_sprint_img2img", "SanaSprintImg2ImgPipeline"),
        )
    ),
    # Step caches (`enable_cache`) need to know what a block returns.
    Entry(
        host="diffusers.hooks._helpers",
        table="TransformerBlockRegistry._registry",
        key=_block,
        value=_block_metadata,
        after=f"{PACKAGE}.models.transformers.transformer_sana",
    ),
    # `from_pretrained(quantization_config=SVDQuantConfig())`, and folders whose config.json says "svdquant".
    *(
        Entry(host=f"{library}.quantizers.auto", table=table, key=lambda: "svdquant", value=_svdquant(module, name))
        for library, table, module, name in (
            ("diffusers", "AUTO_QUANTIZER_MAPPING", "quantizer", "SVDQuantQuantizer"),
            ("diffusers", "AUTO_QUANTIZATION_CONFIG_MAPPING", "config", "SVDQuantConfig"),
            ("transformers", "AUTO_QUANTIZER_MAPPING", "transformers_quantizer", "SVDQuantTransformersQuantizer"),
            ("transformers", "AUTO_QUANTIZATION_CONFIG_MAPPING", "config", "SVDQuantConfig"),
        )
    ),
    # VILA-U for the auto classes of transformers: configs as their own `register` adds them. Everything else by name,
    # as their own models are, because a model cannot be imported while transformers is half imported itself. Names are
    # looked up in `transformers.models.<model type>`, which must then be our package.
    *(
        Entry(f"{_AUTO}.configuration_auto", "CONFIG_MAPPING._extra_content", _always(name), _vila_u(module, cls))
        for name, module, cls in (
            ("vila_u", "configuration_vila_u", "VilaUConfig"),
            ("vila_u_vision", "configuration_vila_u", "VilaUVisionConfig"),
            ("vila_u_depth", "configuration_vila_u", "VilaUDepthConfig"),
            ("vila_u_llama", "official_vila_u", "VilaUOfficialConfig"),
        )
    ),
    *(
        Entry("sys", "modules", _always(f"transformers.models.{name}"), _vila_u_package, f"{_AUTO}.configuration_auto")
        for name in ("vila_u", "vila_u_vision")
    ),
    *(
        Entry(f"{_AUTO}.{host}_auto", f"{table}.{part}", _always(key), _always(value))
        for host, table, name, config, classes in (
            ("modeling", "MODEL_MAPPING", "vila_u", "VilaUConfig", "VilaUModel"),
            ("modeling", "MODEL_MAPPING", "vila_u_vision", "VilaUVisionConfig", "VilaUVisionModel"),
            ("modeling", "MODEL_FOR_CAUSAL_LM_MAPPING", "vila_u", "VilaUConfig", _VILA_U),
            ("modeling", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "vila_u", "VilaUConfig", _VILA_U),
            ("modeling", "MODEL_FOR_MULTIMODAL_LM_MAPPING", "vila_u", "VilaUConfig", _VILA_U),
            ("processing", "PROCESSOR_MAPPING", "vila_u", "VilaUConfig", "VilaUProcessor"),
            ("image_processing", "IMAGE_PROCESSOR_MAPPING", "vila_u", "VilaUConfig", {"pil": "VilaUImageProcessor"}),
        )
        for part, key, value in (("_model_mapping", name, classes), ("_reverse_config_mapping", config, name))
    ),
)

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
