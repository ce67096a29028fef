"""The loop around the training step: clock, learning rate, EMA, log, checkpoints, stopping, resuming.

A script writes only what is particular to it:

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=..., sample=...)
    for batch in loop.run(batches):
        with accelerator.accumulate(model):
            ...  # the loss
            loop.backward(loss)
            loop.update()
        loop.report(images=len(batch), loss=loss)
"""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object, send_to_device, set_seed
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from diffusers_sana._compat import private, warn_if_untested
from diffusers_sana.files import differences, locked, read_json
from diffusers_sana.training.config import RunError, TrainingConfig, check_resumable, record
from diffusers_sana.training.data.batches import Batches, count_items, iterate_batches
from diffusers_sana.training.optimizers import averaged_weights, averaging
from diffusers_sana.training.plots import plot_losses
from diffusers_sana.training.run_folder import (
    check_run_folder,
    checkpoints,
    drop_lines_after,
    replace_folder,
    restore_folder,
)
from diffusers_sana.training.state_files import (
    first_not_finite,
    gathered,
    laid_out_like,
    load_module,
    load_optimizer,
    load_tensors,
    module_state,
    random_state,
    read_state,
    set_random_state,
    write_state,
)
from diffusers_sana.training.trackers import Trackers


warn_if_untested("accelerate")

logger = logging.getLogger(__name__)

FORMAT = 1  # of checkpoints


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator of a run. Make one before anything asks which process this is: it finds that out.

    Raises:
        ValueError: `output_dir` has nothing to resume, or holds another run. Said now, and not after an hour of
            encoding.
    """
    check_run_folder(config.output_dir, config.resume)
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
        modules: the prepared modules that checkpoints hold.
        optimizers: prepared optimizers, one per module; each keeps the learning rate it was made with as its peak.
        save: writes the models as they should be published into a folder; called with the EMA weights in place,
            on every process, at each checkpoint and at the end. Together the files are complete or absent.
        sample: writes an image of the state of training to a path; called like `save`, in evaluation by the callee.
            Neither of the two changes the random numbers of the training.
        ema_modules: those of `modules` whose trainable parameters have an EMA when `config.ema_decay` is set; default:
            all.
        keep_frozen: whether checkpoints hold what does not train, too. False for a large base beside an adapter, which
            must then be the same at `resume`.
        options: further groups of options, for data and models, that checkpoints record and a resumed run compares.
        tensors: further tensors that the recipe changes in place and checkpoints hold.

    A step whose gradients are not finite changes nothing. After SIGTERM or Ctrl-C the current step is finished, a
    checkpoint is written, and `run` ends normally; a second Ctrl-C interrupts at once.

    Attributes:
        step: optimizer steps made.
        batches_used: by all processes together.
        mean_counts: what `count` of `run` counts, on average in a batch of the present optimizer step, over all of its
            batches in all processes. A sum divided by such a number is, once gradients are accumulated and averaged
            over processes, the mean over the whole step.
        weight: images in the present batch over `mean_counts["images"]`; the mean loss of a batch times its weight
            counts every image of a step alike. 1 without accumulation, in one process.

    Raises:
        ValueError: what `config.resume` says does not fit the folder, the checkpoint does not fit the models or the
            settings, or the Accelerator is set to DeepSpeed, Megatron-LM or the first version of FSDP, whose
            checkpoints are pickles.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        modules: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        save: Callable[[Path], None],
        sample: Callable[[Path], None],
        ema_modules: Sequence[nn.Module] | None = None,
        keep_frozen: bool = True,
        options: Sequence[Any] = (),
        tensors: Mapping[str, Tensor] | None = None,
    ):
        self.config, self.accelerator, self.optimizers = config, accelerator, optimizers
        self.save, self.sample = save, sample
        self.output_dir = Path(config.output_dir)
        self.step = self.batches_used = 0
        self.mean_counts: dict[str, float] = {}
        self.weight = 1.0
        self._modules = modules
        self._groups = (config, *options)
        self._ema_modules = modules if ema_modules is None else ema_modules
        self._keep_frozen = keep_frozen
        self._tensors = dict(tensors or {})
        self._peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        decay = config.ema_decay
        self._ema = EMAModel(self._parameters(), decay=decay, foreach=True) if decay else None
        self._minutes = self._shared_minutes = 0.0
        self._started: float | None = None
        self._stop_requested = self._shared_stop = False
        self._bad_gradients = False
        self._skipped_in_row = self._skipped_in_window = 0
        self._window: list[dict[str, Tensor]] = []
        self._window_steps, self._window_images, self._window_start = 0, 0, 0.0
        self._newest: Path | None = None  # the checkpoint that holds the present state, or that the run continues from
        self._data: dict[str, Any] | None = None
        self._random_state: dict[str, Any] | None = None
        self._trackers = Trackers(config)
        self._refuse_pickles()
        check_run_folder(config.output_dir, config.resume)
        if found := checkpoints(self.output_dir):
            self._load(found[-1])
        for optimizer in optimizers:
            getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._drop_bad_gradients)

    def run(
        self, batches: Batches, count: Callable[[dict[str, Any]], dict[str, int]] = count_items
    ) -> Iterator[dict[str, Any]]:
        """Yield batches, on the device, until the budget is used or a stop is asked for.

        Args:
            batches: see `Batches`.
            count: counts in a batch what its losses are means over, under the same names in every batch; see
                `mean_counts`.

        Raises:
            ValueError: the data are not those that the run began with.
            RunError: another process trains into the same folder; the gradients of `config.max_skipped_steps` steps in
                a row, or weights that were to be saved, are not finite.
            OSError: a checkpoint cannot be written. Those before it are whole.
        """
        self._check_data(getattr(batches, "fingerprint", None))
        self._started = self._window_start = time.monotonic()
        self._shared_minutes = last_save = last_sample = self._minutes
        if self._used() >= 1:
            return
        for optimizer in averaging(self.optimizers):
            optimizer.train()
        stream = iterate_batches(batches, self.batches_used, self.accelerator.num_processes)
        with contextlib.ExitStack() as held:
            held.enter_context(self._own_folder())
            if self.accelerator.is_main_process:
                held.enter_context(self._trackers.running(record(self._groups), self.step))
            held.enter_context(self._stop_on_signals())
            held.enter_context(contextlib.closing(stream))
            bar = held.enter_context(self._progress_bar())
            if self._random_state is not None:
                set_random_state(self._random_state, self.accelerator.device)
            of_step: list[dict[str, Any]] = []
            while self._used() < 1 and not self._shared_stop:
                if not of_step:
                    of_step = [next(stream) for _ in range(self.accelerator.gradient_accumulation_steps)]
                    weights = self._count(of_step, count)
                self._set_learning_rate()
                self.weight = weights.pop(0)
                yield send_to_device(of_step.pop(0), self.accelerator.device)
                self.batches_used += self.accelerator.num_processes
                if not self.accelerator.sync_gradients:
                    continue
                self.step += 1
                self._window_steps += 1
                is_skipped = self._share_clock()
                if self._ema is not None and not is_skipped:
                    self._ema.step(self._parameters())
                if self.step % self.config.log_every == 0:
                    self._log(bar)
                bar.update()
                self._end_if_all_skipped(bar)
                if self._shared_minutes - last_sample >= self.config.sample_minutes:
                    last_sample = self._shared_minutes
                    self._sample()
                if self._shared_minutes - last_save >= self.config.save_minutes:
                    last_save = self._shared_minutes
                    self._checkpoint()
            self._log(bar)
            self._checkpoint()
            self._sample()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a batch's mean loss, weighted so that every image of a step counts alike."""
        self.accelerator.backward(loss * self.weight)

    def update(self) -> None:
        """Clip the gradients of each module and let its optimizer take a step, at the last batch of the step."""
        for module, optimizer in zip(self._modules, self.optimizers, strict=True):
            if self.accelerator.sync_gradients and self.config.max_grad_norm:
                self.accelerator.clip_grad_norm_(module.parameters(), self.config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    def report(self, images: int, **terms: Tensor) -> None:
        """Take note of what a step measured; the means over `log_every` steps go to log.jsonl.

        Args:
            images: images in the batch, for the speed in the log.
            terms: scalars by name, such as `loss`.
        """
        self._window.append({name: term.detach() for name, term in terms.items()})
        self._window_images += images

    @property
    def is_ending(self) -> bool:
        """Whether no step will follow, so that `save` writes for the last time."""
        return self._used() >= 1 or self._shared_stop

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the modules hold the EMA weights, or the average of a schedule-free optimizer, if there are any."""
        if self._ema is None:
            with averaged_weights(self.optimizers):
                yield
            return
        self._ema.store(self._parameters())
        self._ema.copy_to(self._parameters())
        try:
            yield
        finally:
            self._ema.restore(self._parameters())

    # Progress

    def _elapsed(self) -> float:
        return self._minutes if self._started is None else self._minutes + (time.monotonic() - self._started) / 60

    def _share_clock(self) -> bool:
        """Make all processes agree on the time, on whether to stop, and on whether the step was skipped: each must
        take the same branches. Returns the last."""
        # A gradient scaler skips steps by itself, until it has found a scale.
        is_skipped = self._bad_gradients or any(getattr(each, "step_was_skipped", False) for each in self.optimizers)
        facts = [self._elapsed(), float(self._stop_requested), float(is_skipped)]
        minutes, stop, skipped = (self._sum(torch.tensor(facts)) / self.accelerator.num_processes).tolist()
        self._shared_minutes, self._shared_stop = minutes, stop > 0
        self._bad_gradients = False
        self._skipped_in_window += skipped > 0
        self._skipped_in_row = self._skipped_in_row + 1 if skipped > 0 else 0
        return skipped > 0

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    def _used(self) -> float:
        return budget_used(self.step, self._shared_minutes, self.config.max_steps, self.config.max_minutes)

    def _set_learning_rate(self) -> None:
        factor = learning_rate_factor(self.step, self._used(), self.config.lr_schedule, self.config.warmup_steps)
        for optimizer, rates in zip(self.optimizers, self._peak_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _count(self, batches: list[dict[str, Any]], count: Callable[[dict[str, Any]], dict[str, int]]) -> list[float]:
        """Set `mean_counts` for the batches of a step; returns their weights."""
        counts = [count(batch) for batch in batches]
        names = sorted(counts[0])
        totals = self._sum(torch.tensor([[each[name] for name in names] for each in counts]).sum(0)).tolist()
        num_batches = len(batches) * self.accelerator.num_processes
        # Where there is nothing to take a mean over, the sum is 0, and so must be the mean.
        self.mean_counts = {name: max(total, 1) / num_batches for name, total in zip(names, totals, strict=True)}
        return [each["images"] / self.mean_counts["images"] if "images" in each else 1.0 for each in counts]

    def _drop_bad_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step: without gradients an optimizer leaves weights and moments as they are."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        own = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
        largest = torch.nn.utils.get_total_norm(own, norm_type=torch.inf) if own else torch.zeros(())
        if self._sum((~torch.isfinite(largest)).float()).item() > 0:
            self._bad_gradients = True
            for parameter in parameters:
                parameter.grad = None

    def _end_if_all_skipped(self, bar: tqdm) -> None:
        if self._skipped_in_row < self.config.max_skipped_steps:
            return
        self._log(bar)
        raise RunError(
            f"the gradients of {self._skipped_in_row} steps in a row, up to step {self.step}, are NaN or infinite "
            f"(`max_skipped_steps`). {self._advice()} Look at the data, or lower `learning_rate`."
        )

    def _advice(self) -> str:
        if self._newest is None:
            return "No checkpoint was written yet."
        return f"The newest checkpoint, {self._newest}, is sound: continue from it with `resume`."

    def _log(self, bar: tqdm) -> None:
        """Write a line about the steps since the last one, if there were any."""
        if not self._window_steps:
            return
        seconds = time.monotonic() - self._window_start
        reported = [(name, term) for terms in self._window for name, term in terms.items()]
        values = torch.stack([term.float() for _, term in reported]).tolist() if reported else []
        sums: dict[str, tuple[float, int]] = {}
        for (name, _), value in zip(reported, values, strict=True):
            total, number = sums.get(name, (0.0, 0))
            sums[name] = (total + value, number + 1) if math.isfinite(value) else (total, number)
        # The terms of a process may differ from those of the others, so there is no tensor to reduce.
        everywhere = [(sums, self._window_images)]
        if self.accelerator.num_processes > 1:
            everywhere = gather_object(everywhere)
        row: dict[str, float | None] = {"step": self.step, "minutes": round(self._shared_minutes, 3)}
        names = list(dict.fromkeys(name for process, _ in everywhere for name in process))
        for name in names:
            parts = [process[name] for process, _ in everywhere if name in process]
            number = sum(part[1] for part in parts)
            row[name] = round(sum(part[0] for part in parts) / number, 6) if number else None  # JSON has no NaN
        group = self.optimizers[0].param_groups[0]
        row["lr"] = group["lr"] * group.get("d", 1.0)  # the rate that Prodigy has found
        row["images_per_second"] = round(sum(images for _, images in everywhere) / seconds, 2)
        if self._skipped_in_window:
            row["skipped_steps"] = self._skipped_in_window
        self._window, self._window_images, self._window_start = [], 0, time.monotonic()
        self._window_steps = self._skipped_in_window = 0
        if self.accelerator.is_main_process:
            with open(self.output_dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
            self._trackers.log(row)
        bar.set_description(f"{self.output_dir.name} {self._used():.0%}", refresh=False)
        shown = {name: "not finite" if row[name] is None else f"{row[name]:.4f}" for name in names[:1]}
        bar.set_postfix(shown | {"lr": f"{row['lr']:.1e}"}, refresh=False)

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.max_steps,
            initial=self.step,
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no animation
        )

    # The run folder

    @contextlib.contextmanager
    def _own_folder(self) -> Iterator[None]:
        """Inside, no other run writes into the folder, and it is in the state that this one continues from."""
        if not self.accelerator.is_main_process:
            yield
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.output_dir / ".lock", f"trains into {str(self.output_dir)!r}"))
            except RuntimeError as error:
                raise RunError(str(error)) from None
            newest = next(reversed(checkpoints(self.output_dir)), None)
            if newest != self._newest:
                raise RunError(
                    f"Another process has written {newest} since this one has read the folder. Begin again."
                )
            restore_folder(self.output_dir / "model")
            drop_lines_after(self.output_dir / "log.jsonl", self.step)
            yield

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Inside, random numbers may be used without a change of those that the training uses next."""
        state = random_state(self.accelerator.device)
        try:
            yield
        finally:
            set_random_state(state, self.accelerator.device)

    def _sample(self) -> None:
        # A few images pay no compilation.
        with self.ema_weights(), self._undisturbed(), torch.compiler.set_stance("force_eager"):
            path = self.output_dir / "samples" / f"step_{self.step:07d}.png"
            self.sample(path)
            self._trackers.show(path, self.step)
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
        if folder == self._newest:
            return
        self._refuse_not_finite()
        temporary, model = folder.with_suffix(".tmp"), self.output_dir / "model.tmp"
        if self.accelerator.is_main_process:
            for leftover in (*folder.parent.glob("*.tmp"), model):  # of a kill
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        for write, place in ((self._write, temporary), (self._save_model, model)):
            failure: Exception | None = None
            try:
                write(place)
            except (OSError, SafetensorError) as error:  # the latter for a full disk
                failure = error
            if self._sum(torch.tensor(float(failure is not None))).item() > 0:
                for leftover in (temporary, model):
                    shutil.rmtree(leftover, ignore_errors=True)
                raise OSError(
                    f"checkpoint {folder} could not be written: {failure or 'another process says why'}. "
                    f"{self._advice()}"
                ) from failure
        if self.accelerator.is_main_process:
            replace_folder(temporary, folder)
            replace_folder(model, self.output_dir / "model")
        self._newest = folder
        if self.accelerator.is_main_process:
            for old in checkpoints(self.output_dir)[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _refuse_not_finite(self) -> None:
        """Raise an error rather than replace the last finite weights by NaN."""
        named = [
            (name, tensor)
            for module in self._modules
            for name, tensor in module_state(module, self._keep_frozen).items()
        ]
        named += [("the EMA weights", tensor) for tensor in self._ema.shadow_params] if self._ema else []
        name = first_not_finite(named)
        if self._sum(torch.tensor(float(name is not None))).item() > 0:
            raise RunError(
                f"{name or 'a tensor of another process'} is NaN or infinite at step {self.step}, so that nothing was "
                f"saved. {self._advice()}"
            )

    def _write(self, folder: Path) -> None:
        """Write what the run needs to continue. All processes take part, the main one writes what they share."""
        is_main = self.accelerator.is_main_process
        failures = []
        for name, state in self._states().items():
            whole = gathered(state, keep=is_main)
            try:
                if is_main:
                    write_state(whole, folder / name)
            except OSError as error:  # to be raised when the other processes wait for nothing
                failures.append(error)
        if failures:
            raise failures[0]
        write_state(random_state(self.accelerator.device), folder / self._random_name())
        if is_main:
            scaler = self.accelerator.scaler
            about = {
                "format": FORMAT,
                "step": self.step,
                "batches_used": self.batches_used,
                "minutes": self._elapsed(),
                "num_processes": self.accelerator.num_processes,
                "settings": record(self._groups),
                "data": self._data,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            (folder / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")

    def _save_model(self, folder: Path) -> None:
        with self.ema_weights(), self._undisturbed():
            self.save(folder)

    def _states(self) -> dict[str, Any]:
        """What all processes share or have shards of, by the names of the files."""
        states: dict[str, Any] = {}
        for index, module in enumerate(self._modules):
            states[_numbered("model", index)] = module_state(self._unwrapped(module), self._keep_frozen)
        for index, optimizer in enumerate(self.optimizers):
            states[_numbered("optimizer", index)] = optimizer.state_dict()
        if self._ema is not None:
            shadows = [
                DTensor.from_local(
                    shadow, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
                )
                if isinstance(own, DTensor)
                else shadow
                for shadow, own in zip(self._ema.shadow_params, self._trained(), strict=True)
            ]
            states["ema.safetensors"] = {"steps": self._ema.optimization_step, "weights": shadows}
        if self._tensors:
            states["tensors.safetensors"] = self._tensors
        return states

    def _load(self, folder: Path) -> None:
        """Continue from where a checkpoint was."""
        if not (folder / "state.json").exists():
            raise ValueError(
                f"{folder} was written by an older version, as pickles, which are not read since they can run code. "
                f"Begin a new run in another folder, from {self.output_dir}/model."
            )
        about = read_json(folder / "state.json")
        if about["format"] != FORMAT:
            raise ValueError(
                f"{folder} has format {about['format']}, this version reads {FORMAT}. Update the package."
            )
        if changed := check_resumable(self._groups, about["settings"]):
            logger.warning("Resuming %s with other settings: %s.", folder, "; ".join(changed))
        for index, module in enumerate(self._modules):
            path = folder / _numbered("model", index)
            load_module(self._unwrapped(module), self._keep_frozen, read_state(path), path)
        for index, optimizer in enumerate(self.optimizers):
            path = folder / _numbered("optimizer", index)
            load_optimizer(optimizer, read_state(path), path)
        if self._ema is not None:
            self._load_ema(folder / "ema.safetensors", was_kept=bool(about["settings"]["ema_decay"]))
        if self._tensors:
            load_tensors(self._tensors, read_state(path := folder / "tensors.safetensors"), path)
        if self.accelerator.scaler is not None and about["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(about["scaler"])
        self.step, self.batches_used, self._minutes = about["step"], about["batches_used"], about["minutes"]
        self._data, self._newest = about["data"], folder
        if about["num_processes"] == self.accelerator.num_processes:
            self._random_state = read_state(folder / self._random_name())
        else:
            logger.warning(
                "Resuming %s with %d processes, not %d: batches continue where they were, random numbers start again.",
                folder,
                self.accelerator.num_processes,
                about["num_processes"],
            )
            set_seed(self.config.seed + 7919 * self.step, device_specific=True)

    def _load_ema(self, path: Path, was_kept: bool) -> None:
        """The EMA of the checkpoint; where it has none, it starts from its weights."""
        assert self._ema is not None
        trained = self._trained()
        if was_kept:
            stored = read_state(path)
            self._ema.optimization_step, shadows = stored["steps"], stored["weights"]
            if [shadow.shape for shadow in shadows] != [own.shape for own in trained]:
                raise ValueError(f"{str(path)!r} holds the EMA of other weights. Train what the run trained before.")
        else:
            shadows = [gathered(own.detach()) for own in trained]
        parts = [laid_out_like(shadow, own.data) for shadow, own in zip(shadows, trained, strict=True)]
        self._ema.shadow_params = [part.to_local() if isinstance(part, DTensor) else part for part in parts]

    def _check_data(self, fingerprint: dict[str, Any] | None) -> None:
        if self._data is not None and fingerprint is not None and (found := differences(self._data, fingerprint)):
            raise ValueError(
                f"the data are not those that the run began with: {'; '.join(found)}. Restore them, or begin a new "
                f"run in another folder, from {self.output_dir}/model."
            )
        self._data = fingerprint or self._data

    def _refuse_pickles(self) -> None:
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            name = kind.value
        elif kind == DistributedType.FSDP and not self.accelerator.is_fsdp2:
            name = "FSDP with `fsdp_version` 1"
        else:
            return
        raise ValueError(
            f"`distributed_type` must be none, a MULTI_ one, or FSDP with `fsdp_version` 2, got {name}. Use "
            "examples/accelerate_configs/fsdp.yaml."
        )

    def _unwrapped(self, module: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(module)

    def _random_name(self) -> str:
        return f"random_{self.accelerator.process_index}.safetensors"

    def _trained(self) -> list[nn.Parameter]:
        """The parameters that have an EMA."""
        return [p for module in self._ema_modules for p in module.parameters() if p.requires_grad]

    def _parameters(self) -> list[nn.Parameter]:
        """The same, and of sharded parameters the part that this process holds."""
        # A parameter that aliases the shard: writing into it writes the sharded one.
        return [nn.Parameter(p.data.to_local()) if isinstance(p.data, DTensor) else p for p in self._trained()]

    # Signals

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main one only
            yield
            return
        owner = os.getpid()

        def request_stop(number: int, frame: Any) -> None:
            if os.getpid() != owner:  # a worker that was forked; Ctrl-C is not for it
                if number == signal.SIGTERM:
                    signal.signal(number, signal.SIG_DFL)
                    os.kill(os.getpid(), number)
                return
            self._stop_requested = True
            signal.signal(signal.SIGINT, previous[signal.SIGINT])  # so that another Ctrl-C interrupts a hung step
            # A scheduler may have ended the workers, too, which PyTorch reports as an error where SIGCHLD arrives.
            if hasattr(signal, "SIGCHLD"):  # not on Windows
                previous.setdefault(signal.SIGCHLD, signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if self.accelerator.is_main_process:
                sys.stderr.write("\nStopping after this step; Ctrl-C interrupts at once, without a checkpoint.\n")

        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
        for number in numbers:
            signal.signal(number, request_stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _numbered(name: str, index: int) -> str:
    return f"{name}.safetensors" if index == 0 else f"{name}_{index}.safetensors"


def budget_used(step: int, minutes: float, max_steps: int, max_minutes: float | None) -> float:
    """The larger fraction of the two budgets that is used up; 1 or more ends the run."""
    by_steps = step / max_steps
    return by_steps if max_minutes is None else max(by_steps, minutes / max_minutes)


def learning_rate_factor(step: int, used: float, schedule: str, warmup_steps: int) -> float:
    """What the peak learning rate is multiplied with at `step` (counted from 0), `used` of the budget gone."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant":
        return warmup
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, used)))
