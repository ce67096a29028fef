"""Memory of a streamed video by its length, with a tiny LongSANA on a CPU.

    python -m benchmarks.bench_long_video

writes `benchmarks/results/cpu/long_video.json`. The figure is the largest number of bytes that tensors made during the
stream hold at one time. It does not depend on the machine, and it includes text encoder and autoencoder. The size of
the state of the 2B model comes from a forward without numbers, on the meta device.
"""

import argparse
import json
import platform
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusers_sana
from diffusers_sana.files import atomic_write
from tests import tiny_video


FRAMES_PER_SECOND = 16
RESULT = Path(__file__).parent / "results" / "cpu" / "long_video.json"


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make in the block.

    Attributes:
        peak: the most at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_of_a_video(seconds: int, output_type: str = "pt") -> int:
    """The bytes of tensors while a tiny video is streamed, 16 x 16 pixels of random weights; or its latents."""
    config = {"num_layers": 1, "rope_max_seq_len": 1024}
    pipe = tiny_video.pipeline(diffusers_sana, "LongSanaVideoPipeline", **config)
    frames = FRAMES_PER_SECOND * seconds + 1
    size = {"height": 16, "width": 16, "use_resolution_binning": False, "complex_human_instruction": None}
    noise = torch.Generator().manual_seed(0)
    stream = pipe.stream("a cat", frames=frames, output_type=output_type, generator=noise, **size)
    with PeakMemory() as memory:
        for _ in stream:
            pass
    return memory.peak


def state_of_the_2b_model() -> int:
    """The bytes of the state of LongSANA 2B at 480 x 832 in bf16, for one video."""
    with torch.device("meta"):
        model = diffusers_sana.SanaVideoTransformer3DModel(mlp_ratio=3.0).bfloat16()
        latents, text = torch.empty(1, 16, 10, 60, 104), torch.empty(1, 300, 2304)
        arguments = latents.bfloat16(), text.bfloat16(), torch.empty(1)
        state = model(*arguments, state=diffusers_sana.SanaVideoState(), return_dict=False)[1]
    return sum(tensor.numel() * tensor.element_size() for block in state.blocks for tensor in block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 10, 20, 40, 60])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    report = {
        "command": "python -m benchmarks.bench_long_video",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "frames_per_second": FRAMES_PER_SECOND,
        "state_bytes_2b_480p": state_of_the_2b_model(),
        "peak_bytes_by_seconds": {str(seconds): peak_of_a_video(seconds) for seconds in args.seconds},
    }
    with atomic_write(args.out) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
