"""Step caches (`transformer.enable_cache`) in the denoising loop: they begin anew with each picture."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from diffusers.hooks import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig

from diffusers_sana._compat import private


FEWEST_STEPS = 5  # a cache that leaves out one of fewer steps leaves out most of the picture


def start_step_cache(transformer: Any, num_steps: int, num_texts: int) -> None:
    """Makes the transformer's step cache, if it has one, forget whatever it holds.

    Call it before the first step, and where the text or the size of the batch has changed.

    Args:
        transformer: of either package.
        num_steps: steps of the picture.
        num_texts: rows of the batch an image: 2 with guidance.

    Raises:
        ValueError: a cache that cannot work with these steps, or with this batch.
    """
    if not getattr(transformer, "is_cache_enabled", False):
        return
    config = private(transformer, "_cache_config")
    if num_steps < FEWEST_STEPS:
        raise ValueError(
            f"`num_inference_steps` must be at least {FEWEST_STEPS} with a step cache, got {num_steps} (that are left "
            "to do). Take more steps, or call `transformer.disable_cache()`."
        )
    if isinstance(config, MagCacheConfig) and config.num_inference_steps != num_steps:
        raise ValueError(
            "`num_inference_steps` of the MagCacheConfig must be the number of steps that are run, got "
            f"{config.num_inference_steps} and {num_steps}: its ratios belong to steps. Enable one for "
            f"{num_steps} steps."
        )
    if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled and num_texts != 2:
        raise ValueError(
            "`is_guidance_distilled` of the FasterCacheConfig must be True where the batch is not an unconditional "
            f"and a conditional half, got False and {num_texts} texts an image. Enable another config."
        )
    if isinstance(config, FirstBlockCacheConfig) and getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "A FirstBlockCacheConfig cannot be used with `enable_parallelism`: each process would decide on its own "
            "tokens, and wait for others forever. Enable a MagCacheConfig."
        )
    private(transformer, "_reset_stateful_cache")()


def step_context(
    transformer: Any, step: int, timesteps: list[float], num_train_timesteps: int
) -> AbstractContextManager:
    """Where step caches keep their state and read the time, if the transformer can have any.

    Args:
        transformer: of either package.
        step: number of the step, from 0.
        timesteps: of all steps.
        num_train_timesteps: the timestep at which there is only noise.
    """
    if not hasattr(transformer, "cache_context"):
        return nullcontext()
    timestep = timesteps[step]
    return transformer.cache_context(
        "text",
        step_index=step,
        num_inference_steps=len(timesteps),
        timestep=timestep,
        sigma=timestep / num_train_timesteps,
    )
