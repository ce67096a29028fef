"""What a checkpoint is written in: safetensors files, in which there is nothing to execute.

`torch.save` and Accelerate's `save_state` write pickles, and a pickle from somebody else's run folder may run code
when it is read. Here nested dictionaries and lists of tensors and plain values, such as the state of an optimizer,
become one safetensors file: the tensors under the path that leads to them, the structure as JSON in the metadata.
"""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


STRUCTURE = "structure"  # the key of the JSON in the metadata


def write_state(state: Any, path: Path) -> None:
    """Write a state to a safetensors file.

    Args:
        state: tensors, numbers, strings, booleans and None in any nesting of dictionaries (with keys of strings or
            integers), lists and tuples. A tensor that is there twice is written once.
        path: the file.

    Raises:
        TypeError: a value of another type.
        OSError: the file cannot be written, for instance because the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def encode(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            identity = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
            # Tensors without elements may all have the same address.
            name = names.setdefault(identity, place) if value.numel() else place
            if name == place:
                tensors[name] = _on_its_own(value)
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {
                "dict": [[key, encode(item, f"{place}/{key}" if place else str(key))] for key, item in value.items()]
            }
        if isinstance(value, list | tuple):
            items = [encode(item, f"{place}/{index}") for index, item in enumerate(value)]
            return {type(value).__name__: items}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}, found under {place!r}.")

    structure = json.dumps(encode(state, ""))
    try:
        save_file(tensors, path, metadata={STRUCTURE: structure})
    except SafetensorError as error:  # such as "No space left on device"
        raise OSError(f"{path} could not be written: {error}") from error


def read_state(path: Path) -> Any:
    """The state in a file of `write_state`, its tensors on the CPU.

    Raises:
        ValueError: the file is missing, damaged, or not one of these; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
            structure = json.loads((file.metadata() or {})[STRUCTURE])
        return _decode(structure, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as part of a checkpoint: {type(error).__name__}: {error}. Delete the "
            "folder it is in to continue from an older checkpoint, if there is one."
        ) from error


def _on_its_own(tensor: Tensor) -> Tensor:
    """The tensor in its own storage, contiguous and on the CPU, as safetensors files need it."""
    tensor = tensor.detach().cpu()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def _decode(encoded: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    [(kind, content)] = encoded.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_decode(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "value":
        return content
    raise ValueError(f"unknown kind {kind!r} in the structure")


def gathered(state: Any, keep: bool = True) -> Any:
    """The same state with whole tensors on the CPU in the place of sharded ones. Every process must take part.

    Args:
        state: as in `write_state`.
        keep: False in a process that does not need them: it gets None in their place, and saves the memory.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: gathered(item, keep) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(item, keep) for item in state)
    return state


def laid_out_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor that every process holds, on the device and in the layout of `reference`.

    That is sharded or channels-last if the reference is: fused optimizers take it for granted that their state has the
    layout of the parameters.
    """
    if not isinstance(reference, DTensor):
        return torch.empty_like(reference, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    tensor = tensor.to(reference.device)
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def module_state(module: nn.Module, with_frozen: bool) -> dict[str, Tensor]:
    """The tensors of a module by their names, references to its own; without frozen ones only those that train.

    All of a module without frozen parameters are kept: its buffers may be part of the training, as the vectors of
    spectral norms are.
    """
    if with_frozen or all(parameter.requires_grad for parameter in module.parameters()):
        return dict(module.state_dict())
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def load_module(module: nn.Module, with_frozen: bool, stored: Mapping[str, Tensor], path: Path) -> None:
    """Copy stored tensors into a module; errors as in `load_tensors`."""
    load_tensors(module_state(module, with_frozen), stored, path)


@torch.no_grad()
def load_tensors(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], path: Path) -> None:
    """Copy stored tensors into those of the same names.

    Raises:
        ValueError: names or shapes are not the same.
    """
    wrong = sorted(own.keys() ^ stored.keys())
    wrong = wrong or [name for name, tensor in own.items() if tensor.shape != stored[name].shape]
    if wrong:
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of this model: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, {wrong[0]!r} first. Build the model as it was when the run began."
        )
    for name, tensor in own.items():
        tensor.copy_(laid_out_like(stored[name], tensor))


# What the present settings say about an optimizer, whatever they were when the checkpoint was written.
SETTINGS = ("params", "lr", "betas", "weight_decay")


def load_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any], path: Path) -> None:
    """Put the stored state into an optimizer, which keeps its own learning rate, betas and weight decay.

    Raises:
        ValueError: the state is that of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    counts, stored_counts = ([len(group["params"]) for group in some] for some in (groups, stored["param_groups"]))
    if counts != stored_counts:
        raise ValueError(
            f"{str(path)!r} is the state of an optimizer of {stored_counts} parameters, but this one has {counts}. "
            "Train what the run trained when it began."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    state = {
        number: {
            name: laid_out_like(value, parameter)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for name, value in stored["state"][number].items()
        }
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in stored["state"]
    }
    merged = [
        old | {name: new[name] for name in SETTINGS if name in new}
        for old, new in zip(stored["param_groups"], groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all global random number generators: Python's, NumPy's, PyTorch's for the CPU and for `device`."""
    kind, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, cached_gaussian],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned; a generator that is not in it is left alone."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first floating-point tensor that holds NaN or infinity, of a sharded one in this process."""
    for name, tensor in named:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and not bool(torch.isfinite(local).all()):
            return name
    return None


def copy_with_weights(
    model: ModelMixin | PreTrainedModel, state: Mapping[str, Tensor]
) -> ModelMixin | PreTrainedModel:
    """A plain model of the class and config of `model`, a diffusers or transformers one, that holds `state`.

    It shares the tensors of `state`. Meant for saving: compilation, hooks and Accelerate's wrappers stay behind.
    `state` is what `Accelerator.get_state_dict` gathers, or its part for one submodule.
    """
    model_class: Any = type(model)
    with torch.device("meta"):  # an initialization would be thrown away
        if isinstance(model, PreTrainedModel):
            copy = model_class(model.config)
        else:
            # Without diffusers' note of which values were defaults, by which it would undo `register_to_config`.
            config = {name: value for name, value in model.config.items() if name != "_use_default_values"}
            copy = model_class.from_config(config)
    copy.load_state_dict(state, assign=True)
    return copy


def sub_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict under `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
