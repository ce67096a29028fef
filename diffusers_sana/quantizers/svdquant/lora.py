"""Adapters around quantized layers: what makes diffusers' and PEFT's own calls right, without a change to either.

PEFT wraps a quantized layer as it wraps any `nn.Linear`, and adds its 16-bit product to the layer's output. Three
things that it does to plain layers would go wrong in silence:

    fusing         adds `B @ A` to `base_layer.weight`, which is computed anew at each reading. The low-rank branch has
                   the same form, so an adapter becomes more ranks of it (`lora_layers.py`):
                   proj_down = [proj_down; scale * A], proj_up = [proj_up, B]
    other writes   into the weight, by adapters that are not low-rank: they raise (`LazyWeight`)
    `x.weight`     looked up in the state dict by loaders of LoRA files: `StateDict` answers

Legend: K input features, N output features, r rank of the layer, p rank of an adapter.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from diffusers_sana._compat import tree_map_only
from diffusers_sana.kernels.dequantize_weight import dequantize_weight


class LazyWeight(Tensor):
    """The matrix that a quantized layer stands for, computed by each operation that uses it.

    Shape, dtype and device cost nothing; PEFT and diffusers ask each layer for them several times when they load a
    file. Results of operations are plain tensors. Holds no memory, also where autograd saves it.

    Args:
        like: has its dtype and device.
        shape: of the matrix.
        compute: gives it, without gradient.
    """

    _is_hf_initialized = True  # or transformers would initialize it when it loads a model
    compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, shape: Sequence[int], compute: Callable[[], Tensor]) -> "LazyWeight":
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        weight.compute = compute
        return weight

    def __init__(self, *args: Any) -> None:
        pass

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        writes = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        if writes and isinstance(args[0], cls):
            raise RuntimeError(
                f"the weight of a 4-bit layer cannot be written to ({name}): it is computed at each reading, and the "
                "change would be lost. LoRA is fused by `fuse_lora` as ranks of the layer; adapters of other kinds "
                "(DoRA, LoKr, ...) cannot be fused: leave them beside the layer, or load the model in 16 bit."
            )
        if func == _GET_DATA:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda weight: weight.compute(), (args, kwargs or {}))
        return func(*args, **kwargs)


_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def lazy_weight(like: Tensor, shape: Sequence[int], compute: Callable[[], Tensor]) -> Tensor:
    """A `LazyWeight`; computed at once in code that is being compiled, which cannot make one."""
    return compute() if torch.compiler.is_compiling() else LazyWeight(like, shape, compute)


class LowRankBranch(nn.Module):
    """The part of a quantized layer that adapters can be fused into.

    Attributes:
        proj_down: `[r, K]`, in 16 bit.
        proj_up: `[N, r]`.
    """

    proj_down: Tensor
    proj_up: Tensor

    @property
    def rank(self) -> int:
        """r, with the ranks of fused adapters."""
        return self.proj_down.shape[0]

    def append_ranks(self, down: Tensor, up: Tensor) -> None:
        """Adds `up @ down` to what the layer stands for; `[p, K]` and `[N, p]`, rounded to the layer's dtype."""
        self._set_branch(
            torch.cat([self.proj_down, down.to(self.proj_down)]), torch.cat([self.proj_up, up.to(self.proj_up)], dim=1)
        )

    def drop_ranks(self, count: int) -> None:
        """Takes the last `count` ranks off again; what remains has its old bits."""
        kept = self.rank - count
        self._set_branch(self.proj_down[:kept].clone(), self.proj_up[:, :kept].clone())

    def _set_branch(self, down: Tensor, up: Tensor) -> None:
        self.proj_down = nn.Parameter(down, requires_grad=False)
        self.proj_up = nn.Parameter(up, requires_grad=False)


class PlainConvolutions:
    """Mixin for a quantized convolution: with the arguments of `nn.Conv2d` its class makes a plain one.

    PEFT's layers around a convolution make their own two by calling the class of what they are around.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return nn.Conv2d(*args, **kwargs) if args and isinstance(args[0], int) else super().__new__(cls)


class StateDict(OrderedDict):
    """The state dict of a quantized model; asked for the `weight` of a quantized layer, it computes it.

    FLUX's loader of LoRA files looks up the weight of each layer that a file names. It is not a key of its own, so
    what is saved and listed stays as it is.
    """

    def __missing__(self, key: str) -> Tensor:
        stem, _, leaf = key.rpartition(".")
        for prefix in (f"{stem}.", f"{stem}.base_layer."):
            if leaf == "weight" and f"{prefix}qweight" in self:
                names = ("qweight", "wscales", "wtscale", "smooth_factor", "proj_down", "proj_up")
                parts: Any = [self.get(prefix + name) for name in names]
                down, up = parts[-2:]
                compute = partial(dequantize_weight, *parts, dtype=up.dtype)
                return LazyWeight(up, (up.shape[0], down.shape[1]), compute)
        raise KeyError(key)


def answer_for_weights(model: nn.Module) -> None:
    """Lets `model.state_dict()` be a `StateDict`."""
    model._register_state_dict_hook(_as_state_dict)


def _as_state_dict(model: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> StateDict:
    answering = StateDict(state_dict)
    answering._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]
    return answering


def _specialize_adapter(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Gives PEFT's layer that is being put around ours the class that fuses exactly.

    PEFT has tables for such classes, but diffusers, which calls it, gives no access to them; this hook of PyTorch is
    told of every layer that becomes part of another.
    """
    if name == "base_layer" and isinstance(child, LowRankBranch) and type(parent).__module__.startswith("peft."):
        from diffusers_sana.quantizers.svdquant.lora_layers import SPECIALIZED

        parent.__class__ = SPECIALIZED.get(type(parent), type(parent))


# In force from the moment on when there can be quantized layers: their module imports this one.
register_module_module_registration_hook(_specialize_adapter)
