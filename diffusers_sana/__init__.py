"""Sana and its relatives for diffusers: drop-in models, schedulers and pipelines; VILA-U for transformers.

Importing this package registers its classes with both (see `_registration.py`) and loads nothing heavy: every
public name below is imported from its module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusers_sana._compat import VILA_U, supports_feature
from diffusers_sana._registration import register as register
from diffusers_sana._registration import unregister as unregister


__version__ = "0.1.0"

# Public name -> module. The one list of what the package exports; type checkers read the same names below.
_EXPORTS = {
    "AutoencoderDC": "diffusers_sana.models.autoencoders.autoencoder_dc",
    "ControlPreprocessor": "diffusers_sana.preprocessors",
    "FlowDPMSolverScheduler": "diffusers_sana.schedulers.scheduling_flow_dpm_solver",
    "LongSanaVideoPipeline": "diffusers_sana.pipelines.pipeline_sana_video_long",
    "SANA_EMOJI": "diffusers_sana.checkpoints",
    "SANA_EMOJI_EDGES": "diffusers_sana.checkpoints",
    "SANA_EMOJI_PIXEL_ART": "diffusers_sana.checkpoints",
    "SANA_EMOJI_SPRINT": "diffusers_sana.checkpoints",
    "SVDQuantConfig": "diffusers_sana.quantizers.svdquant.config",
    "SanaControlNetImg2ImgPipeline": "diffusers_sana.pipelines.pipeline_sana_controlnet_img2img",
    "SanaControlNetInpaintPipeline": "diffusers_sana.pipelines.pipeline_sana_controlnet_inpaint",
    "SanaControlNetModel": "diffusers_sana.models.controlnets.controlnet_sana",
    "SanaControlNetPipeline": "diffusers_sana.pipelines.pipeline_sana_controlnet",
    "SanaIPAdapterModel": "diffusers_sana.models.ip_adapter_sana",
    "SanaImageToVideoPipeline": "diffusers_sana.pipelines.pipeline_sana_video_i2v",
    "SanaImg2ImgPipeline": "diffusers_sana.pipelines.pipeline_sana_img2img",
    "SanaInpaintPipeline": "diffusers_sana.pipelines.pipeline_sana_inpaint",
    "SanaMultiControlNetModel": "diffusers_sana.models.controlnets.multicontrolnet_sana",
    "SanaPAGPipeline": "diffusers_sana.pipelines.pipeline_sana_pag",
    "SanaPipeline": "diffusers_sana.pipelines.pipeline_sana",
    "SanaSprintControlNetPipeline": "diffusers_sana.pipelines.pipeline_sana_sprint_controlnet",
    "SanaSprintImg2ImgPipeline": "diffusers_sana.pipelines.pipeline_sana_sprint_img2img",
    "SanaSprintPipeline": "diffusers_sana.pipelines.pipeline_sana_sprint",
    "SanaTransformer2DModel": "diffusers_sana.models.transformers.transformer_sana",
    "SanaVideo2Pipeline": "diffusers_sana.pipelines.pipeline_sana_video2",
    "SanaVideo2PreviewPipeline": "diffusers_sana.pipelines.pipeline_sana_video2",
    "SanaVideo2Transformer3DModel": "diffusers_sana.models.transformers.transformer_sana_video2",
    "SanaVideoPipeline": "diffusers_sana.pipelines.pipeline_sana_video",
    "SanaVideoState": "diffusers_sana.models.transformers.stream_sana_video",
    "SanaVideoTransformer3DModel": "diffusers_sana.models.transformers.transformer_sana_video",
    "VILA_U_EMOJI": "diffusers_sana.checkpoints",
    "VilaUConfig": "diffusers_sana.models.vila_u.configuration_vila_u",
    "VilaUForConditionalGeneration": "diffusers_sana.models.vila_u.modeling_vila_u",
    "VilaUImageProcessor": "diffusers_sana.models.vila_u.image_processing_vila_u",
    "VilaUModel": "diffusers_sana.models.vila_u.modeling_vila_u",
    "VilaUPipeline": "diffusers_sana.pipelines.pipeline_vila_u",
    "VilaUProcessor": "diffusers_sana.models.vila_u.processing_vila_u",
    "VilaUVisionModel": "diffusers_sana.models.vila_u.vision_vila_u",
    "add_remote_code": "diffusers_sana.loaders.vila_u.hub",
    "best_of": "diffusers_sana.evaluation.best_of",
    "cfg_parallel": "diffusers_sana.pipelines.acceleration.cfg_parallel",
    "checkpoint_path": "diffusers_sana.loading",
    "convert": "diffusers_sana.loaders.nvlabs.convert",
    "convert_quantized": "diffusers_sana.loaders.quantized.hub",
    "convert_sana_lora": "diffusers_sana.loaders.lora.formats",
    "convert_vila_u": "diffusers_sana.loaders.vila_u.convert",
    "export_nunchaku_lite": "diffusers_sana.loaders.nunchaku.lite",
    "export_quantized": "diffusers_sana.loaders.quantized.hub",
    "export_vila_u": "diffusers_sana.loaders.vila_u.export",
    "extract_lora": "diffusers_sana.loaders.lora.extract",
    "find_pipeline_class": "diffusers_sana.loading",
    "kernel_mode": "diffusers_sana.kernels.dispatch",
    "load_adapter": "diffusers_sana.loaders.lora.any_model",
    "load_nunchaku": "diffusers_sana.loaders.nunchaku.load",
    "load_nunchaku_lite": "diffusers_sana.loaders.nunchaku.lite",
    "load_quantized": "diffusers_sana.loaders.quantized.hub",
    "lora_to_comfyui": "diffusers_sana.loaders.lora.comfyui",
    "measure_input_scales": "diffusers_sana.loaders.quantized.modelopt",
    "modular_pipeline": "diffusers_sana.modular.blocks",
    "plan_conversion": "diffusers_sana.loaders.nvlabs.convert",
    "plan_vila_u": "diffusers_sana.loaders.vila_u.convert",
    "quantize": "diffusers_sana.quantizers.svdquant.api",
    "set_compute_mode": "diffusers_sana.quantizers.svdquant.api",
    "sobel_edges": "diffusers_sana.images",
    "vae_parallel": "diffusers_sana.pipelines.acceleration.vae_parallel",
}
# diffusers and transformers look for the base classes of a class in its package. They are not part of our API.
_BASE_CLASSES = {
    "DiffusionPipeline": "diffusers",
    "ModelMixin": "diffusers",
    "PreTrainedModel": "transformers",
    "ProcessorMixin": "transformers",
    "SchedulerMixin": "diffusers",
}

if TYPE_CHECKING:
    from diffusers_sana.checkpoints import SANA_EMOJI as SANA_EMOJI
    from diffusers_sana.checkpoints import SANA_EMOJI_EDGES as SANA_EMOJI_EDGES
    from diffusers_sana.checkpoints import SANA_EMOJI_PIXEL_ART as SANA_EMOJI_PIXEL_ART
    from diffusers_sana.checkpoints import SANA_EMOJI_SPRINT as SANA_EMOJI_SPRINT
    from diffusers_sana.checkpoints import VILA_U_EMOJI as VILA_U_EMOJI
    from diffusers_sana.evaluation.best_of import best_of as best_of
    from diffusers_sana.images import sobel_edges as sobel_edges
    from diffusers_sana.kernels.dispatch import kernel_mode as kernel_mode
    from diffusers_sana.loaders.lora.any_model import load_adapter as load_adapter
    from diffusers_sana.loaders.lora.comfyui import lora_to_comfyui as lora_to_comfyui
    from diffusers_sana.loaders.lora.extract import extract_lora as extract_lora
    from diffusers_sana.loaders.lora.formats import convert_sana_lora as convert_sana_lora
    from diffusers_sana.loaders.nunchaku.lite import export_nunchaku_lite as export_nunchaku_lite
    from diffusers_sana.loaders.nunchaku.lite import load_nunchaku_lite as load_nunchaku_lite
    from diffusers_sana.loaders.nunchaku.load import load_nunchaku as load_nunchaku
    from diffusers_sana.loaders.nvlabs.convert import convert as convert
    from diffusers_sana.loaders.nvlabs.convert import plan_conversion as plan_conversion
    from diffusers_sana.loaders.quantized.hub import convert_quantized as convert_quantized
    from diffusers_sana.loaders.quantized.hub import export_quantized as export_quantized
    from diffusers_sana.loaders.quantized.hub import load_quantized as load_quantized
    from diffusers_sana.loaders.quantized.modelopt import measure_input_scales as measure_input_scales
    from diffusers_sana.loaders.vila_u.convert import convert_vila_u as convert_vila_u
    from diffusers_sana.loaders.vila_u.convert import plan_vila_u as plan_vila_u
    from diffusers_sana.loaders.vila_u.export import export_vila_u as export_vila_u
    from diffusers_sana.loaders.vila_u.hub import add_remote_code as add_remote_code
    from diffusers_sana.loading import checkpoint_path as checkpoint_path
    from diffusers_sana.loading import find_pipeline_class as find_pipeline_class
    from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC as AutoencoderDC
    from diffusers_sana.models.controlnets.controlnet_sana import SanaControlNetModel as SanaControlNetModel
    from diffusers_sana.models.controlnets.multicontrolnet_sana import (
        SanaMultiControlNetModel as SanaMultiControlNetModel,
    )
    from diffusers_sana.models.ip_adapter_sana import SanaIPAdapterModel as SanaIPAdapterModel
    from diffusers_sana.models.transformers.stream_sana_video import SanaVideoState as SanaVideoState
    from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel as SanaTransformer2DModel
    from diffusers_sana.models.transformers.transformer_sana_video import (
        SanaVideoTransformer3DModel as SanaVideoTransformer3DModel,
    )
    from diffusers_sana.models.transformers.transformer_sana_video2 import (
        SanaVideo2Transformer3DModel as SanaVideo2Transformer3DModel,
    )
    from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig as VilaUConfig
    from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessor as VilaUImageProcessor
    from diffusers_sana.models.vila_u.modeling_vila_u import (
        VilaUForConditionalGeneration as VilaUForConditionalGeneration,
    )
    from diffusers_sana.models.vila_u.modeling_vila_u import VilaUModel as VilaUModel
    from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor as VilaUProcessor
    from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModel as VilaUVisionModel
    from diffusers_sana.modular.blocks import modular_pipeline as modular_pipeline
    from diffusers_sana.pipelines.acceleration.cfg_parallel import cfg_parallel as cfg_parallel
    from diffusers_sana.pipelines.acceleration.vae_parallel import vae_parallel as vae_parallel
    from diffusers_sana.pipelines.pipeline_sana import SanaPipeline as SanaPipeline
    from diffusers_sana.pipelines.pipeline_sana_controlnet import SanaControlNetPipeline as SanaControlNetPipeline
    from diffusers_sana.pipelines.pipeline_sana_controlnet_img2img import (
        SanaControlNetImg2ImgPipeline as SanaControlNetImg2ImgPipeline,
    )
    from diffusers_sana.pipelines.pipeline_sana_controlnet_inpaint import (
        SanaControlNetInpaintPipeline as SanaControlNetInpaintPipeline,
    )
    from diffusers_sana.pipelines.pipeline_sana_img2img import SanaImg2ImgPipeline as SanaImg2ImgPipeline
    from diffusers_sana.pipelines.pipeline_sana_inpaint import SanaInpaintPipeline as SanaInpaintPipeline
    from diffusers_sana.pipelines.pipeline_sana_pag import SanaPAGPipeline as SanaPAGPipeline
    from diffusers_sana.pipelines.pipeline_sana_sprint import SanaSprintPipeline as SanaSprintPipeline
    from diffusers_sana.pipelines.pipeline_sana_sprint_controlnet import (
        SanaSprintControlNetPipeline as SanaSprintControlNetPipeline,
    )
    from diffusers_sana.pipelines.pipeline_sana_sprint_img2img import (
        SanaSprintImg2ImgPipeline as SanaSprintImg2ImgPipeline,
    )
    from diffusers_sana.pipelines.pipeline_sana_video import SanaVideoPipeline as SanaVideoPipeline
    from diffusers_sana.pipelines.pipeline_sana_video2 import SanaVideo2Pipeline as SanaVideo2Pipeline
    from diffusers_sana.pipelines.pipeline_sana_video2 import SanaVideo2PreviewPipeline as SanaVideo2PreviewPipeline
    from diffusers_sana.pipelines.pipeline_sana_video_i2v import SanaImageToVideoPipeline as SanaImageToVideoPipeline
    from diffusers_sana.pipelines.pipeline_sana_video_long import LongSanaVideoPipeline as LongSanaVideoPipeline
    from diffusers_sana.pipelines.pipeline_vila_u import VilaUPipeline as VilaUPipeline
    from diffusers_sana.preprocessors import ControlPreprocessor as ControlPreprocessor
    from diffusers_sana.quantizers.svdquant.api import quantize as quantize
    from diffusers_sana.quantizers.svdquant.api import set_compute_mode as set_compute_mode
    from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig as SVDQuantConfig
    from diffusers_sana.schedulers.scheduling_flow_dpm_solver import FlowDPMSolverScheduler as FlowDPMSolverScheduler


def _public_names() -> list[str]:
    """What `import *` gives: without the names of VILA-U where transformers is too old for it."""
    # Not computed on import, since the version of transformers takes longer to read than this file.
    names = _EXPORTS if supports_feature(VILA_U) else (name for name in _EXPORTS if "vila_u" not in _EXPORTS[name])
    return ["register", "unregister", *names]


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _public_names()
    module = _EXPORTS.get(name) or _BASE_CLASSES.get(name)
    if module is None:
        raise AttributeError(f"module 'diffusers_sana' has no attribute {name!r}; it has {sorted(_EXPORTS)}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*_public_names(), *(name for name in globals() if name.startswith("__"))])


register()
