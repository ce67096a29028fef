"""The report of a quantization: errors per layer, as JSON and as a plot."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from diffusers.utils import logging

from diffusers_sana.kernels.low_bit import padded, precision_of
from diffusers_sana.quantizers.svdquant.algorithm.decompose import LayerReport
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig


logger = logging.get_logger(__name__)

JSON_FILE = "quantization_report.json"
PLOT_FILE = "quantization_report.png"
NUM_WORST = 3  # layers that the summary names


@dataclass(frozen=True)
class LayerResult:
    """The result of one layer.

    Attributes:
        layer: name of the component, a dot, and name of the layer.
        shape: (N, K).
        mode: one of `LAYER_MODES`.
        precision: "int4", "nvfp4" or "int8".
        exponents: of the smoothing, see `decompose.py`.
        error: relative error of the output for sample inputs, in `computed_in`.
        naive_error: the same for plain rounding of weight and activations.
        bytes: size of the quantized weight.
        original_bytes: size of the original weight.
        computed_in: the compute mode for which the layer was fitted, such as "w4a8".
        gptq: whether the codes were rounded with error compensation.
        rotated: whether they are in a rotated basis.
        rank: of the low-rank branch.
    """

    layer: str
    shape: tuple[int, int]
    mode: str
    precision: str
    exponents: tuple[float, float]
    error: float
    naive_error: float
    bytes: int
    original_bytes: int
    computed_in: str
    gptq: bool
    rotated: bool
    rank: int

    @property
    def int8_bytes(self) -> int:
        """What the layer would take in int8 without a branch: codes, an fp32 scale per row, and a factor per input."""
        rows, columns = self.shape
        return rows * padded(columns) + 4 * rows + self.original_bytes // rows

    @classmethod
    def of(cls, layer: str, mode: str, weight: QuantizedWeight, report: LayerReport) -> "LayerResult":
        """From the output of `decompose`."""
        shape = weight.qweight.shape[0], weight.smooth_factor.shape[0]
        size = sum(tensor.nbytes for tensor in weight.tensors().values())
        original = shape[0] * shape[1] * weight.proj_up.element_size()
        return cls(
            layer=layer,
            shape=shape,
            mode=mode,
            precision=precision_of(weight.wscales, weight.qweight),
            bytes=size,
            original_bytes=original,
            rank=weight.proj_up.shape[1],
            **report._asdict(),
        )


@dataclass(frozen=True)
class QuantizationReport:
    """The result of `quantize`.

    Attributes:
        config: with the layers that were quantized.
        layers: the results in the order of the model.
        prompts: number of calibration prompts; 0 for none.
    """

    config: SVDQuantConfig
    layers: list[LayerResult]
    prompts: int = 0

    def save(self, folder: str | Path) -> None:
        """Writes `quantization_report.json`, and `quantization_report.png` where matplotlib is installed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "config": self.config.to_dict(),
            "prompts": self.prompts,
            "layers": [asdict(layer) for layer in self.layers],
        }
        (folder / JSON_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if find_spec("matplotlib"):
            _plot(self.layers, folder / PLOT_FILE)
        else:
            logger.info(f"{PLOT_FILE} is left out: matplotlib is not installed.")

    @property
    def sizes(self) -> str:
        """Bytes of the layers before and after, in a line; also in int8 where that is smaller, as in narrow layers."""
        keys = ("original_bytes", "bytes", "int8_bytes")
        before, after, int8 = (sum(getattr(layer, key) for layer in self.layers) for key in keys)
        hint = f"; precision='int8' would take {_size(int8)}" if int8 < after else ""
        return f"{_size(before)} before, {_size(after)} after{hint if self.config.precision != 'int8' else ''}"

    @property
    def errors(self) -> str:
        """The median error of a layer, in a line."""
        error, naive = (median(getattr(layer, key) for layer in self.layers) for key in ("error", "naive_error"))
        return f"median {error:.3f}, {naive:.3f} with plain rounding"

    @property
    def formats(self) -> str:
        """The format of the layers with quantized activations; else how many layers have which, in a line."""
        counts = Counter(layer.precision for layer in self.layers if not layer.mode.endswith("a16"))
        counts = counts or Counter(layer.precision for layer in self.layers)
        if len(counts) == 1:
            return f"{len(self.layers)} layers in {next(iter(counts))}"
        counts = Counter(layer.precision for layer in self.layers)
        return ", ".join(f"{count} layers in {precision}" for precision, count in sorted(counts.items()))

    @property
    def ranks(self) -> str:
        """The rank of the layers, or how many layers have which, in a line."""
        counts = Counter(layer.rank for layer in self.layers)
        chosen = ", ".join(f"rank {rank} in {count}" for rank, count in sorted(counts.items()))
        if self.config.budget is not None:
            return f"{chosen}, others in 16 bit within {self.config.budget}"
        return f"rank {next(iter(counts))}" if len(counts) == 1 else chosen

    def __str__(self) -> str:
        worst = sorted(self.layers, key=lambda layer: layer.error, reverse=True)[:NUM_WORST]
        calibration = f"{self.prompts} prompts" if self.prompts else "no prompts"
        return (
            f"{self.formats}, {self.ranks}, {calibration}\n"
            f"memory of their weights: {self.sizes}\n"
            f"relative error of a layer's output: {self.errors}\n"
            f"largest: {', '.join(f'{layer.error:.3f} in {layer.layer}' for layer in worst)}"
        )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _plot(layers: list[LayerResult], path: Path) -> None:
    """Two bars per layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and not always there
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.12 * len(layers)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    positions = range(len(layers))
    axis.bar(positions, [layer.naive_error for layer in layers], width=0.9, color="0.8", label="plain rounding")
    axis.bar(positions, [layer.error for layer in layers], width=0.5, color="tab:blue", label="SVDQuant")
    axis.set_xticks(positions, [layer.layer for layer in layers], rotation=90, fontsize=5)
    axis.set_ylabel("relative error of the output")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
