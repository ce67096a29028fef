"""Tensor parallelism for Sana's transformer: each process holds some heads, and some channels of the Mix-FFN.

The plan, `_tp_plan`, and the call, `enable_parallelism(config=TensorParallelConfig(...))`, are those of diffusers. Its
own implementation makes `DTensor`s of linear layers. But most weights of Sana are in the convolutions of the Mix-FFN,
and our kernels take plain tensors, so here each process keeps plain tensors with its part of the channels.

The projections into an attention or Mix-FFN are split by their outputs, those out of it by their inputs. The latter
give summands, which are all-reduced: three times per block. The norms of queries and keys reduce a number per token.

Legend: B batch, N tokens, D inner width, P processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from diffusers_sana._compat import MissingHostName, private


def tensor_plan() -> dict[str, Any] | None:
    """How diffusers would split each layer of the blocks; None if it cannot."""
    try:
        from diffusers_sana._compat import PackedColwiseParallel
    except MissingHostName:
        return None
    attentions = {
        f"transformer_blocks.*.{attention}.{layer}": style
        for attention in ("attn1", "attn2")
        for layer, style in (("to_q", "colwise"), ("to_k", "colwise"), ("to_v", "colwise"), ("to_out.0", "rowwise"))
    }
    halves = PackedColwiseParallel([1, 1])  # values and gates
    return attentions | {
        "transformer_blocks.*.ff.conv_inverted": halves,
        "transformer_blocks.*.ff.conv_depth": halves,
        "transformer_blocks.*.ff.conv_point": "rowwise",
    }


def tensor_config_of(config: Any) -> Any:
    """The `TensorParallelConfig` that is `config` or in it, or None."""
    return config if hasattr(config, "tp_degree") else getattr(config, "tensor_parallel_config", None)


def check_shards(model: Any, tensor_config: Any) -> dict[str, Any]:
    """Where the parameters of a model are split, by name; raises a ValueError where it cannot be."""
    from diffusers_sana._compat import check_tp_supported, resolve_tp_shard_specs

    degree = tensor_config.tp_degree if tensor_config.mesh is None else tensor_config.mesh.size()
    plan = private(model, "_tp_plan")
    check_tp_supported(type(model).__name__, plan, model.config["num_attention_heads"], tensor_config, model=model)
    if model.config["num_cross_attention_heads"] % degree:
        raise ValueError(
            f"`tp_degree` must divide `num_cross_attention_heads`, {model.config['num_cross_attention_heads']}, got "
            f"{degree}."
        )
    return resolve_tp_shard_specs(model, plan, degree)


@torch.no_grad()
def shard(model: Any, specs: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Leaves this process its part of the weights, and lets it sum with the others.

    Args:
        model: a transformer with Sana's blocks.
        specs: from `check_shards`.
        group: the processes, which must have equal weights.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for name, spec in specs.items():
        path, _, kind = name.rpartition(".")
        layer = model.get_submodule(path)
        whole = getattr(layer, kind)
        if spec.dim is not None:
            pieces = whole.split(spec.block_sizes, dim=spec.dim)
            own = torch.cat([piece.chunk(size, dim=spec.dim)[rank] for piece in pieces], dim=spec.dim)
        else:  # a bias, which one of the processes adds
            own = whole.clone() if rank == 0 else torch.zeros_like(whole)
        setattr(layer, kind, nn.Parameter(own, requires_grad=whole.requires_grad))
        if kind == "weight":
            _tell_sizes(layer)
    _add_hook(model.patch_embed, NoGradientHook())
    for block in model.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.heads //= size
            for norm in ("norm_q", "norm_k"):
                if getattr(attention, norm) is not None:
                    setattr(attention, norm, ShardedRMSNorm(getattr(attention, norm), group))
            _add_hook(attention.to_out[0], SumHook(group))
        _add_hook(block.ff, SumHook(group))


def _tell_sizes(layer: Any) -> None:
    """The attributes of a layer, by its weight."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
        return
    if layer.groups > 1:  # depthwise
        layer.groups = layer.in_channels = layer.out_channels = layer.weight.shape[0]
    else:
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]


def _add_hook(module: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "tensor_parallel")


class ShardedRMSNorm(nn.Module):
    """A process's channels of an RMS norm over the channels of all.

    Args:
        norm: the whole norm.
        group: the processes.
    """

    def __init__(self, norm: Any, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.eps, self.dim, self.group = norm.eps, len(norm.weight), group
        own = norm.weight.detach().chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
        self.weight = nn.Parameter(own, requires_grad=norm.weight.requires_grad)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., D/P]` to the same shape and dtype."""
        values = hidden_states.float()
        squares = values.square().sum(dim=-1, keepdim=True)
        dist.all_reduce(squares, group=self.group)
        out = values * torch.rsqrt(squares / self.dim + self.eps) * self.weight.float()
        return out.to(hidden_states.dtype)


class SumHook(ModelHook):
    """Sums the outputs of a module over processes.

    Args:
        group: the processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """Any shape to the same."""
        summed = output.contiguous() if output.ndim < 4 else output.contiguous(memory_format=torch.channels_last)
        dist.all_reduce(summed, group=self.group)
        return summed


class NoGradientHook(ModelHook):
    """Raises where gradients are asked for, which communication does not have."""

    def pre_forward(self, module: nn.Module, hidden_states: Tensor) -> tuple[tuple[Tensor], dict]:
        """Checks the mode."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                "A model with `enable_parallelism` has no gradients, because communication between the processes has "
                "none. Run it under `torch.no_grad()`; train with data parallelism."
            )
        return (hidden_states,), {}
