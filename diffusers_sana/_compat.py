"""Every private or young name of a host library that the package uses, and the versions it was tested with.

Other modules import such names from here, and read such attributes with `private`. A name that a host's version lacks
costs the feature that needs it, with an error that names the host, the version found and the versions that work; it
never costs the import of this package. Importing this module imports no host: names are looked up on first use.

`tests/test_architecture.py` finds private names that are not listed here, `tests/test_compat.py` listed names that the
installed versions lack. To add a name, add a line to `IMPORTS` or `ATTRIBUTES`.
"""

import inspect
import logging
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Host:
    """A library that we plug into, and the versions that the tests ran with.

    Attributes:
        lowest: the oldest version, which `pyproject.toml` asks for.
        highest: the newest version, as "major.minor": all of its patch releases count as tested.
    """

    lowest: str
    highest: str


HOSTS = {
    "accelerate": Host("1.10", "1.15"),
    "diffusers": Host("0.42.1", "0.42"),
    "peft": Host("0.19.1", "0.21"),  # transformers refuses older ones for adapters on text encoders
    "torch": Host("2.8", "2.13"),
    "transformers": Host("5.17", "5.23"),
    "triton": Host("3.4", "3.9"),
}


@dataclass(frozen=True)
class HostName:
    """A name of a host.

    Attributes:
        where: "module:name", for an attribute of a class "module:Class".
        feature: what is lost without it.
        since: the first version that has it, where that is not the host's `lowest`.
        in_source: only instances have the attribute, so the class cannot be asked for it, only its module's source.
    """

    where: str
    feature: str
    since: str = ""
    in_source: bool = False

    @property
    def host(self) -> str:
        """The library: the first part of `where`."""
        return self.where.partition(".")[0].partition(":")[0]

    @property
    def oldest(self) -> str:
        """The first version of the host that has the name."""
        return self.since or HOSTS[self.host].lowest


VILA_U = "VILA-U"
STEP_CACHES = "step caches (`enable_cache`)"
QUANTIZED = "loading SVDQuant models"
QUANTIZED_LORA = "LoRA on SVDQuant models"
TEXT_LORA = "adapters of the text encoder"
CONTEXT_PARALLEL = "context parallelism (`enable_parallelism`)"
TENSOR_PARALLEL = "tensor parallelism (`enable_parallelism`)"
KERNELS = "the Triton kernels"
COMPILED_BLOCKS = "`compile_repeated_blocks`"
PROMPT_PREFIX = "keeping what the text encoder makes of the instruction"
SEVERAL_RUNS = "several training runs in one process"
TRACKERS = "`report_to` of a training"
DEVICE_MAPS = "device maps and offloading"

# Name -> where it comes from. `from diffusers_sana._compat import NAME` looks it up.
IMPORTS = {
    "ContextParallelInput": HostName("diffusers.models._modeling_parallel:ContextParallelInput", CONTEXT_PARALLEL),
    "ContextParallelOutput": HostName("diffusers.models._modeling_parallel:ContextParallelOutput", CONTEXT_PARALLEL),
    "PackedColwiseParallel": HostName("diffusers.hooks.tensor_parallel:PackedColwiseParallel", TENSOR_PARALLEL),
    "check_tp_supported": HostName("diffusers.hooks.tensor_parallel:_check_tp_supported", TENSOR_PARALLEL),
    "resolve_tp_shard_specs": HostName("diffusers.hooks.tensor_parallel:resolve_tp_shard_specs", TENSOR_PARALLEL),
    "TransformerBlockMetadata": HostName("diffusers.hooks._helpers:TransformerBlockMetadata", STEP_CACHES),
    "reapply_group_offloading": HostName(
        "diffusers.hooks.group_offloading:_maybe_remove_and_reapply_group_offloading", TEXT_LORA
    ),
    "fetch_state_dict": HostName("diffusers.loaders.lora_base:_fetch_state_dict", "loading LoRA files"),
    "tree_map_only": HostName("torch.utils._pytree:tree_map_only", QUANTIZED_LORA),
    # Of transformers 5, without a promise to stay.
    "ConversionOps": HostName("transformers.core_model_loading:ConversionOps", QUANTIZED),
    "MultiModalData": HostName("transformers.processing_utils:MultiModalData", VILA_U),
    "PilBackend": HostName("transformers.image_processing_backends:PilBackend", VILA_U),
    "SubConfigSpec": HostName("transformers.configuration_utils:SubConfigSpec", VILA_U, since="5.20"),
    "capture_outputs": HostName("transformers.utils.output_capturing:capture_outputs", VILA_U),
    "merge_with_config_defaults": HostName("transformers.utils.generic:merge_with_config_defaults", VILA_U),
    "slice_logits_to_keep": HostName("transformers.modeling_utils:slice_logits_to_keep", VILA_U, since="5.21"),
    "torch_compilable_check": HostName("transformers.utils.import_utils:torch_compilable_check", VILA_U),
    # Public, and young or without documentation.
    "LOGGER_TYPE_TO_CLASS": HostName("accelerate.tracking:LOGGER_TYPE_TO_CLASS", TRACKERS),
    "triton_driver": HostName("triton.runtime:driver", KERNELS),
    "triton_knobs": HostName("triton:knobs", KERNELS),
}

_MODULE = "torch.nn.modules.module:Module"
_DIFFUSERS_MODEL = "diffusers.models.modeling_utils:ModelMixin"
_PIPELINE = "diffusers.pipelines.pipeline_utils:DiffusionPipeline"
_CACHES = "diffusers.models.cache_utils:CacheMixin"
_PRETRAINED = "transformers.modeling_utils:PreTrainedModel"
_CONFIG = "transformers.configuration_utils:PreTrainedConfig"
_GENERATION = "transformers.generation.utils:GenerationMixin"
_IMAGE_PROCESSOR = "transformers.image_processing_utils:BaseImageProcessor"
_ACCELERATOR = "accelerate.state:AcceleratorState"
_QUANTIZERS = ("diffusers.quantizers.base:DiffusersQuantizer", "transformers.quantizers.base:HfQuantizer")

# Attribute -> the classes of the hosts that have it. Either we read it, or the host reads ours, and a new name for it
# would mean that ours is passed over in silence.
ATTRIBUTES: dict[str, tuple[HostName, ...]] = {
    # Read or called by us.
    "_C": (HostName("torch:", QUANTIZED_LORA),),
    "_attn_implementation": (HostName(_CONFIG, VILA_U),),
    "_backward_hooks": (HostName(_MODULE, "all models", in_source=True),),
    "_backward_pre_hooks": (HostName(_MODULE, "all models", in_source=True),),
    "_cache_config": (HostName(_CACHES, STEP_CACHES),),
    "_class_to_module": (HostName("diffusers:", "our pipelines for DiffusionPipeline.from_pretrained"),),
    "_buffers": (HostName(_MODULE, PROMPT_PREFIX, in_source=True),),
    "_compiled_call_impl": (HostName(_MODULE, PROMPT_PREFIX),),
    "_diffusers_hook": (HostName("diffusers.hooks.hooks:HookRegistry", "CUDA graphs", in_source=True),),
    "_execution_device": (HostName(_PIPELINE, "all pipelines"),),
    "_expand_multimodal_outputs": (HostName(_GENERATION, VILA_U, since="5.21"),),
    "_flattened_mesh": (
        HostName("diffusers.models._modeling_parallel:ContextParallelConfig", CONTEXT_PARALLEL, in_source=True),
    ),
    "_forward_hooks": (HostName(_MODULE, "all models", in_source=True),),
    "_forward_pre_hooks": (HostName(_MODULE, "all models", in_source=True),),
    "_from_config": (HostName(_PRETRAINED, VILA_U),),
    "_get_init_keys": (HostName(_PIPELINE, "messages for incomplete folders"),),
    "_get_pipeline_class": (
        HostName("diffusers.pipelines.pipeline_utils:", "our pipelines for DiffusionPipeline.from_pretrained"),
    ),
    "_get_signature_keys": (HostName(_PIPELINE, "`from_pipe`"),),
    "_identifier_key": (HostName("diffusers.guiders.guider_utils:BaseGuidance", "`guider`"),),
    "_hf_hook": (HostName("accelerate.hooks:ModelHook", "offloading of VILA-U, CUDA graphs", in_source=True),),
    "_hf_peft_config_loaded": (
        HostName("transformers.integrations.peft:PeftAdapterMixin", "saving the adapters of transformers alone"),
    ),
    "_is_hf_initialized": (HostName(_PRETRAINED, QUANTIZED, in_source=True),),
    "_is_stateful": (HostName("diffusers.hooks.hooks:ModelHook", STEP_CACHES),),
    "_is_quantized": (HostName("transformers.quantizers.base:HfQuantizer", QUANTIZED, in_source=True),),
    "_keep_in_fp32_modules": (HostName(_DIFFUSERS_MODEL, QUANTIZED), HostName(_PRETRAINED, QUANTIZED)),
    "_make_wrapper_subclass": (HostName("torch:Tensor", QUANTIZED_LORA),),
    "_merge_kwargs": (HostName("transformers.processing_utils:ProcessorMixin", VILA_U),),
    "_modules": (HostName(_MODULE, PROMPT_PREFIX, in_source=True),),
    "_mesh": (HostName("diffusers.models._modeling_parallel:TensorParallelConfig", TENSOR_PARALLEL, in_source=True),),
    "_mixed_precision": (HostName(_ACCELERATOR, SEVERAL_RUNS, in_source=True),),
    "_name_or_path": (HostName(_CONFIG, "the report of `quantize`", in_source=True),),
    "_optionally_disable_offloading": (HostName("diffusers.loaders.lora_base:LoraBaseMixin", TEXT_LORA),),
    "_parallel_config": (HostName(_DIFFUSERS_MODEL, "step caches under context parallelism"),),
    "_parameters": (HostName(_MODULE, PROMPT_PREFIX, in_source=True),),
    "_progress_bar_config": (HostName(_PIPELINE, "progress bars", in_source=True),),
    "_register_state_dict_hook": (HostName(_MODULE, QUANTIZED_LORA),),
    "_registry": (HostName("diffusers.hooks._helpers:TransformerBlockRegistry", STEP_CACHES),),
    "_resolve_parallel_config": (HostName(_DIFFUSERS_MODEL, TENSOR_PARALLEL),),
    "_reverse_config_mapping": (HostName("transformers.models.auto.modeling_auto:MODEL_MAPPING", VILA_U),),
    "_reset_state": (HostName(_ACCELERATOR, SEVERAL_RUNS),),
    "_scaled_mm": (HostName("torch:", "products of float8 layers"),),
    "_schema": (HostName("torch._ops:OpOverload", QUANTIZED_LORA, in_source=True),),
    "_shared_state": (HostName(_ACCELERATOR, SEVERAL_RUNS),),
    "_text_preprocessing": (HostName("diffusers.pipelines.sana.pipeline_sana:SanaPipeline", "`clean_caption=True`"),),
    "_unconditional_conditional_input_kwargs_identifiers": (
        HostName("diffusers.hooks.faster_cache:FasterCacheConfig", STEP_CACHES),
    ),
    "_version": (HostName("torch:Tensor", "caches of what was computed from weights"),),
    # Defined by us, read or called by the hosts.
    "_apply": (HostName(_MODULE, "moving models between devices and dtypes"),),
    "_can_compile_fullgraph": (HostName(_PRETRAINED, VILA_U),),
    "_can_record_outputs": (HostName(_PRETRAINED, VILA_U),),
    "_compatibles": (HostName("diffusers.schedulers.scheduling_utils:SchedulerMixin", "`scheduler.compatibles`"),),
    "_cp_plan": (HostName(_DIFFUSERS_MODEL, CONTEXT_PARALLEL),),
    "_get_candidate_generator": (HostName(_GENERATION, VILA_U),),
    "_get_logits_processor": (HostName(_GENERATION, VILA_U),),
    "_init_weights": (HostName(_PRETRAINED, VILA_U),),
    "_input_embed_layer": (HostName("transformers.modeling_utils:EmbeddingAccessMixin", VILA_U),),
    "_keys_to_ignore_on_save": (HostName(_PRETRAINED, VILA_U),),
    "_load_from_state_dict": (HostName(_MODULE, "loading weights"),),
    "_lora_loadable_modules": (HostName("diffusers.loaders.lora_base:LoraBaseMixin", TEXT_LORA),),
    "_no_split_modules": (HostName(_DIFFUSERS_MODEL, DEVICE_MAPS), HostName(_PRETRAINED, DEVICE_MAPS)),
    "_optional_components": (HostName(_PIPELINE, "image prompts"),),
    "_preprocess": (HostName(_IMAGE_PROCESSOR, VILA_U),),
    "_process_model_after_weight_loading": tuple(HostName(where, QUANTIZED) for where in _QUANTIZERS),
    "_process_model_before_weight_loading": tuple(HostName(where, QUANTIZED) for where in _QUANTIZERS),
    "_repeated_blocks": (HostName(_DIFFUSERS_MODEL, COMPILED_BLOCKS),),
    "_skip_keys_device_placement": (HostName(_PRETRAINED, DEVICE_MAPS),),
    "_skip_layerwise_casting_patterns": (HostName(_DIFFUSERS_MODEL, "`enable_layerwise_casting`"),),
    "_supports_attention_backend": (HostName(_PRETRAINED, VILA_U),),
    "_supports_flash_attn": (HostName(_PRETRAINED, VILA_U),),
    "_supports_flex_attn": (HostName(_PRETRAINED, VILA_U),),
    "_supports_gradient_checkpointing": (HostName(_DIFFUSERS_MODEL, "gradient checkpointing"),),
    "_supports_qkv_fusion": (HostName("diffusers.models.attention:AttentionModuleMixin", "`fuse_qkv_projections`"),),
    "_supports_sdpa": (HostName(_PRETRAINED, VILA_U),),
    "_tied_weights_keys": (HostName(_PRETRAINED, VILA_U),),
    "_tp_plan": (HostName(_PRETRAINED, VILA_U), HostName(_DIFFUSERS_MODEL, TENSOR_PARALLEL)),
    "_validate_preprocess_kwargs": (HostName(_IMAGE_PROCESSOR, VILA_U),),
}


def supports(name: HostName) -> bool:
    """Whether the installed version of its host is one that should have the name."""
    return release(version_of(name.host)) >= release(name.oldest)


def supports_feature(feature: str) -> bool:
    """Whether the installed versions should have all names that a feature imports."""
    return all(supports(name) for name in IMPORTS.values() if name.feature == feature)


class MissingHostName(ImportError):
    """The installed version of a host lacks a name that a feature needs."""


def private(owner: Any, name: str) -> Any:
    """`owner.name`, for a name in `ATTRIBUTES`.

    Raises:
        MissingHostName: the installed version has no such attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise _missing(ATTRIBUTES[name][0], name) from error


def triton_refusal() -> str | None:
    """Why the Triton kernels cannot run with what is installed, or None if they can. Does not import triton."""
    if find_spec("triton") is None:
        return "triton is not installed"
    found, lowest = version_of("triton"), HOSTS["triton"].lowest
    if release(found) < release(lowest):
        return f"triton {found} is older than {lowest}, the oldest version that has what the kernels use"
    return None


def explain(module: str, error: BaseException) -> str:
    """Why something of ours failed in a module of a host: the error, the version found and the versions that work."""
    cause: BaseException | None = error
    while cause is not None:  # the lazy modules of the hosts wrap what was raised
        if isinstance(cause, MissingHostName):
            return str(cause)
        cause = cause.__cause__
    host = module.partition(".")[0]
    text = f"{type(error).__name__}: {error}"
    if host not in HOSTS:
        return text
    tested = HOSTS[host]
    return f"{text} (with {host} {version_of(host)}; {host} {tested.lowest} to {tested.highest} work)"


class _Unusable(type):
    """Of classes that stand for one that could not be imported: whatever is done with them raises the reason."""

    _reason: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(cls._reason)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(cls._reason)


def unusable(name: str, reason: str) -> type:
    """A class of that name that raises ImportError when it is made, or asked for anything."""
    return _Unusable(name, (), {"_reason": reason})


def onednn_computes(dtype: Any) -> bool:
    """Whether oneDNN has instructions of this processor for matrix products of `torch.bfloat16` or `torch.float16`.

    False for builds of PyTorch without oneDNN, such as those for Apple silicon, which lack the operators to ask.
    """
    import torch

    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except Exception:  # whatever a build of PyTorch makes of the question
        return False


def has_int8_product() -> bool:
    """Whether this build of PyTorch has oneDNN's 8-bit matrix product."""
    import torch

    try:
        available = torch.backends.mkldnn.is_available()
        return (
            available
            and hasattr(torch.ops.onednn, "qlinear_prepack")
            and hasattr(torch.ops.onednn, "qlinear_pointwise")
        )
    except Exception:  # whatever a build of PyTorch makes of the question
        return False


def cpu_has_vnni() -> bool:
    """Whether this processor adds 8-bit products in 32 bits. False where PyTorch cannot tell."""
    import torch

    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported())


def upstream_instruction(where: str = "diffusers.pipelines.sana.pipeline_sana:SanaPipeline") -> tuple[str, ...]:
    """The lines that diffusers' Sana pipelines put before a prompt by default ("complex human instruction").

    Args:
        where: module and name of the pipeline.

    Raises:
        MissingHostName: the installed diffusers has no such argument.
    """
    module, _, name = where.partition(":")
    pipeline = getattr(import_module(module), name)
    argument = inspect.signature(pipeline.__call__).parameters.get("complex_human_instruction")
    if argument is None:
        raise _missing(HostName(where, "the instruction before a prompt"), "__call__(complex_human_instruction)")
    return tuple(argument.default)


def version_of(host: str) -> str:
    """The installed version of a host, "" where it is not installed."""
    version = getattr(sys.modules.get(host), "__version__", None)
    if version is not None:
        return str(version)
    from importlib import metadata  # takes longer than the rest of this package's import

    with suppress(metadata.PackageNotFoundError):
        return metadata.version(host)
    # Triton also comes under other names: pytorch-triton, triton-windows, ...
    with suppress(Exception):
        return str(import_module(host).__version__)
    return ""


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2, 13, 0) for "2.13.0+cpu", (5, 0) for "5.0rc1"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


@cache
def warn_if_untested(host: str) -> None:
    """Says once in a process that the installed version of a host is not one that the tests ran with.

    Called where a host is first used: by the registration, by lookups of names in `IMPORTS`, and by the modules that
    import accelerate or PEFT or that all operations go through.
    """
    tested, found = HOSTS.get(host), version_of(host)
    if tested is None or not found:
        return
    if release(found) < release(tested.lowest):
        logger.warning(
            f"{host} {found} is older than {tested.lowest}, the oldest version that diffusers_sana supports. "
            f'Run `pip install -U "{host}>={tested.lowest}"`.'
        )
    elif release(found)[:2] > release(tested.highest):
        logger.warning(
            f"{host} {found} is newer than {tested.highest}, the newest version that this diffusers_sana was tested "
            f"with. It may work; if a feature fails, upgrade diffusers_sana or install {host} {tested.highest}."
        )


def _missing(name: HostName, attribute: str = "") -> MissingHostName:
    place = name.where.replace(":", ".") + (f".{attribute}" if attribute else "")
    host, found = name.host, version_of(name.host)
    same_feature = [other for other in IMPORTS.values() if (other.host, other.feature) == (host, name.feature)]
    lowest = max((other.oldest for other in [name, *same_feature]), key=release)
    remedy = f'Run `pip install -U "{host}>={lowest}"`.'
    if not found:
        return MissingHostName(f"{name.feature} needs {host}, which is not installed. {remedy}")
    if release(found) >= release(lowest):
        remedy = f"Upgrade diffusers_sana, or install one of these versions of {host}."
    return MissingHostName(
        f"{name.feature} needs `{place}`, which {host} {found} does not have; "
        f"{host} {lowest} to {HOSTS[host].highest} work. {remedy}"
    )


def __getattr__(name: str) -> Any:
    if name not in IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    entry = IMPORTS[name]
    module, _, path = entry.where.partition(":")
    warn_if_untested(entry.host)
    try:
        value = attrgetter(path)(import_module(module))
    except (AttributeError, ModuleNotFoundError) as error:
        raise _missing(entry) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *IMPORTS])
