"""Which pipeline runs `generate`, with which components, solver and arguments."""

import argparse
import inspect
import sys
from typing import Any

from diffusers_sana.arguments import open_input
from diffusers_sana.cli.output import Task
from diffusers_sana.loading import checkpoint_path, load_on, pipeline_class_name, read_config


# Class that a checkpoint names -> kind of model -> options that must be left out; the pipeline for what else is given.
SANA, SPRINT, VILA_U = "Sana", "SANA-Sprint", "VILA-U"
VIDEO, LONG, VIDEO2, PREVIEW = "SANA-Video", "LongSANA", "SANA-Video 2.0", "preview of SANA-Video 2.0"
OF_SANA = ("negative_prompt", "mask", "control_image", "controlnet", "control_scale", "scheduler", "sigmas")
KINDS = {
    "SanaPipeline": SANA,
    "SanaPAGPipeline": SANA,
    "SanaImg2ImgPipeline": SANA,
    "SanaInpaintPipeline": SANA,
    "SanaControlNetPipeline": SANA,
    "SanaControlNetImg2ImgPipeline": SANA,
    "SanaControlNetInpaintPipeline": SANA,
    "SanaSprintPipeline": SPRINT,
    "SanaSprintImg2ImgPipeline": SPRINT,
    "SanaSprintControlNetPipeline": SPRINT,
    "VilaUPipeline": VILA_U,
    "SanaVideoPipeline": VIDEO,
    "SanaImageToVideoPipeline": VIDEO,
    "LongSanaVideoPipeline": LONG,
    "SanaVideo2Pipeline": VIDEO2,
    "SanaVideo2PreviewPipeline": PREVIEW,
}
CAUSAL = "SanaVideoCausalTransformer3DModel"
FPS = {VIDEO: 16.0, LONG: 16.0, VIDEO2: 24.0, PREVIEW: 24.0}  # at which the authors play the videos
OF_IMAGES = ("mask", "control_image", "controlnet", "control_scale", "strength")
FEW_STEPS = (*OF_IMAGES, "image", "negative_prompt", "guidance_scale", "steps", "scheduler")
LEFT_OUT = {
    SANA: (),
    VIDEO: OF_IMAGES,
    VIDEO2: OF_IMAGES,
    LONG: (*FEW_STEPS, "sigmas"),
    PREVIEW: FEW_STEPS,
    SPRINT: ("negative_prompt", "mask", "scheduler", "sigmas"),
    VILA_U: (*OF_SANA[1:], "height", "width", "steps", "image", "strength", "lora"),
}
PIPELINES = {
    (SANA,): "SanaPipeline",
    (SANA, "image"): "SanaImg2ImgPipeline",
    (SANA, "image", "mask"): "SanaInpaintPipeline",
    (SANA, "control_image"): "SanaControlNetPipeline",
    (SANA, "image", "control_image"): "SanaControlNetImg2ImgPipeline",
    (SANA, "image", "mask", "control_image"): "SanaControlNetInpaintPipeline",
    (SPRINT,): "SanaSprintPipeline",
    (SPRINT, "image"): "SanaSprintImg2ImgPipeline",
    (SPRINT, "control_image"): "SanaSprintControlNetPipeline",
    (VILA_U,): "VilaUPipeline",
    (VIDEO,): "SanaVideoPipeline",
    (VIDEO, "image"): "SanaImageToVideoPipeline",
    (LONG,): "LongSanaVideoPipeline",
    (VIDEO2,): "SanaVideo2Pipeline",
    (VIDEO2, "image"): "SanaVideo2Pipeline",
    (PREVIEW,): "SanaVideo2PreviewPipeline",
}
# Option -> argument of the pipelines.
ARGUMENTS = {
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "strength": "strength",
    "sigmas": "sigmas",
    "control_scale": "controlnet_conditioning_scale",
    "frames": "frames",
    "motion_score": "motion_score",
}
IMAGES = {"image": "image", "mask": "mask_image", "control_image": "control_image"}
# Name -> class of diffusers (ours for the first), and whether it takes sigmas.
SCHEDULERS = {
    "dpm++": ("FlowDPMSolverScheduler", True),
    "euler": ("FlowMatchEulerDiscreteScheduler", True),
    "heun": ("FlowMatchHeunDiscreteScheduler", False),
    "unipc": ("UniPCMultistepScheduler", True),
    "deis": ("DEISMultistepScheduler", False),
}
SCHEDULE = ("num_train_timesteps", "prediction_type", "use_flow_sigmas", "flow_shift")  # fields that carry over


def option(name: str) -> str:
    """An option by the name of its value: `--num-images` for "num_images"."""
    return "--" + name.replace("_", "-")


def read_images(args: argparse.Namespace) -> dict[str, Any]:
    """The images to begin with, decoded, by argument of the pipelines."""
    given = [name for name in IMAGES if getattr(args, name) is not None]
    return {IMAGES[name]: open_input(option(name), getattr(args, name)) for name in given}


def load(args: argparse.Namespace, kind: str, device: str) -> Any:
    """The pipeline for the kind of model and what is given beside the prompt."""
    import diffusers_sana

    beside = [name for name in IMAGES if getattr(args, name) is not None]
    pipeline_class = getattr(diffusers_sana, PIPELINES[(kind, *beside)])
    components = {}
    if args.controlnet is not None:
        place = checkpoint_path(args.controlnet)
        components["controlnet"] = diffusers_sana.SanaControlNetModel.from_pretrained(place)
    hub = {"revision": args.revision, "variant": args.variant}
    if kind in FPS:
        components |= video_components(args.model, args.revision)
    pipe = load_on(device, pipeline_class, args.model, args.dtype, **hub, **components)
    if "controlnet" in components:
        pipe.controlnet.to(pipe.transformer.dtype)
    if args.scheduler is not None:
        pipe.scheduler = make_scheduler(args.scheduler, pipe.scheduler.config)
    for i, lora in enumerate(args.lora):
        pipe.load_lora_weights(checkpoint_path(lora.place), adapter_name=f"lora{i}")
    if args.lora:
        pipe.set_adapters([f"lora{i}" for i in range(len(args.lora))], [lora.scale for lora in args.lora])
    if not sys.stderr.isatty():
        pipe.set_progress_bar_config(disable=True)
    return pipe


def kind_of(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """The class that a checkpoint names, and the kind of model, if it is one of these."""
    name = pipeline_class_name(model, revision)
    index = read_config(model, "model_index.json", revision) or {}
    is_causal = CAUSAL in (index.get("transformer") or ())  # as LongSANA's folder on the Hub has it
    return name, LONG if is_causal else KINDS.get(name)


def video_components(model: str, revision: str | None = None) -> dict[str, Any]:
    """The autoencoder, if it is Wan's: the authors run it in fp32, whatever the dtype of the others."""
    if (read_config(model, "vae/config.json", revision) or {}).get("_class_name") != "AutoencoderKLWan":
        return {}
    from diffusers import AutoencoderKLWan

    return {"vae": AutoencoderKLWan.from_pretrained(model, subfolder="vae", revision=revision)}


def make_scheduler(name: str, config: Any) -> Any:
    """A solver of `SCHEDULERS` with the noise schedule of another's config."""
    import diffusers

    import diffusers_sana

    kind = SCHEDULERS[name][0]
    if name == "dpm++":
        return diffusers_sana.FlowDPMSolverScheduler.from_config(config)
    solver = getattr(diffusers, kind)
    shift = config.get("flow_shift", config.get("shift", 1.0))
    fields = {field: config[field] for field in SCHEDULE if field in config}
    fields |= {"flow_shift": shift, "shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return solver(**{field: value for field, value in fields.items() if field in inspect.signature(solver).parameters})


def generate(pipe: Any, args: argparse.Namespace, task: Task, images: dict[str, Any]) -> Any:
    """One image, or the frames of a video. The noise comes from the CPU, and so is the same on every device."""
    import torch

    given = {ARGUMENTS[name]: getattr(args, name) for name in ARGUMENTS if getattr(args, name) is not None}
    generator = torch.Generator("cpu").manual_seed(task.seed)
    if hasattr(pipe, "stream"):  # LongSANA, of which a frame is written before the next chunk is made
        return (frame for (frame,) in pipe.stream(task.prompt, generator=generator, **given))
    return pipe(task.prompt, generator=generator, return_dict=False, **images, **given)[0][0]
