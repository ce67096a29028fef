"""The loop around the training step: clock, learning rate, averaged weights, log, checkpoints, stopping, resuming.

A script writes only what is particular to it:

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=..., sample=...)
    for batch in loop.run(batches):
        with accelerator.accumulate(model):
            ...  # loss, backward, optimizer step
        loop.report(loss=loss)
"""

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, send_to_device
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from diffusers_sana._compat import private
from diffusers_sana.training.batches import Batches, iterate_batches
from diffusers_sana.training.config import TrainingConfig
from diffusers_sana.training.plots import plot_losses
from diffusers_sana.training.run_folder import checkpoints, drop_lines_after, replace_folder
from diffusers_sana.training.schedules import budget_used, learning_rate_factor


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator of a run. Make one before anything asks which process this is: it finds that out."""
    if (
        private(AcceleratorState, "_shared_state").get("_mixed_precision", config.mixed_precision)
        != config.mixed_precision
    ):
        private(AcceleratorState, "_reset_state")()  # an earlier run in this process, in another precision, is over
    return Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation_steps
    )


class TrainingLoop:
    """Runs the batches of a training until its budget is used, and survives being stopped.

    Args:
        config: budget, schedule and output settings.
        accelerator: the Accelerator that prepared the modules and optimizers.
        modules: prepared modules; their trainable parameters are averaged when `config.ema_decay` is set.
        optimizers: prepared optimizers; each keeps the learning rate it was made with as its peak.
        save: writes the models as they should be published into a folder; called with the averaged weights in place,
            on every process, at each checkpoint and at the end.
        sample: writes a picture of the state of training to a path; called like `save`, in evaluation by the callee.

    After SIGTERM or Ctrl-C the current step is finished, a checkpoint is written, and `run` ends normally.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        modules: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        save: Callable[[Path], None],
        sample: Callable[[Path], None],
    ):
        self.config, self.accelerator, self.optimizers = config, accelerator, optimizers
        self.save, self.sample = save, sample
        self.output_dir = Path(config.output_dir)
        self.step = self.batches_used = 0
        self._peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self._modules = modules
        decay = config.ema_decay
        self._ema = EMAModel(self._parameters(), decay=decay, foreach=True) if decay else None
        self._minutes = self._shared_minutes = 0.0
        self._started: float | None = None
        self._stop_requested = self._shared_stop = False
        self._window: list[dict[str, Tensor]] = []
        self._window_images, self._window_start = 0, 0.0
        accelerator.register_for_checkpointing(self)
        self._begin()

    def run(self, batches: Batches) -> Iterator[dict[str, Any]]:
        """Yield batches, on the device, until the budget is used or a stop is asked for."""
        self._started = self._window_start = time.monotonic()
        self._shared_minutes = last_save = last_sample = self._minutes
        stream = iterate_batches(batches, self.batches_used)
        if self._used() >= 1:
            return
        with self._stop_on_signals(), self._progress_bar() as bar:
            while self._used() < 1 and not self._shared_stop:
                self._set_learning_rate()
                yield send_to_device(next(stream), self.accelerator.device)
                self.batches_used += 1
                if not self.accelerator.sync_gradients:
                    continue
                self.step += 1
                self._share_clock()
                if self._ema is not None:
                    self._ema.step(self._parameters())
                if self.step % self.config.log_every == 0:
                    self._log(bar)
                bar.update()
                if self._shared_minutes - last_sample >= self.config.sample_minutes:
                    last_sample = self._shared_minutes
                    self._sample()
                if self._shared_minutes - last_save >= self.config.save_minutes:
                    last_save = self._shared_minutes
                    self._checkpoint()
            self._checkpoint()
            self._sample()

    def report(self, images: int, **terms: Tensor) -> None:
        """Take note of what a step measured; the means over `log_every` steps go to log.jsonl.

        Args:
            images: pictures in the batch, for the speed in the log.
            terms: scalars by name, such as `loss`.
        """
        self._window.append({name: term.detach() for name, term in terms.items()})
        self._window_images += images

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the modules hold the averaged weights, if any are kept."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters())
        self._ema.copy_to(self._parameters())
        try:
            yield
        finally:
            self._ema.restore(self._parameters())

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; written into checkpoints by Accelerate."""
        return {"step": self.step, "batches_used": self.batches_used, "minutes": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where a checkpoint was."""
        self.step, self.batches_used, self._minutes = state["step"], state["batches_used"], state["minutes"]

    def _elapsed(self) -> float:
        return self._minutes if self._started is None else self._minutes + (time.monotonic() - self._started) / 60

    def _share_clock(self) -> None:
        """Make all processes agree on the time and on whether to stop: each must take the same branches."""
        clock = torch.tensor([self._elapsed(), float(self._stop_requested)], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            clock = self.accelerator.reduce(clock, reduction="sum") / self.accelerator.num_processes
        self._shared_minutes, self._shared_stop = clock[0].item(), clock[1].item() > 0

    def _used(self) -> float:
        return budget_used(self.step, self._shared_minutes, self.config.max_steps, self.config.max_minutes)

    def _set_learning_rate(self) -> None:
        factor = learning_rate_factor(self.step, self._used(), self.config.lr_schedule, self.config.warmup_steps)
        for optimizer, rates in zip(self.optimizers, self._peak_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _log(self, bar: tqdm) -> None:
        seconds = time.monotonic() - self._window_start
        names = list(dict.fromkeys(name for terms in self._window for name in terms))
        values = [[terms[name].float() for terms in self._window if name in terms] for name in names]
        means = torch.stack([torch.stack(value).mean() for value in values])
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, reduction="mean")
        row: dict[str, float] = {"step": self.step, "minutes": round(self._shared_minutes, 3)}
        row |= {name: round(value, 6) for name, value in zip(names, means.tolist(), strict=True)}
        row["lr"] = self.optimizers[0].param_groups[0]["lr"]
        row["images_per_second"] = round(self._window_images * self.accelerator.num_processes / seconds, 2)
        self._window, self._window_images, self._window_start = [], 0, time.monotonic()
        if self.accelerator.is_main_process:
            with open(self.output_dir / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        bar.set_description(f"{self.output_dir.name} {self._used():.0%}", refresh=False)
        bar.set_postfix({names[0]: f"{row[names[0]]:.4f}", "lr": f"{row['lr']:.1e}"}, refresh=False)

    def _progress_bar(self) -> tqdm:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        return tqdm(
            total=self.config.max_steps,
            initial=self.step,
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no animation
        )

    def _sample(self) -> None:
        with self.averaged_weights(), torch.compiler.set_stance("force_eager"):  # a few pictures pay no compilation
            self.sample(self.output_dir / "samples" / f"step_{self.step:07d}.png")
            # After a forward without backward FSDP keeps the root's weights gathered; restored ones would go unseen.
            for part in (part for module in self._modules for part in module.modules()):
                if isinstance(part, FSDPModule):
                    part.reshard()
        log_path = self.output_dir / "log.jsonl"
        if self.accelerator.is_main_process and log_path.exists():
            plot_losses(log_path, self.output_dir / "loss.png")

    def _checkpoint(self) -> None:
        """Write checkpoint and models beside their places, then rename: a kill leaves the old or the new, whole."""
        folder = self.output_dir / "checkpoints" / f"step_{self.step:07d}"
        temporary = folder.with_suffix(".tmp")
        if self.accelerator.is_main_process:  # what a kill may have left
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(self.output_dir / "model.tmp", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        if self._ema is not None and (self._is_sharded() or self.accelerator.is_main_process):
            torch.save(self._ema.state_dict(), temporary / self._ema_name())
        with self.averaged_weights():
            self.save(self.output_dir / "model.tmp")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            replace_folder(temporary, folder)
            replace_folder(self.output_dir / "model.tmp", self.output_dir / "model")
            for old in checkpoints(self.output_dir)[:-1]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _begin(self) -> None:
        """Load the newest checkpoint, or make sure that there is none to be mixed with."""
        found = checkpoints(self.output_dir)
        if self.config.resume and not found:
            raise ValueError(f"`resume` needs a checkpoint, got none in {self.output_dir}. Check `output_dir`.")
        if found and not self.config.resume:
            raise ValueError(f"`output_dir` must be new, but {self.output_dir} holds a run. Use `resume` or another.")
        if found:
            self.accelerator.load_state(str(found[-1]))
            if self._ema is not None:
                self._ema.load_state_dict(torch.load(found[-1] / self._ema_name(), map_location="cpu"))
                self._ema.to(self.accelerator.device)
        if self.accelerator.is_main_process:
            drop_lines_after(self.output_dir / "log.jsonl", self.step)

    def _parameters(self) -> list[nn.Parameter]:
        """What trains, and of sharded parameters the part that this process holds."""
        trained = [p for module in self._modules for p in module.parameters() if p.requires_grad]
        # A parameter that aliases the shard: writing into it writes the sharded one.
        return [nn.Parameter(p.data.to_local()) if isinstance(p.data, DTensor) else p for p in trained]

    def _is_sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    def _ema_name(self) -> str:
        """Under FSDP each process averages its own shards; otherwise all hold the same averages."""
        return f"ema_{self.accelerator.process_index if self._is_sharded() else 0}.pt"

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main one only
            yield
            return

        def request_stop(number: int, frame: Any) -> None:
            self._stop_requested = True

        previous = {number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
