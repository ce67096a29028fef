"""The residual quantizer of VILA-U (arXiv 2409.04429, equations 2 to 4; RQ-VAE, arXiv 2203.01941).

One codebook of K entries e_k serves all depths. A vector z becomes D codes:

    r_0 = z,   k_d = argmin_k |r_(d-1) - e_k|^2,   r_d = r_(d-1) - e_(k_d),   zq = e_(k_1) + ... + e_(k_D)

The codebook has no gradient. It is trained by an EMA of the number of residuals that chose an entry, N_k, and an EMA
of their sum, m_k. After every depth d, with n_k residuals r_(d-1) of this batch that chose k, and decay g:

    N_k <- g N_k + (1 - g) n_k,     m_k <- g m_k + (1 - g) (sum of these residuals)
    where N_k < 1:  m_k <- a random residual of the batch,  N_k <- 1          (restart of unused entries)
    e_k <- m_k / (N (N_k + eps) / (N + K eps)),     N = sum of N_k

so depth d + 1 searches the table that depth d has updated, while zq sums the entries found at each depth.

Legend: n vectors, C channels, K entries, D depths.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusers_sana.kernels.precision import without_autocast
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUVisionConfig


EMA_EPSILON = 1e-5
MAX_DISTANCES = 2**24  # in memory at a time: 64 MiB in fp32, for any number of vectors
RESTART_NOISE = 0.01  # times 1/sqrt(C): separates entries that restart from the same vector


class VilaUQuantizerOutput(NamedTuple):
    """What `VilaUResidualQuantizer.forward` returns."""

    quantized: Tensor  # [..., C], zq; its gradient passes to z unchanged
    codes: Tensor  # [..., D], int64
    commitment_loss: Tensor  # scalar, fp32: mean over d of mean((z - sum of the first d entries)^2)


class VilaUResidualQuantizer(nn.Module):
    """Maps each vector to D codes, and codes back to vectors.

    The codebook is `embedding.weight`, `[K, C]`. It is fixed, in training mode too, until `start_ema` is called, so
    training the language model cannot change it by accident. After that, every `forward` in training mode updates it;
    `encode` never does. The EMA state, the fp32 buffers `embed_ema` `[K, C]` and `cluster_size_ema` `[K]`,
    is part of `state_dict()`, for resuming a run, but `save_pretrained` does not write it.

    Distances are computed in the dtype of the codebook, as the official model does, or with
    `config.quantizer_dtype="float32"` in fp32, which finds other codes for some vectors of a bf16 model. They
    would overflow in fp16, which is always promoted to fp32. Ties go to the first entry. Training is bitwise
    reproducible for a seed; on a GPU only with `torch.use_deterministic_algorithms(True)`, which orders the sums.
    """

    embed_ema: Any  # Tensor, None without EMA
    cluster_size_ema: Any

    def __init__(self, config: VilaUVisionConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.hidden_size)
        self.register_buffer("embed_ema", None)
        self.register_buffer("cluster_size_ema", None)

    def forward(self, features: Tensor) -> VilaUQuantizerOutput:
        """`[..., C]` to sums of D entries. In training mode, after `start_ema`, also trains the codebook."""
        codes, entries = self._search(features, train=self.training and self.embed_ema is not None)
        exact = features.to(torch.promote_types(features.dtype, torch.float32))
        losses, total = [], torch.zeros_like(exact.detach())
        for entry in entries:
            total = total + entry.to(total.dtype)
            losses.append(nn.functional.mse_loss(exact, total))
        straight_through = features - features.detach()  # zero, with the gradient of z: zq keeps its exact value
        return VilaUQuantizerOutput(total.to(features.dtype) + straight_through, codes, torch.stack(losses).mean())

    def encode(self, features: Tensor) -> Tensor:
        """`[..., C]` to codes `[..., D]`, int64; never trains the codebook."""
        return self._search(features, train=False)[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[..., D]` to zq `[..., C]`: bit for bit that of `forward` with the same codebook."""
        dtype = self.embedding.weight.dtype
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=codes.device)
        for code in codes.unbind(-1):
            total = total + self.embedding(code).to(total.dtype)
        return total.to(dtype)

    def start_ema(self, initial_count: float = 0.0) -> None:
        """Makes `forward` train the codebook in training mode, starting from new fp32 state.

        Args:
            initial_count: the initial N_k. 0 is for a new codebook: the first batch replaces nearly all of it. To keep
                a trained one, use for example 100: an entry is then restarted after 460 depths without use (decay
                0.99).
        """
        if initial_count < 0:
            raise ValueError(f"`initial_count` must not be negative, got {initial_count}")
        if initial_count == 0 and not self.config.restart_unused_codes:
            raise ValueError(
                "`initial_count` must be positive, got 0: without `config.restart_unused_codes` the entries that no "
                "vector has chosen yet would be divided by it"
            )
        table = self.embedding.weight.requires_grad_(False).detach().float()
        self.embed_ema = table * (initial_count or 1.0)
        self.cluster_size_ema = torch.full_like(table[:, 0], initial_count)

    def stop_ema(self) -> None:
        """Drops the EMA state; the codebook is fixed again."""
        self.embed_ema = self.cluster_size_ema = None

    @torch.no_grad()
    def _search(self, features: Tensor, train: bool) -> tuple[Tensor, list[Tensor]]:
        """Codes `[..., D]`, and for each depth the entries `[..., C]`."""
        residual = features.detach().reshape(-1, features.shape[-1])
        codes, entries = [], []
        with without_autocast(features.device.type):
            for _ in range(self.config.num_codebooks):
                table = self._table()
                residual = residual.to(table.dtype)
                code = nearest_entry(residual, table)
                entry = table[code]
                if train:
                    self._update_ema(residual.float(), code)
                residual = residual - entry
                codes.append(code.view(features.shape[:-1]))
                entries.append(entry.view(features.shape))
        return torch.stack(codes, dim=-1), entries

    def _table(self) -> Tensor:
        """The codebook in the dtype of the distances."""
        table = self.embedding.weight
        if self.config.quantizer_dtype == "float32" or table.dtype == torch.float16:
            return table.to(torch.promote_types(table.dtype, torch.float32))
        return table

    def _update_ema(self, vectors: Tensor, codes: Tensor) -> None:
        """One EMA step with `vectors` `[n, C]` that chose `codes` `[n]`, summed over all ranks."""
        means, counts = self.embed_ema, self.cluster_size_ema
        if means.dtype != torch.float32 or counts.dtype != torch.float32:
            raise RuntimeError(
                f"the EMA state must be float32, but the model has been cast to {means.dtype}; call `start_ema()` "
                "after the cast"
            )
        decay = self.config.codebook_decay
        new_counts = torch.zeros_like(counts).index_add_(0, codes, vectors.new_ones(len(codes)))
        new_sums = torch.zeros_like(means).index_add_(0, codes, vectors)
        if _is_distributed():
            dist.all_reduce(new_counts)
            dist.all_reduce(new_sums)
        counts.mul_(decay).add_(new_counts, alpha=1 - decay)
        means.mul_(decay).add_(new_sums, alpha=1 - decay)
        if self.config.restart_unused_codes:
            unused = counts < 1
            means.copy_(torch.where(unused[:, None], _random_vectors(vectors, len(counts)), means))
            counts.masked_fill_(unused, 1.0)
        total = counts.sum()
        smoothed = total * (counts + EMA_EPSILON) / (total + len(counts) * EMA_EPSILON)
        self.embedding.weight.copy_(means / smoothed[:, None])


def nearest_entry(vectors: Tensor, table: Tensor) -> Tensor:
    """The row of `table` `[K, C]` nearest to each of `vectors` `[n, C]`: `[n]`, int64; ties go to the first.

    Distances are |v|^2 + |e|^2 - 2 v.e, in blocks of at most `MAX_DISTANCES`. |v|^2 does not change the order, but it
    changes the rounding: in bf16 the official codes depend on it.
    """
    norms = table.square().sum(dim=1)
    nearest = [
        torch.addmm(block.square().sum(dim=1, keepdim=True) + norms, block, table.T, alpha=-2).argmin(dim=1)
        for block in vectors.split(max(1, MAX_DISTANCES // len(table)))
    ]
    return torch.cat(nearest)


def _random_vectors(vectors: Tensor, count: int) -> Tensor:
    """`count` of `vectors` `[n, C]` in random order, the same on all ranks: those of rank 0.

    If there are fewer than `count`, vectors are repeated with a little noise. Samples a permutation, then the noise,
    from the default generator.
    """
    number, channels = vectors.shape
    repeats = -(-count // number)
    chosen = vectors[torch.randperm(number * repeats, device=vectors.device)[:count] % number]
    if repeats > 1:
        chosen = chosen + torch.rand_like(chosen) * (RESTART_NOISE / channels**0.5)
    if _is_distributed():
        dist.broadcast(chosen, src=0)
    return chosen


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
