"""What the recipes that train an adapter share: the base, the adapter, and its training by any loss.

Legend: B batch, C latent channels, h/w latent height and width, L text vectors, D text width.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from diffusers_sana._compat import warn_if_untested
from diffusers_sana.loading import find_pipeline_class
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.training.data.batches import Batches
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import ConditionedTransformer
from diffusers_sana.training.objectives.trigflow_distillation import TrigFlowStudent
from diffusers_sana.training.optimizers import optimizer_of
from diffusers_sana.training.recipes.consistency import save_consistency_samples
from diffusers_sana.training.recipes.post_training_options import PostTrainingConfig
from diffusers_sana.training.recipes.sana_options import LoraTrainingConfig
from diffusers_sana.training.recipes.text_to_image import (
    Encoders,
    Prompt,
    SanaInputs,
    doubled,
    first_samples,
    prepare_blocks,
    save_guided_samples,
)
from diffusers_sana.training.recipes.transformer_options import (
    AdapterTrainingConfig,
    QuantizableOptions,
    parse_pattern,
)


warn_if_untested("peft")

MIX_FFN = ("conv_inverted", "conv_point")  # its two 1x1 convolutions


def load_base(config: LoraTrainingConfig | PostTrainingConfig, pretrained: str, device: torch.device) -> Any:
    """The pipeline of a base, in the precision of the training, with its autoencoder in fp32.

    Sets `config.flow_shift`, unless given, to that of the scheduler. Those of SANA-Sprint have none.
    """
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    dtypes = {"vae": torch.float32, "default": dtype}
    pipe = find_pipeline_class(pretrained).from_pretrained(pretrained, dtype=dtypes).to(device)
    if config.flow_shift is None:
        config.flow_shift = pipe.scheduler.config.get("flow_shift")
    return pipe


def check_flow_matching(transformer: Any) -> None:
    """Raise a ValueError for a transformer that does not learn by flow matching."""
    if transformer.config.get("guidance_embeds"):
        raise ValueError("`transformer` must be one of Sana, got one of SANA-Sprint. Train its teacher.")


def check_flow_shift(config: LoraTrainingConfig | PostTrainingConfig) -> None:
    """Raise a ValueError for settings without a `flow_shift`."""
    if config.flow_shift is None:
        raise ValueError("`flow_shift` must be a number in `train`, got None. Pass that of the pipeline's scheduler.")


def quantization_of(model: QuantizableOptions) -> SVDQuantConfig | None:
    """How the options quantize a base; None: not."""
    if model.quantize == "no":
        return None
    return SVDQuantConfig(precision=model.quantize, rank=model.quantize_rank)


def quantize_base(transformer: Any, model: QuantizableOptions) -> None:
    """Quantize a base in place, if the options say so."""
    if (quantization := quantization_of(model)) is not None:
        quantize(transformer, quantization)


def fit_adapter(
    config: Any,
    batches: Batches,
    transformer: Any,
    terms: Callable[[Accelerator, nn.Module, Tensor, Prompt, dict[str, Any]], dict[str, Tensor]],
    vae: nn.Module | None,
    samples: dict[str, Tensor] | None,
    options: tuple[Any, ...],
) -> None:
    """The training of an adapter on latents and text vectors, whatever it minimizes.

    Args:
        config: settings of an adapter's training, an `AdapterTrainingConfig`, by flow matching or consistency.
        terms: from the accelerator, the prepared model, latents, prompts and the batch to what is logged; `loss` is
            minimized.
        the others: as in `lora.train`.
    """
    is_sprint = bool(transformer.config.get("guidance_embeds"))
    accelerator = make_accelerator(config)
    set_seed(config.seed)
    add_adapter_of(config, transformer)
    set_seed(config.seed, device_specific=True)
    inputs = SanaInputs(config, accelerator.device, Encoders(vae=vae))
    prepare_blocks(config, transformer)
    model = (TrigFlowStudent(transformer) if is_sprint else ConditionedTransformer(transformer)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(config, trained)
    model, optimizer = accelerator.prepare(model, optimizer)
    shown: dict[str, Any] = {}  # what the sample grids show: prompts and noise

    def sample(path: Path) -> None:
        if vae is not None and is_sprint:
            save_consistency_samples(path, config, accelerator, model, vae, **shown)
        elif vae is not None:
            predict = partial(model, prompt=doubled(shown["prompt"]))
            save_guided_samples(path, config, accelerator, model, vae, predict, shown["noise"])

    def save(folder: Path) -> None:
        if accelerator.is_main_process:
            save_adapter(folder, transformer)

    loop = TrainingLoop(
        config,
        accelerator,
        [model],
        [optimizer],
        save=save,
        sample=sample,
        keep_frozen=False,  # the base does not change, and may be large
        options=options,
    )
    for batch in loop.run(batches):
        latents, prompt = inputs.latents(batch), inputs.prompts(batch)
        shown = shown or first_samples(config, latents, prompt, inputs.prompts(samples) if samples else None)
        with accelerator.accumulate(model):
            found = terms(accelerator, model, latents, prompt, batch)
            loop.backward(found["loss"])
            loop.update()
        loop.report(images=len(latents), **found)


def add_adapter_of(config: AdapterTrainingConfig, transformer: ModelMixin) -> None:
    """`add_adapter` with the settings of a training."""
    add_adapter(
        transformer,
        target_modules=[*config.target_modules, *(MIX_FFN if config.mix_ffn else ())],
        r=config.rank,
        lora_alpha=config.lora_alpha or config.rank,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        **patterns_of(config),
    )


def patterns_of(config: AdapterTrainingConfig) -> dict[str, dict[str, int]]:
    """`rank_pattern` and `alpha_pattern` of PEFT's `LoraConfig`.

    Without `lora_alpha` a layer of another rank has that for its alpha, so that all layers have the scale 1.
    """
    ranks = parse_pattern("rank_pattern", config.rank_pattern)
    alphas = parse_pattern("alpha_pattern", config.alpha_pattern)
    return {"rank_pattern": ranks, "alpha_pattern": ({} if config.lora_alpha else ranks) | alphas}


def save_adapter(folder: Path, transformer: Any) -> None:
    """Write the adapter of a transformer as diffusers loads it, with its rank and alpha."""
    SanaPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def add_adapter(transformer: ModelMixin, target_modules: Sequence[str], **lora_config: Any) -> None:
    """Freeze `transformer` and put a LoRA that trains, in fp32, beside its layers.

    Args:
        transformer: a diffusers model, dense or quantized.
        target_modules: names of layers, or their ends.
        **lora_config: further arguments of PEFT's `LoraConfig`.

    Raises:
        ValueError: a target names no layer.
    """
    names = [name for name, _ in transformer.named_modules()]
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names if "attn" in name or ".ff." in name})
            raise ValueError(f"`target_modules` must name layers, got {target!r}. Layers of the blocks: {ends}.")
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in lora_config.get(argument, ()):
            if not any(
                re.fullmatch(rf"(.*\.)?({pattern})", name) and name.endswith(tuple(target_modules)) for name in names
            ):
                raise ValueError(
                    f"`{argument}` must name layers that get an adapter, got {pattern!r}. They end in "
                    f"{sorted(target_modules)}."
                )
    transformer.requires_grad_(False)
    adapter = LoraConfig(init_lora_weights="gaussian", target_modules=list(target_modules), **lora_config)
    transformer.add_adapter(adapter)
    cast_training_params(transformer, torch.float32)  # in bf16 small steps would be rounded away
