"""Step caches of diffusers for Sana's transformer: what they need to know about it, and which are not supported."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from diffusers.hooks import (
    FasterCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from diffusers_sana.models.layers import hooks_of


class SanaCacheMixin(CacheMixin):
    """`enable_cache` of diffusers for a transformer with Sana's blocks."""

    config: Any
    modules: Any
    _latents_format = "BCHW"  # "BCFHW" for videos
    _attention_layers = r"transformer_blocks\.\d+\.attn[12]"
    _has_residual_stream = True  # which step caches that skip blocks add to
    _cache_timestep: float | None = None

    def enable_cache(self, config: Any) -> None:
        """Reuses results that change little between steps, until `disable_cache`.

        Missing fields of a config are filled in. Without a `current_timestep_callback`, the timestep comes from the
        pipeline. FasterCache is told that latents are images and how to split the batch. TaylorSeer, whose patterns do
        not match our names, predicts both attention layers unless `cache_identifiers` are given. SeaCache compares the
        latents.

        Args:
            config: `FirstBlockCacheConfig`, `MagCacheConfig`, `TaylorSeerCacheConfig`, `SeaCacheConfig`,
                `PyramidAttentionBroadcastConfig` (arXiv 2408.12588) or `FasterCacheConfig` (arXiv 2410.19355).

        Raises:
            ValueError: SANA-Sprint, a cache that is already on, or one that would do nothing or cannot work.
        """
        if not self._has_residual_stream:
            is_lite = isinstance(config, TaylorSeerCacheConfig) and config.use_lite_mode
            if is_lite or not isinstance(config, PyramidAttentionBroadcastConfig | TaylorSeerCacheConfig):
                raise ValueError(
                    f"`config` must be a PyramidAttentionBroadcastConfig, or a TaylorSeerCacheConfig without "
                    f"`use_lite_mode`, for {type(self).__name__}: its layers add to no residual stream, so blocks "
                    f"cannot be skipped, got {type(config).__name__}. These two reuse the outputs of attention layers."
                )
        if self.config.get("guidance_embeds"):
            raise ValueError(
                "`config` must not be given to SANA-Sprint (`guidance_embeds=True`): its one to four steps all start "
                f"from new noise, so none can be skipped, got {type(config).__name__}. Use fewer steps."
            )
        if isinstance(config, TextKVCacheConfig):
            raise ValueError(
                "`config` must not be a TextKVCacheConfig, which would have no effect: `encode_text` computes keys "
                "and values of the text once per prompt. Leave it out."
            )
        changes: dict[str, Any] = {}
        timed = isinstance(config, PyramidAttentionBroadcastConfig | FasterCacheConfig)
        if timed and config.current_timestep_callback is None:
            changes["current_timestep_callback"] = self._current_timestep
        if isinstance(config, FasterCacheConfig):
            changes["tensor_format"] = self._latents_format
            changes["_unconditional_conditional_input_kwargs_identifiers"] = (
                "hidden_states",
                "timestep",
                "text_context",
            )
        if isinstance(config, TaylorSeerCacheConfig) and not (config.cache_identifiers or config.use_lite_mode):
            changes["cache_identifiers"] = [self._attention_layers]
        if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
            changes["raw_vision_callback"] = _as_videos
        super().enable_cache(replace(config, **changes) if changes else config)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Tells caches about a call of the model.

        Args:
            name: calls with the same name share state.
            kwargs: `step_index`, `num_inference_steps`, `timestep`, `sigma`; see diffusers' `CacheContext`.
        """
        if not any(map(hooks_of, self.modules())):  # diffusers would put an empty registry on every layer
            yield
            return
        previous, self._cache_timestep = self._cache_timestep, kwargs.get("timestep")
        try:
            with super().cache_context(name, **kwargs):
                yield
        finally:
            self._cache_timestep = previous

    def _current_timestep(self) -> float:
        if self._cache_timestep is None:
            raise ValueError(
                "`current_timestep_callback` must be given, or the model called within "
                "`cache_context(name, timestep=...)`, as the pipelines of diffusers_sana do."
            )
        return self._cache_timestep

    def _check_controlled_cache(self) -> None:
        """Raises if a cache would add the control signal twice, or only to half of the batch."""
        if self._cache_config is not None and not isinstance(
            self._cache_config, PyramidAttentionBroadcastConfig | TaylorSeerCacheConfig
        ):
            raise ValueError(
                "`controlnet_block_samples` cannot be used with a step cache that skips blocks or half of the "
                f"batch, got {type(self._cache_config).__name__}. Enable a PyramidAttentionBroadcastConfig or a "
                "TaylorSeerCacheConfig, or call `transformer.disable_cache()`."
            )


def _as_videos(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents `[B, C, H, W]` or `[B, C, T, H, W]` of a call as SeaCache expects them: `[C, T, H, W]` each."""
    latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return list(latents.unsqueeze(2) if latents.ndim == 4 else latents)
