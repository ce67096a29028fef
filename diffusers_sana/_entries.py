"""What this package adds to the tables of diffusers and transformers; `_registration.py` adds it.

Entries are names where the hosts accept names, so nothing of ours is imported before it is used: VILA-U for the auto
classes of transformers, our pipelines for `getattr(diffusers, name)`. The quantizers and auto pipelines of diffusers
need classes, so their entries import them.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from inspect import signature
from typing import Any

from diffusers_sana import _compat


logger = logging.getLogger(__name__)

PACKAGE = "diffusers_sana"

# Our drop-in classes and the diffusers classes that they replace. `SanaPipeline` loads the left for the right and
# saves the right for the left, so that its folders load without this package.
UPSTREAM_NAMES = {
    "AutoencoderDC": "AutoencoderDC",
    "FlowDPMSolverScheduler": "DPMSolverMultistepScheduler",
    "SanaControlNetModel": "SanaControlNetModel",
    "SanaTransformer2DModel": "SanaTransformer2DModel",
    "SanaVideoTransformer3DModel": "SanaVideoTransformer3DModel",
}


# Modules that the hosts import when they look up a name of ours -> our module with that name. They are created on
# import; a host's own module of the same name takes precedence.
GUEST_MODULES = {
    f"diffusers.{PACKAGE}": PACKAGE,
    **{
        f"transformers.models.{model_type}": f"{PACKAGE}.models.vila_u"
        for model_type in ("vila_u", "vila_u_vision", "vila_u_depth", "vila_u_llama")
    },
}


@dataclass(frozen=True)
class Entry:
    """One key that we add to a dictionary of a host.

    Attributes:
        feature: what users lose if the entry cannot be made.
        host: module with the table.
        table: attribute path of the table in `host`; "" for the names of the module itself.
        key, value: functions, called when the entry is made; only then may they import.
        after: module whose import triggers the entry; `host` if empty.
        first: put the entry in front, for hosts that search their table in order.
        wraps: the value wraps the existing one, which `unregister` restores.
    """

    feature: str
    host: str
    table: str
    key: Callable[[], Hashable]
    value: Callable[[], Any]
    after: str = ""
    first: bool = False
    wraps: bool = False

    @property
    def trigger(self) -> str:
        """The module whose import makes the entry due."""
        return self.after or self.host

    def __str__(self) -> str:
        return f"{self.host}.{self.table}[{self.key()!r}]"


def _pipeline(module: str, name: str) -> Callable[[], type]:
    return lambda: getattr(import_module(f"{PACKAGE}.pipelines.pipeline_{module}"), name)


def _block(module: str, name: str) -> Callable[[], type]:
    return lambda: getattr(import_module(f"{PACKAGE}.models.transformers.{module}"), name)


def _metadata(block: Callable[[], type]) -> Callable[[], Any]:
    return lambda: _compat.TransformerBlockMetadata(return_hidden_states_index=0, _cls=block())


def _loading_methods() -> dict[str, list[str]]:
    return {
        name: ["save_pretrained", "from_pretrained"] for name in ("ModelMixin", "SchedulerMixin", "DiffusionPipeline")
    }


def _svdquant(module: str, name: str) -> Callable[[], type]:
    return lambda: getattr(import_module(f"{PACKAGE}.quantizers.svdquant.{module}"), name)


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


def _prefer_ours() -> Callable[[Callable[..., type]], Callable[..., type]]:
    """Makes `DiffusionPipeline.from_pretrained` prefer our pipelines to namesakes, as the auto pipelines do."""

    def of(choose: Callable[..., type]) -> Callable[..., type]:
        @wraps(choose)
        def choose_ours(class_obj: type, *args: Any, **kwargs: Any) -> type:
            found = choose(class_obj, *args, **kwargs)
            is_named = class_obj.__name__ != "DiffusionPipeline"  # the user chose the class
            package = import_module(PACKAGE)
            if is_named or not found.__module__.startswith("diffusers.") or found.__name__ not in package.__all__:
                return found
            _log_choice(found.__name__)
            return getattr(package, found.__name__)

        return choose_ours

    return of


def _choose_how_to_load() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`DiffusionPipeline.from_pretrained` asks our pipelines for class and dtype of each component that it loads."""
    asked = ("name", "library_name", "class_name", "cached_folder", "dtype")

    def of(load: Callable[..., Any]) -> Callable[..., Any]:
        if missing := {"pipeline_class", *asked} - signature(load).parameters.keys():
            raise TypeError(f"`{load.__name__}` has no arguments {sorted(missing)}")

        @wraps(load)
        def load_as_chosen(*args: Any, **kwargs: Any) -> Any:
            if choose := getattr(kwargs.get("pipeline_class"), "how_to_load", None):
                kwargs |= choose(**{name: kwargs[name] for name in asked})
            return load(*args, **kwargs)

        return load_as_chosen

    return of


@cache
def _log_choice(name: str) -> None:
    logger.info(
        f"DiffusionPipeline.from_pretrained loads {PACKAGE}.{name}; diffusers.{name}.from_pretrained loads that of"
        " diffusers."
    )


_AUTO = "transformers.models.auto"
_VILA_U = "VilaUForConditionalGeneration"

ENTRIES = (
    # `model_index.json` may name our classes, in folders and on the Hub.
    Entry(
        feature="folders that name classes of diffusers_sana",
        host="diffusers.pipelines.pipeline_loading_utils",
        table="LOADABLE_CLASSES",
        key=_always(PACKAGE),
        value=_loading_methods,
    ),
    # `DiffusionPipeline.from_pretrained` looks up the class that an index names in diffusers, which maps each class to
    # a module. Ours are in a guest module.
    *(
        Entry(
            feature=f"{name} for DiffusionPipeline.from_pretrained",
            host="diffusers",
            table="_class_to_module",
            key=_always(name),
            value=_always(PACKAGE),
        )
        for name in (
            "LongSanaVideoPipeline",
            "SanaControlNetImg2ImgPipeline",
            "SanaControlNetInpaintPipeline",
            "SanaImg2ImgPipeline",
            "SanaInpaintPipeline",
            "SanaSprintControlNetPipeline",
            "SanaVideo2Pipeline",
            "SanaVideo2PreviewPipeline",
            "VilaUPipeline",
        )
    ),
    # If diffusers has a pipeline of the name in the index, there is no table to add ours to. It calls
    # `_get_pipeline_class`, only for `DiffusionPipeline.from_pretrained` and `download`. It then loads the components
    # without calling our `from_pretrained`, which keeps in bfloat16 what overflows float16. Only there is it known
    # which folder a scheduler comes from, and so whether ours can take the place of diffusers'.
    *(
        Entry(
            feature=feature,
            host="diffusers.pipelines.pipeline_utils",
            table="",
            key=_always(function),
            value=value,
            wraps=True,
        )
        for feature, function, value in (
            ("our pipelines for DiffusionPipeline.from_pretrained", "_get_pipeline_class", _prefer_ours),
            (
                "float16 and solvers that predict noise for DiffusionPipeline.from_pretrained",
                "load_sub_model",
                _choose_how_to_load,
            ),
        )
    ),
    # The auto pipelines take the first pipeline with the name in the index, which is "SanaPipeline" for diffusers' and
    # ours; then they take the pipeline with the same key in the table of the task. ControlNet and Sprint, which
    # diffusers does not list, have their own keys. `enable_pag` looks for "SanaPAGPipeline".
    *(
        Entry(
            feature=f"{name} for the auto pipelines of diffusers",
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
            ("INPAINT", "-controlnet", "sana_controlnet_inpaint", "SanaControlNetInpaintPipeline"),
            ("TEXT2IMAGE", "-sprint", "sana_sprint", "SanaSprintPipeline"),
            ("TEXT2IMAGE", "-sprint-controlnet", "sana_sprint_controlnet", "SanaSprintControlNetPipeline"),
            ("IMAGE2IMAGE", "-sprint", "sana_sprint_img2img", "SanaSprintImg2ImgPipeline"),
        )
    ),
    # Step caches (`enable_cache`) need to know what a block returns.
    *(
        Entry(
            feature=_compat.STEP_CACHES,
            host="diffusers.hooks._helpers",
            table="TransformerBlockRegistry._registry",
            key=_block(module, name),
            value=_metadata(_block(module, name)),
            after=f"{PACKAGE}.models.transformers.{module}",
        )
        for module, name in (
            ("transformer_sana", "SanaTransformerBlock"),
            ("transformer_sana_video", "SanaVideoTransformerBlock"),
        )
    ),
    # `from_pretrained(quantization_config=SVDQuantConfig())`, and folders whose config.json says "svdquant".
    *(
        Entry(
            feature=f"SVDQuant for from_pretrained of {library}",
            host=f"{library}.quantizers.auto",
            table=table,
            key=_always("svdquant"),
            value=_svdquant(module, name),
        )
        for library, table, module, name in (
            ("diffusers", "AUTO_QUANTIZER_MAPPING", "integrations.diffusers", "SVDQuantQuantizer"),
            ("diffusers", "AUTO_QUANTIZATION_CONFIG_MAPPING", "config", "SVDQuantConfig"),
            ("transformers", "AUTO_QUANTIZER_MAPPING", "integrations.transformers", "SVDQuantTransformersQuantizer"),
            ("transformers", "AUTO_QUANTIZATION_CONFIG_MAPPING", "config", "SVDQuantConfig"),
        )
    ),
    # VILA-U for the auto classes of transformers, by name as their own models are. The names are looked up in
    # `transformers.models.<model type>`, a guest module.
    *(
        Entry(
            feature=f"{name} for the auto classes of transformers",
            host=f"{_AUTO}.configuration_auto",
            table="CONFIG_MAPPING_NAMES",
            key=_always(model_type),
            value=_always(name),
        )
        for model_type, name in (
            ("vila_u", "VilaUConfig"),
            ("vila_u_vision", "VilaUVisionConfig"),
            ("vila_u_depth", "VilaUDepthConfig"),
            ("vila_u_llama", "VilaUOfficialConfig"),
        )
    ),
    *(
        Entry(
            feature=f"{config.replace('Config', '')} for the auto classes of transformers",
            host=f"{_AUTO}.{host}_auto",
            table=table,
            key=_always(key),
            value=_always(value),
        )
        for host, mapping, name, config, classes in (
            ("modeling", "MODEL_MAPPING", "vila_u", "VilaUConfig", "VilaUModel"),
            ("modeling", "MODEL_MAPPING", "vila_u_vision", "VilaUVisionConfig", "VilaUVisionModel"),
            ("modeling", "MODEL_FOR_CAUSAL_LM_MAPPING", "vila_u", "VilaUConfig", _VILA_U),
            ("modeling", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "vila_u", "VilaUConfig", _VILA_U),
            ("modeling", "MODEL_FOR_MULTIMODAL_LM_MAPPING", "vila_u", "VilaUConfig", _VILA_U),
            ("processing", "PROCESSOR_MAPPING", "vila_u", "VilaUConfig", "VilaUProcessor"),
            ("image_processing", "IMAGE_PROCESSOR_MAPPING", "vila_u", "VilaUConfig", {"pil": "VilaUImageProcessor"}),
        )
        for table, key, value in (
            (f"{mapping}_NAMES", name, classes),
            (f"{mapping}._reverse_config_mapping", config, name),
        )
    ),
)
