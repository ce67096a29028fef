"""What SANA-Video's transformer keeps of the frames of a stream (LongSANA, arXiv 2509.24695).

A stream is generated chunk by chunk. Within a chunk, frames attend to each other; across chunks, to earlier ones only.
Linear attention keeps a sum per head of all earlier tokens, and the temporal convolution needs the last frame. So the
state has the same size after a second and after a minute.

Legend: B batch, t h w token grid of a chunk, D inner width, H heads, d head width.
"""

from dataclasses import dataclass
from typing import NamedTuple

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor


def chunk_lengths(frames: int, chunk_frames: int) -> list[int]:
    """The lengths of the chunks of a video of so many latent frames; the first one also has those that are over."""
    number, rest = divmod(frames, chunk_frames)
    return [chunk_frames + rest, *[chunk_frames] * (number - 1)] if number else [frames]


class SanaVideoBlockState(NamedTuple):
    """What a transformer block keeps of the frames that it has seen; None in both before the first one.

    Attributes:
        attention: `[B, H, d + 1, d]` in fp32, see `block_causal_linear_attention`.
        frame: `[B, h, w, D]`, the last frame before the temporal convolution.
    """

    attention: Tensor | None = None
    frame: Tensor | None = None


class SanaVideoState(NamedTuple):
    """What `SanaVideoTransformer3DModel` keeps of the frames of a stream; `SanaVideoState()` is its beginning.

    Attributes:
        blocks: one for each block of the model, or none at the beginning.
        frames: how many frames of tokens they have seen. Positions of the next chunk go on from there.
        most: how many there may be; None for the model's `rope_max_seq_len`. Positions have no end: their angles are
            computed. But those beyond are outside of what the model was trained for.
    """

    blocks: tuple[SanaVideoBlockState, ...] = ()
    frames: int = 0
    most: int | None = None

    def of_blocks(self, number: int, batch_size: int, grid: tuple[int, int]) -> tuple[SanaVideoBlockState, ...]:
        """The states of all blocks, checked.

        Args:
            number: of blocks.
            batch_size: B of the next chunk.
            grid: its h and w.

        Raises:
            ValueError: they are of another model or another stream.
        """
        if not self.blocks:
            return (SanaVideoBlockState(),) * number
        if len(self.blocks) != number:
            raise ValueError(
                f"`state` must have one entry for each of the {number} blocks, got {len(self.blocks)}. It belongs to"
                " another model."
            )
        frame = self.blocks[0].frame
        if frame is not None and frame.shape[:3] != (batch_size, *grid):
            raise ValueError(
                f"`state` must be of {batch_size} videos with frames of {list(grid)} tokens, as `hidden_states` are,"
                f" got {frame.shape[0]} with {list(frame.shape[1:3])}. Begin another stream with `SanaVideoState()`."
            )
        return self.blocks


@dataclass
class SanaVideoTransformerOutput(Transformer2DModelOutput):
    """What `SanaVideoTransformer3DModel.forward` returns with `state`.

    Attributes:
        sample: `[B, out_channels, T, H, W]`.
        state: of all frames so far, these included.
    """

    state: SanaVideoState | None = None
