"""Sana and its relatives for diffusers: drop-in models, schedulers and pipelines; VILA-U for transformers.

Importing this package registers its classes with both (see `_registration.py`) and loads nothing heavy: every
public name below is imported from its module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusers_sana._registration import register as register
from diffusers_sana._registration import unregister as unregister


__version__ = "0.1.0"

# Public name -> module. The one list of what the package exports.
_EXPORTS = {
    "AutoencoderDC": "diffusers_sana.models.autoencoders.autoencoder_dc",
    "DiffusionPipeline": "diffusers",  # this and its like: diffusers looks for the bases of a class in its package
    "FlowDPMSolverScheduler": "diffusers_sana.schedulers.scheduling_flow_dpm_solver",
    "ModelMixin": "diffusers",
    "PreTrainedModel": "transformers",
    "ProcessorMixin": "transformers",
    "SVDQuantConfig": "diffusers_sana.quantizers.svdquant.config",
    "SanaControlNetModel": "diffusers_sana.models.controlnets.controlnet_sana",
    "SanaControlNetImg2ImgPipeline": "diffusers_sana.pipelines.pipeline_sana_controlnet_img2img",
    "SanaControlNetPipeline": "diffusers_sana.pipelines.pipeline_sana_controlnet",
    "SanaImg2ImgPipeline": "diffusers_sana.pipelines.pipeline_sana_img2img",
    "SanaInpaintPipeline": "diffusers_sana.pipelines.pipeline_sana_inpaint",
    "SanaPAGPipeline": "diffusers_sana.pipelines.pipeline_sana_pag",
    "SanaPipeline": "diffusers_sana.pipelines.pipeline_sana",
    "SanaSprintImg2ImgPipeline": "diffusers_sana.pipelines.pipeline_sana_sprint_img2img",
    "SanaSprintPipeline": "diffusers_sana.pipelines.pipeline_sana_sprint",
    "SanaTransformer2DModel": "diffusers_sana.models.transformers.transformer_sana",
    "SchedulerMixin": "diffusers",
    "VilaUConfig": "diffusers_sana.models.vila_u.configuration_vila_u",
    "VilaUForConditionalGeneration": "diffusers_sana.models.vila_u.modeling_vila_u",
    "VilaUImageProcessor": "diffusers_sana.models.vila_u.image_processing_vila_u",
    "VilaUModel": "diffusers_sana.models.vila_u.modeling_vila_u",
    "VilaUPipeline": "diffusers_sana.pipelines.pipeline_vila_u",
    "VilaUProcessor": "diffusers_sana.models.vila_u.processing_vila_u",
    "VilaUVisionModel": "diffusers_sana.models.vila_u.vision_vila_u",
    "cfg_parallel": "diffusers_sana.pipelines.parts.cfg_parallel",
    "quantize": "diffusers_sana.quantizers.svdquant.api",
    "set_compute_mode": "diffusers_sana.quantizers.svdquant.quantize_model",
}

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as DiffusionPipeline
    from diffusers import ModelMixin as ModelMixin
    from diffusers import SchedulerMixin as SchedulerMixin
    from transformers import PreTrainedModel as PreTrainedModel
    from transformers import ProcessorMixin as ProcessorMixin

    from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC as AutoencoderDC
    from diffusers_sana.models.controlnets.controlnet_sana import SanaControlNetModel as SanaControlNetModel
    from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel as SanaTransformer2DModel
    from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig as VilaUConfig
    from diffusers_sana.models.vila_u.image_processing_vila_u import VilaUImageProcessor as VilaUImageProcessor
    from diffusers_sana.models.vila_u.modeling_vila_u import (
        VilaUForConditionalGeneration as VilaUForConditionalGeneration,
    )
    from diffusers_sana.models.vila_u.modeling_vila_u import VilaUModel as VilaUModel
    from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor as VilaUProcessor
    from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModel as VilaUVisionModel
    from diffusers_sana.pipelines.parts.cfg_parallel import cfg_parallel as cfg_parallel
    from diffusers_sana.pipelines.pipeline_sana import SanaPipeline as SanaPipeline
    from diffusers_sana.pipelines.pipeline_sana_controlnet import SanaControlNetPipeline as SanaControlNetPipeline
    from diffusers_sana.pipelines.pipeline_sana_controlnet_img2img import (
        SanaControlNetImg2ImgPipeline as SanaControlNetImg2ImgPipeline,
    )
    from diffusers_sana.pipelines.pipeline_sana_img2img import SanaImg2ImgPipeline as SanaImg2ImgPipeline
    from diffusers_sana.pipelines.pipeline_sana_inpaint import SanaInpaintPipeline as SanaInpaintPipeline
    from diffusers_sana.pipelines.pipeline_sana_pag import SanaPAGPipeline as SanaPAGPipeline
    from diffusers_sana.pipelines.pipeline_sana_sprint import SanaSprintPipeline as SanaSprintPipeline
    from diffusers_sana.pipelines.pipeline_sana_sprint_img2img import (
        SanaSprintImg2ImgPipeline as SanaSprintImg2ImgPipeline,
    )
    from diffusers_sana.pipelines.pipeline_vila_u import VilaUPipeline as VilaUPipeline
    from diffusers_sana.quantizers.svdquant.api import quantize as quantize
    from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig as SVDQuantConfig
    from diffusers_sana.quantizers.svdquant.quantize_model import set_compute_mode as set_compute_mode
    from diffusers_sana.schedulers.scheduling_flow_dpm_solver import FlowDPMSolverScheduler as FlowDPMSolverScheduler


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'diffusers_sana' has no attribute {name!r}; it has {sorted(_EXPORTS)}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


register()
