"""Adapters on quantized layers: a `weight` that works with unmodified diffusers and PEFT.

PEFT wraps a quantized layer like any `nn.Linear`, and adds its 16-bit product to the output of the layer. It fuses an
adapter by `base_layer.weight.data += B @ A`. Here `weight` is computed at each access (`LazyWeight`), and the layer
stores what is added to it as further ranks of its low-rank branch (`LowRankBranch`):

    proj_down = [proj_down; V]        proj_up = [proj_up, U]        U @ V = B @ A

The codes do not change. Subtracting the same matrix removes those ranks, which restores the original bits. Of a
change of high rank, such as that of DoRA or OFT, the strongest directions are stored, and a warning says what is left
out. Unfused, such an adapter is exact.

The LoRA loader of FLUX looks up `x.weight` in the state dict of the model, which `StateDict` supports.

Legend: K input features, N output features, r rank of the layer.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from diffusers_sana._compat import tree_map_only
from diffusers_sana.kernels.dequantize_weight import dequantize_weight
from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import low_rank_factors, randomized_svd


logger = logging.get_logger(__name__)

UNDO_TOLERANCE = 0.05  # relative error up to which a change undoes an earlier one
PART_TOLERANCE = 0.3  # likewise, in the directions that were kept: PEFT separates DoRA by dividing what was left out
# Of a change of high rank:
MOST_RANKS = 0.25  # share of the full rank that is stored at most; in 16 bit that takes twice the memory of the codes
ENOUGH = 0.01  # relative error at which no further ranks are stored
MOST_LEFT_OUT = 0.7  # relative error above which it is refused: then half of its energy would be lost
LARGEST = 0.9  # of the weight's norm: what changes more of it is no adapter
WRITE_HELP = (
    "It is computed at each access, and only changes by adapters can be stored. Leave other adapters unfused, where "
    "they work, or load the model in 16 bit."
)


class LowRankBranch(nn.Module):
    """The low-rank branch of a quantized layer, which stores changes of its weight.

    Attributes:
        proj_down: `[r, K]`, in 16 bit.
        proj_up: `[N, r]`.
        smooth_factor: `[K]`.
    """

    proj_down: Tensor
    proj_up: Tensor
    smooth_factor: Tensor
    dequantize: Callable[..., Tensor]
    # Rank and relative error of each stored change, oldest first; they are the last ranks of the branch.
    _changes: list[tuple[int, float]]

    @property
    def rank(self) -> int:
        """r, including the ranks of fused adapters."""
        return self.proj_down.shape[0]

    def add_to_weight(self, change: Tensor, noise: float = 0.0) -> None:
        """Adds a matrix to the weight that the layer represents. If it undoes an earlier change, both are removed.

        A matrix of more than half the full rank is stored in part, with a warning that states the error.

        Args:
            change: `[N, K]`.
            noise: Frobenius norm of the rounding errors in `change`, beyond those of its dtype.

        Raises:
            ValueError: NaN or infinity in `change`.
            RuntimeError: a change of high rank of which too much would be left out, or that is no adapter, as it
                changes most of the weight.
        """
        if not change.isfinite().all():
            raise ValueError("the change of a weight must be finite, got NaN or infinity. The adapter is broken.")
        end = self.rank
        for index in reversed(range(len(self._changes))):
            rank, error = self._changes[index]
            start = end - rank
            if self._undoes(change, noise, start, end, error > 0):
                down = torch.cat([self.proj_down[:start], self.proj_down[end:]])
                up = torch.cat([self.proj_up[:, :start], self.proj_up[:, end:]], dim=1)
                self._set_branch(down, up)
                self._changes = self._changes[:index] + self._changes[index + 1 :]
                return
            end = start
        factors, error = low_rank_factors(change, noise), 0.0
        if factors is None:
            factors, error = self._strongest_directions(change)
        up, down = (factor.to(self.proj_up) for factor in factors)
        if len(down):
            self._set_branch(torch.cat([self.proj_down, down]), torch.cat([self.proj_up, up], dim=1))
            self._changes = [*self._changes, (len(down), error)]

    def _undoes(self, change: Tensor, noise: float, start: int, end: int, is_part: bool) -> bool:
        """Whether a change undoes the one that is stored in some ranks, in full or in part.

        A part T consists of singular directions of its change, both times S, so what undoes the change is -T in the
        rows or columns that T spans.
        """
        up, down = self.proj_up[:, start:end].float(), self.proj_down[start:end].float()
        change = change.float()
        limit = PART_TOLERANCE * up.norm() + noise
        if is_part:
            change, down, basis = change * self._sizes(), down * self._sizes(), torch.linalg.qr(up).Q
            in_rows = (change @ down.t() + up @ (down @ down.t())).norm()
            in_columns = (basis.t() @ change + (basis.t() @ up) @ down).norm()
            return bool(min(in_rows, in_columns) <= limit)
        return bool((up @ down + change).norm() <= UNDO_TOLERANCE * change.norm() + noise)

    def _strongest_directions(self, change: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
        """`[N, r]` and `[r, K]`, whose rows are orthonormal times S; and the relative error, times S too."""
        wide, whole = change.float(), self.dequantize(torch.float32).norm()
        size = wide.norm()
        if size > LARGEST * whole:
            raise RuntimeError(
                f"the weight of a quantized layer cannot store a change of high rank that is {size / whole:.2g} times "
                f"as large as itself. {WRITE_HELP}"
            )
        weighted = wide * self._sizes()
        up, down = randomized_svd(weighted, max(int(MOST_RANKS * min(wide.shape)), 1), seed=0)
        energy = weighted.square().sum()
        left_out = ((energy - up.square().sum(0).cumsum(0)).clamp(min=0) / energy).sqrt()
        rank = min(int((left_out > ENOUGH).sum()) + 1, len(down))
        up, down, error = up[:, :rank], down[:rank] / self._sizes(), left_out[rank - 1].item()
        if error > MOST_LEFT_OUT:
            raise RuntimeError(
                f"the weight of a quantized layer cannot store a change of high rank: in the {rank} directions that "
                f"it has room for, {error:.0%} of the change of the output would be left out. {WRITE_HELP}"
            )
        logger.warning(
            f"An adapter changes a quantized layer {list(wide.shape)} in more directions than it can store: fused, "
            f"the {rank} strongest ones are kept, which leaves out {error:.1%} of the change of the output, for "
            "inputs of the sizes that the layer was smoothed for, and "
            f"{(wide - up @ down).norm() / size:.1%} of that of the weight. Unfused, the adapter is exact."
        )
        return (up, down), error

    def _sizes(self) -> Tensor:
        """S, fp32 `[K]`, of the root mean square 1."""
        smooth = self.smooth_factor.float()
        return smooth / smooth.square().mean().sqrt()

    def _set_branch(self, down: Tensor, up: Tensor) -> None:
        self.proj_down = nn.Parameter(down, requires_grad=False)
        self.proj_up = nn.Parameter(up, requires_grad=False)


class LazyWeight(Tensor):
    """The matrix that a quantized layer represents, computed by each operation that uses it.

    Shape, dtype and device cost nothing; PEFT and diffusers read them several times per layer when they load a file.
    Results of operations are plain tensors. Uses no memory, also where autograd saves it. `+=`, `-=`, `copy_` and
    assignment to `data` change the layer, other writes raise a RuntimeError.

    Args:
        like: has its dtype and device.
        shape: `[N, K]`, possibly followed by ones.
        compute: computes it, without gradient.
        layer: receives writes; None to refuse all.
    """

    _is_hf_initialized = True  # else transformers would initialize it when it loads a model
    compute: Callable[[], Tensor]
    layer: LowRankBranch | None

    @staticmethod
    def __new__(
        cls, like: Tensor, shape: Sequence[int], compute: Callable[[], Tensor], layer: LowRankBranch | None = None
    ) -> "LazyWeight":
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        weight.compute, weight.layer = compute, layer
        return weight

    def __init__(self, *args: Any) -> None:
        pass

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _GET_DATA:
            return args[0]
        if func == _SET_DATA:
            return args[0]._assign(args[1])
        if func == Tensor.__setitem__ and isinstance(args[0], cls):
            raise _refused_write("an assignment to a part of it")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CHANGES and isinstance(args[0], cls) and getattr(args[1], "shape", None) == args[0].shape:
            return args[0]._change(args[1] * (_CHANGES[func] * kwargs.get("alpha", 1)))
        if func == torch.ops.aten.copy_.default and isinstance(args[0], cls):  # as PEFT fuses OFT
            args[0]._assign(args[1] if type(args[1]) is Tensor else args[1].clone())
            return args[0]
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *_by_name(func, kwargs)]:
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise _refused_write(func.__name__)
        args, kwargs = tree_map_only(cls, lambda weight: weight.compute(), (args, kwargs))
        return func(*args, **kwargs)

    @torch.no_grad()
    def _change(self, change: Tensor) -> "LazyWeight":
        if self.layer is None:
            raise _refused_write("+=")
        self.layer.add_to_weight(change.flatten(1))
        return self

    @torch.no_grad()
    def _assign(self, value: Tensor) -> None:
        if value is self:  # the end of `weight.data += change`
            return
        if self.layer is None or value.shape != self.shape:
            raise _refused_write("an assignment")
        change = value.double() - self.to(value.dtype).double()
        noise = value.double().norm().item() * torch.finfo(value.dtype).eps / 2
        self.layer.add_to_weight(change.flatten(1), noise)


_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_CHANGES = {torch.ops.aten.add_.Tensor: 1, torch.ops.aten.sub_.Tensor: -1}


def _by_name(func: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]


def _refused_write(what: str) -> RuntimeError:
    return RuntimeError(f"the weight of a quantized layer cannot be written to by {what}. {WRITE_HELP}")


def lazy_weight(layer: Any, shape: Sequence[int]) -> Tensor:
    """The weight of a layer; computed immediately in code that is being compiled, which cannot create a `LazyWeight`.

    Args:
        layer: a `LowRankBranch` with `dequantize`.
        shape: of the weight: `[N, K]`, possibly followed by ones.
    """

    def compute() -> Tensor:
        return layer.dequantize().view(shape)

    return compute() if torch.compiler.is_compiling() else LazyWeight(layer.proj_up, shape, compute, layer)


class PlainConvolutions:
    """Mixin for a quantized convolution: with the arguments of `nn.Conv2d`, its class creates a plain convolution.

    PEFT creates the two convolutions of an adapter by calling the class of the layer that it wraps.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        is_plain = "in_channels" in kwargs or (args and isinstance(args[0], int))
        return nn.Conv2d(*args, **kwargs) if is_plain else super().__new__(cls)


class StateDict(OrderedDict):
    """The state dict of a quantized model, which computes the `weight` of a quantized layer on lookup.

    The LoRA loader of FLUX looks up the weight of each layer that a file names: `x.base_layer.weight` if that is in
    the state dict, else `x.weight`. Neither is a listed key, so what is listed and saved does not change. Pickled and
    copied it is a plain OrderedDict, so that `torch.save` writes what `torch.load` reads by default.
    """

    def __contains__(self, key: object) -> bool:
        wrapped = isinstance(key, str) and key.endswith(".base_layer.weight") and f"{key[:-6]}qweight"
        return super().__contains__(key) or (bool(wrapped) and super().__contains__(wrapped))

    def __missing__(self, key: str) -> Tensor:
        prefix = key.removesuffix("weight")
        if key == prefix or f"{prefix}qweight" not in self:
            raise KeyError(key)
        names = ("qweight", "wscales", "wtscale", "smooth_factor", "proj_down", "proj_up")
        parts: Any = [self.get(prefix + name) for name in names]
        down, up = parts[-2:]
        compute = partial(dequantize_weight, *parts, dtype=up.dtype, rotation=self.get(f"{prefix}rotation"))
        return LazyWeight(up, (up.shape[0], down.shape[1]), compute)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = OrderedDict(self)
        plain.__dict__.update(self.__dict__)
        return plain.__reduce_ex__(protocol)


def enable_weight_lookup(model: nn.Module) -> None:
    """Makes `model.state_dict()` return a `StateDict`."""
    model._register_state_dict_hook(_as_state_dict)


def _as_state_dict(model: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> StateDict:
    result = StateDict(state_dict)
    result._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]
    return result
