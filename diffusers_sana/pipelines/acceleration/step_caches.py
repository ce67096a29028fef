"""Step caches (`transformer.enable_cache`) in the denoising loop: each call of a pipeline has its own."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig

from diffusers_sana._compat import private
from diffusers_sana.locks import exclusive
from diffusers_sana.models.layers import hooks_of


FEWEST_STEPS = 5  # a cache that leaves out one of fewer steps leaves out most of the image


class StepCache:
    """What the step cache of a transformer, if it has one, remembers in one call.

    diffusers keeps it in the hooks of the transformer. So the hooks get the state of this call for each forward, and
    their own back afterwards.

    Args:
        transformer: of either package.
        timesteps: of all steps of the call.
        num_train_timesteps: the timestep at which there is only noise.
    """

    def __init__(self, transformer: Any, timesteps: list[float], num_train_timesteps: int) -> None:
        self.transformer = transformer
        self.timesteps = timesteps
        self.num_train_timesteps = num_train_timesteps
        self._states: list[tuple[Any, str, Any]] = []  # hook, name of the attribute, state

    @property
    def is_enabled(self) -> bool:
        """Whether the transformer has a step cache."""
        return getattr(self.transformer, "is_cache_enabled", False)

    def restart(self, num_texts: int) -> None:
        """Forgets everything. Call it before the first step, and where the text or the size of the batch has changed.

        Args:
            num_texts: rows of the batch per image: 2 with guidance.

        Raises:
            ValueError: a cache that cannot work with these steps, or with this batch.
        """
        if not self.is_enabled:
            return
        _check_config(self.transformer, len(self.timesteps), num_texts)
        hooks = [hook for module in self.transformer.modules() for hook in hooks_of(module).values()]
        fresh: dict[int, Any] = {}
        with exclusive(self.transformer):  # no other call has its states there
            for hook in hooks:
                for state in vars(hook).values() if private(hook, "_is_stateful") else ():
                    if hasattr(state, "reset") and id(state) not in fresh:
                        fresh[id(state)] = copy.deepcopy(state)
                        fresh[id(state)].reset()
            self._states = [
                (hook, name, fresh[id(state)])
                for hook in hooks  # others share these states
                for name, state in vars(hook).items()
                if id(state) in fresh
            ]

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Within the block, the transformer runs step number `step`, from 0, with the cache of this call."""
        if not hasattr(self.transformer, "cache_context"):
            yield
            return
        timestep = self.timesteps[step]
        others = [(hook, name, getattr(hook, name)) for hook, name, _ in self._states]
        try:
            for hook, name, state in self._states:
                setattr(hook, name, state)
            with self.transformer.cache_context(
                "text",
                step_index=step,
                num_inference_steps=len(self.timesteps),
                timestep=timestep,
                sigma=timestep / self.num_train_timesteps,
            ):
                yield
        finally:
            for hook, name, state in others:
                setattr(hook, name, state)


def _check_config(transformer: Any, num_steps: int, num_texts: int) -> None:
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
            f"and a conditional half, got False and {num_texts} texts per image. Enable another config."
        )
    if isinstance(config, FirstBlockCacheConfig) and getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "A FirstBlockCacheConfig cannot be used with `enable_parallelism`: each process would decide on its own "
            "tokens, and wait for others forever. Enable a MagCacheConfig."
        )
