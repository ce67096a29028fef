"""What this package adds to the tables of diffusers and transformers; `_registration.py` adds it."""

import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any


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
    # and Sprint, which diffusers has not listed, have keys of their own. `enable_pag` looks for "SanaPAGPipeline".
    *(
        Entry(
            host="diffusers.pipelines.auto_pipeline",
            table=f"AUTO_{task}_PIPELINES_MAPPING",
            key=_always(PACKAGE + family),
            value=_pipeline(module, name),
            first=family in ("", "-pag"),
        )
        for task, family, module, name in (
            ("TEXT2IMAGE", "-pag", "sana_pag", "SanaPAGPipeline"),
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
