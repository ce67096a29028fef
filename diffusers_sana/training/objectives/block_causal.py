"""Training of SANA-Video chunk by chunk, as LongSANA generates (arXiv 2509.24695).

A chunk of a stream attends to itself and to the clean chunks before it, of which the transformer keeps a state. In
training the clean chunks are those of the data (teacher forcing), so one step trains all chunks of a video, each at
its place.

Legend: B batch, C latent channels, T latent frames, h/w latent height and width.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.models.transformers.stream_sana_video import SanaVideoState, chunk_lengths
from diffusers_sana.training.objectives.flow_matching import ConditionedTransformer, sample_guided


class BlockCausalTransformer(ConditionedTransformer):
    """`ConditionedTransformer` of a video whose frames come in chunks.

    Args:
        transformer: a SanaVideoTransformer3DModel.
        chunk_frames: latent frames of a chunk; the first one also has those that are over.
        **options: of `ConditionedTransformer`.
    """

    def __init__(self, transformer: Any, chunk_frames: int, **options: Any):
        super().__init__(transformer, **options)
        self.chunk_frames = chunk_frames

    def forward(  # type: ignore[override]
        self,
        noisy_latents: Tensor,
        sigmas: Tensor,
        prompt: Any,
        dropped: Tensor | None = None,
        clean: Tensor | None = None,
        state: SanaVideoState | None = None,
    ) -> Tensor:
        """The predicted velocity `[B, C, T, h, w]`.

        Args:
            noisy_latents, sigmas, prompt, dropped: see `ConditionedTransformer`; `[B, C, T, h, w]` the first.
            clean: the latents without noise, of which each chunk sees those before it.
            state: of the frames before all of these, in the place of `clean`: `noisy_latents` are one chunk.
        """
        text, timestep = self.text_of(prompt, dropped), self.timestep_of(sigmas)
        if clean is None:
            return self._run(noisy_latents, text, timestep, state or SanaVideoState())[0]
        state, velocities = SanaVideoState(), []
        lengths = chunk_lengths(noisy_latents.shape[2], self.chunk_frames)
        chunks = list(zip(noisy_latents.split(lengths, 2), clean.split(lengths, 2), strict=True))
        for number, (noisy, before_next) in enumerate(chunks, 1):
            velocities.append(self._run(noisy, text, timestep, state)[0])
            if number < len(chunks):
                state = self._run(before_next, text, torch.zeros_like(timestep), state)[1]
        return torch.cat(velocities, dim=2)

    @torch.no_grad()
    def sample(self, prompt: Any, noise: Tensor, guidance_scale: float, num_steps: int, shift: float) -> Tensor:
        """Latents `[B, C, T, h, w]`, chunk after chunk by `sample_guided`, whose arguments these are.

        Args:
            prompt: of 2 B rows, the second half equal to the first.
            noise: of all chunks.
            guidance_scale, num_steps, shift: see `sample_guided`.
        """
        dropped = torch.arange(2 * len(noise), device=noise.device) >= len(noise)
        text, timestep = self.text_of(prompt, dropped), noise.new_zeros(2 * len(noise))
        state, made = SanaVideoState(), []
        for chunk in noise.split(chunk_lengths(noise.shape[2], self.chunk_frames), 2):
            predict = partial(self, prompt=prompt, state=state)
            latents = sample_guided(predict, chunk, guidance_scale, num_steps, shift)
            made.append(latents)
            state = self._run(torch.cat([latents, latents]), text, timestep, state)[1]
        return torch.cat(made, dim=2)

    def _run(
        self, latents: Tensor, text: tuple[Tensor, Tensor], timestep: Tensor, state: SanaVideoState
    ) -> tuple[Tensor, SanaVideoState]:
        embeds, mask = text
        options = {"encoder_attention_mask": mask, "return_dict": False, "state": state}
        return self.transformer(latents, embeds, timestep, **options)
