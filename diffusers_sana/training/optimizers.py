"""The optimizers of the recipes: AdamW, Muon, and those of other packages, imported when one is asked for."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_sana.training.config import OPTIMIZERS, TrainingConfig, check_choice


# Coefficients (a, b, c) of successive steps X <- a X + (b A + c A^2) X with A = X X^T, each the best one for what
# the step before leaves ("Polar Express", arXiv 2505.16932, from singular values of at least 0.001).
POLAR_STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)


@dataclass(frozen=True)
class Packaged:
    """An optimizer of another package.

    Attributes:
        package: what `pip install` is given.
        module, name: where its class is.
        settings: arguments other than the package's defaults.
    """

    package: str
    module: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)


PACKAGED = {
    # Two moments, or one, of one byte in place of four, in blocks of 256 numbers with a common scale (arXiv
    # 2110.02861). Tensors of less than 4096 numbers keep theirs in fp32.
    "adamw8bit": Packaged("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    "lion8bit": Packaged("bitsandbytes", "bitsandbytes.optim", "Lion8bit"),
    "came": Packaged("came-pytorch", "came_pytorch", "CAME"),  # arXiv 2307.02047
    "lion": Packaged("lion-pytorch", "lion_pytorch", "Lion"),  # arXiv 2302.06675
    # arXiv 2306.06101; the settings are those of diffusers' scripts.
    "prodigy": Packaged(
        "prodigyopt", "prodigyopt", "Prodigy", {"use_bias_correction": True, "safeguard_warmup": True}
    ),
    "schedulefree": Packaged("schedulefree", "schedulefree", "AdamWScheduleFree"),  # arXiv 2405.15682
}
CAME_LAST_BETA = 0.9999  # of the moving average of the instability, as in the paper and in Sana's configs


def optimizer_of(config: TrainingConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a config names, with its settings; see `make_optimizer`."""
    return make_optimizer(config.optimizer, parameters, config.learning_rate, config.betas, config.weight_decay)


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of a name; each decays matrices and kernels only.

    Args:
        name: "adamw"; "muon", which is `Muon`; or one of `PACKAGED`.
        parameters: what to train.
        learning_rate, betas, weight_decay: of the optimizer. "muon" takes the learning rate of AdamW; "lion" and
            "lion8bit" want a third to a tenth of it; "prodigy" finds its own, and takes a factor of about 1.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    if name == "adamw":
        return make_adamw(parameters, learning_rate, betas, weight_decay)
    if name == "muon":
        return Muon(parameters, learning_rate, betas, weight_decay)
    source = PACKAGED[name]
    try:
        optimizer_class = getattr(import_module(source.module), source.name)
    except ImportError as error:
        raise ValueError(
            f"`optimizer` {name!r} needs {source.package} ({error}). `pip install {source.package}`, or use 'adamw'."
        ) from error
    all_betas = (*betas, CAME_LAST_BETA) if name == "came" else betas
    groups = decay_groups(parameters, weight_decay)
    optimizer = optimizer_class(groups, lr=learning_rate, betas=all_betas, **source.settings)
    if name == "came":
        _KernelsAsMatrices(optimizer)
    return optimizer


class _KernelsAsMatrices:
    """Gives 1x1 kernels the shape of matrices while an optimizer makes a step.

    CAME keeps a row and a column for the last two dimensions. Those are the window of a kernel, so that for 1x1
    kernels, half of Sana's weights, it would keep whole tensors, and more of them than AdamW does.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._flatten)
        optimizer.register_step_post_hook(self._restore)

    def _flatten(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.ndim == 4 and parameter.shape[2:] == (1, 1) and parameter.grad is not None:
                self._kept.append((parameter, parameter.data, parameter.grad))
                _exchange(parameter, *(each.view(each.shape[:2]) for each in (parameter.data, parameter.grad)))

    def _restore(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        while self._kept:
            _exchange(*self._kept.pop())


def _exchange(parameter: nn.Parameter, data: Tensor, gradient: Tensor) -> None:
    """Give a parameter other tensors, which may have another shape."""
    parameter.grad = None
    parameter.data = data
    parameter.grad = gradient


def averaging(optimizers: Iterable[torch.optim.Optimizer]) -> list[Any]:
    """Those of `optimizers`, without Accelerate's wrappers, whose published weights are an average that they keep."""
    plain = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
    return [optimizer for optimizer in plain if "train_mode" in optimizer.param_groups[0]]


@contextmanager
@torch.no_grad()
def averaged_weights(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Inside, what schedule-free optimizers train holds their average; afterwards what it held before, bit for bit.

    The optimizer computes the average from the weights and, by its own `train()`, the weights from the average, but
    with a rounding that would make a run depend on when it was saved.
    """
    chosen = averaging(optimizers)
    parameters = [p for optimizer in chosen for group in optimizer.param_groups for p in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    for optimizer in chosen:
        optimizer.eval()
    try:
        yield
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.copy_(before)
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["train_mode"] = True


def make_adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only: norm weights, biases and tables of one dimension are left alone."""
    return torch.optim.AdamW(decay_groups(parameters, weight_decay), lr=learning_rate, betas=betas, fused=True)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: what is decayed, and what has at most one dimension and is not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Optimizer):
    """Steps whose matrices are orthogonal (Muon, K. Jordan 2024; arXiv 2502.16982), and AdamW for what is no matrix.

    All directions of a matrix learn at one speed, while AdamW mostly moves along the few that dominate the gradient. A
    convolution is a matrix of output channels by inputs times taps. A tall stack of more than `BLOCK` rows, such as a
    convolution before a pixel shuffle, is made orthogonal in blocks: the work grows with the cube of the rows.

    Matrices must be whole: on one GPU or under DDP, not under FSDP.

    Steps have a root mean square of about the learning rate, as AdamW's have at most, so both take the same rate.

    Args:
        parameters: what to train. Matrices and kernels of fewer than `SMALLEST` rows or columns take AdamW's steps,
            such as the first and the last convolution of an image model.
        learning_rate: of all.
        betas: of AdamW.
        weight_decay: of matrices and kernels.
        momentum: of the orthogonal steps.
    """

    SMALLEST, BLOCK = 16, 256

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        groups = []
        for group in decay_groups(parameters, weight_decay):
            for is_orthogonal in (True, False):
                chosen = [p for p in group["params"] if self._is_large(p) == is_orthogonal]
                if chosen:
                    groups.append(group | {"params": chosen, "is_orthogonal": is_orthogonal})
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "momentum": momentum, "eps": 1e-8})

    @classmethod
    def _is_large(cls, parameter: Tensor) -> bool:
        return parameter.ndim > 1 and min(len(parameter), parameter[0].numel()) >= cls.SMALLEST

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; a parameter without a gradient stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._orthogonal if group["is_orthogonal"] else self._adam
                change = update(parameter.grad, self.state[parameter], group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"])
        return loss

    def _orthogonal(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(average, group["momentum"]).flatten(1)  # Nesterov's
        rows, columns = matrix.shape
        blocks = rows // self.BLOCK if rows > self.BLOCK and rows % self.BLOCK == 0 else 1
        # Every `blocks`th row: the outputs of one phase of a pixel shuffle.
        parts = matrix.unflatten(0, (-1, blocks)).transpose(0, 1)
        parts = orthogonalize(parts) * max(rows // blocks, columns) ** 0.5
        return parts.transpose(0, 1).reshape(gradient.shape)

    def _adam(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        first, second = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        step = state["step"].item()
        deviation = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        return mean / (1 - first**step) / deviation


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices to `[..., rows, columns]`, roughly: singular values end within 0.2 to 1.9."""
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT).mT
    out = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_STEPS:
        gram = out @ out.mT
        out = a * out + (b * gram + c * gram @ gram) @ out
    return out
