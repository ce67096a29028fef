"""Flow-DPM-Solver: the multistep sampler of Sana, with every scalar of a step computed before the first step.

Shape legend: B batch, `...` any further axes of the latents; n steps, numbered 0 to n - 1.
"""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_sana.checkpoint_files import named
from diffusers_sana.checks import check_flag, check_integer, check_number
from diffusers_sana.kernels.guided_solver_step import guided_solver_step


LARGEST_SHIFT = 1000.0  # above, noise levels are all 1 in fp32
MOST_STEPS = 100_000

# What a config of another scheduler may say about features that a flow has no use for, or that we do not have.
_ALLOWED_IN_CONFIG: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear"),
    "invert_sigmas": (False,),
    "rescale_betas_zero_snr": (False,),
    "shift_terminal": (None,),
    "stochastic_sampling": (False,),
    "thresholding": (False,),
    "trained_betas": (None,),
    "use_beta_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_karras_sigmas": (False,),
    "use_lu_lambdas": (False,),
}


class _StepRule(NamedTuple):
    """`x' = sample * x + sum_k predictions[k] * p_k + noise * z`, with `p_0` the newest prediction."""

    sample: float
    predictions: tuple[float, ...]
    noise: float = 0.0


class FlowDPMSolverScheduler(SchedulerMixin, ConfigMixin):
    """Multistep solver for flow-matching models: `x = (1 - σ) x0 + σ ε`, the model predicts `v = ε - x0`.

    A drop-in for `DPMSolverMultistepScheduler` with `use_flow_sigmas=True`: it loads the same configs, returns the
    same samples and saves configs that diffusers loads. `step` reads Python floats prepared by `set_timesteps` and
    never waits for the device.

    With `x0_k = x_k - σ_k v_k`, `λ = ln((1 - σ) / σ)`, `h = λ' - λ`, `A = σ' / σ` and `r = h_previous / h`, a step
    from `σ` to `σ'` (primed: after the step) is

        order 1:            x' = A x + (1 - A) x0_0                                  which is Euler: x + (σ' - σ) v
        order 2, midpoint:  x' = A x + (1 - A) (x0_0 + D / 2)                        D = (x0_0 - x0_1) / r
        order 2, heun:      x' = A x + (1 - A) x0_0 + ((1 - σ') - (1 - A) / h) D
        order 3:            the same with a second difference, see `_dpm_rule`

    from Sana (https://arxiv.org/abs/2410.10629, section 3.2) and DPM-Solver++ (https://arxiv.org/abs/2211.01095).
    The first steps run at the order their history allows, and a step to `σ' = 0` at order 1 because `h` is infinite.

    `algorithm_type="adams_bashforth"` integrates the velocity itself: `x' = x + ∫ P(σ) dσ` from `σ` to `σ'`, where
    `P` is the polynomial through the last `solver_order` velocities (variable-step Adams-Bashforth). Nothing is
    infinite at `σ' = 0`, so the last step, the longest and the one that makes most of the error, keeps its order.
    `docs/scheduler.md` has the measurements. diffusers does not know this algorithm and refuses a config with it.

    Args:
        num_train_timesteps: What the model calls time 1; timesteps are `num_train_timesteps * σ`, truncated.
        solver_order: 1, 2 or 3.
        prediction_type: `"flow_prediction"`; recorded for diffusers.
        algorithm_type: `"dpmsolver++"`, `"sde-dpmsolver++"` (orders 1 and 2; fresh noise every step) or
            `"adams_bashforth"`.
        solver_type: `"midpoint"` or `"heun"`: the second-order rule of the two DPM-Solver algorithms.
        lower_order_final: Below 15 steps, run the last step at order 1 and the one before at order 2 at most.
        euler_at_final: Run the last step at order 1.
        use_flow_sigmas: True; recorded for diffusers.
        flow_shift: `s` in `σ = s u / (1 + (s - 1) u)`, the noise level at uniform time `u`. Sana uses 3.
        final_sigmas_type: `"zero"`, or `"sigma_min"`: stop at `sqrt(β / (1 - β))`, `β = beta_start`.
        use_dynamic_shifting: Take the shift from `set_timesteps(mu=...)`: `s = exp(mu)`.
        time_shift_type: `"exponential"`.
        beta_start: Only for `final_sigmas_type="sigma_min"`.

    Raises:
        TypeError, ValueError: for a value not listed above.
    """

    _compatibles = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]
    order = 1
    init_noise_sigma = 1.0
    config: Any  # a `FrozenDict`, which reads like a namespace; typed as a plain dict in the base class
    num_inference_steps: int | None
    _levels: list[float]  # `sigmas` on the host
    _rules: list[list[_StepRule]]  # one list per step, one rule per order, from order 1
    _predictions: list[Tensor]  # of earlier steps, newest first: data predictions, or velocities for Adams-Bashforth
    _step_index: int | None
    _begin_index: int | None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        solver_order: int = 2,
        prediction_type: str = "flow_prediction",
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_flow_sigmas: bool = True,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        beta_start: float = 0.0001,
    ):
        check_integer("num_train_timesteps", num_train_timesteps)
        check_integer("solver_order", solver_order)
        _check_choice("solver_order", solver_order, (1, 2, 3))
        _check_choice("prediction_type", prediction_type, ("flow_prediction",))
        _check_choice("algorithm_type", algorithm_type, ("dpmsolver++", "sde-dpmsolver++", "adams_bashforth"))
        _check_choice("solver_type", solver_type, ("midpoint", "heun"))
        flags = {"lower_order_final": lower_order_final, "euler_at_final": euler_at_final}
        flags |= {"use_flow_sigmas": use_flow_sigmas, "use_dynamic_shifting": use_dynamic_shifting}
        for name, value in flags.items():
            check_flag(name, value)
        _check_choice("use_flow_sigmas", use_flow_sigmas, (True,))
        _check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        if use_dynamic_shifting:
            _check_choice("time_shift_type", time_shift_type, ("exponential",))
        if algorithm_type == "sde-dpmsolver++":
            _check_choice("solver_order", solver_order, (1, 2), " with `algorithm_type='sde-dpmsolver++'`")
        check_number("flow_shift", flow_shift, above=0, at_most=LARGEST_SHIFT)
        check_number("beta_start", beta_start, above=0, at_most=1)
        # Other schedulers have other defaults, so all our values count as given when they read this config.
        self.register_to_config(_use_default_values=[])

        self.num_inference_steps = None
        self._set_schedule(_uniform_times(num_train_timesteps, num_train_timesteps), shift=flow_shift)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads the config of a folder or the Hub; arguments are those of `SchedulerMixin.from_pretrained`.

        Raises:
            OSError: there is no config, or a damaged one.
            ValueError: naming the file and the field that cannot be meant.
        """
        with named(Path(str(pretrained_model_name_or_path), subfolder or "", cls.config_name)):
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, return_unused_kwargs, **kwargs)

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Builds the scheduler from its own config or from one of a compatible scheduler.

        Args:
            config: `scheduler.config` or the dict of a `scheduler_config.json`. The `shift` of a flow-matching Euler
                scheduler is read as `flow_shift`, the `solver_type` of UniPC as `"midpoint"`.
            return_unused_kwargs: Also return what no argument consumed.
            **kwargs: Override values of `config`.

        Raises:
            TypeError: `config` is not a dict.
            ValueError: `config` asks for something other than a flow, or for a feature not supported here.
        """
        if not isinstance(config, dict):
            raise TypeError(
                f"`config` must be a dict such as `scheduler.config`, got {type(config).__name__}. "
                "Use `from_pretrained` for a folder or a repository."
            )
        # Values that were defaults of another class would otherwise be replaced by our defaults.
        config = {key: kwargs.pop(key, value) for key, value in config.items() if key != "_use_default_values"}
        if "shift" in config:
            shift = config.pop("shift")
            config.setdefault("flow_shift", shift)
        if config.get("solver_type") in ("bh1", "bh2"):
            config["solver_type"] = "midpoint"
        for name, allowed in _ALLOWED_IN_CONFIG.items():
            if name in config:
                _check_choice(name, config[name], allowed)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @property
    def step_index(self) -> int | None:
        """The number of the next step, `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The number of the step to begin with, `None` unless `set_begin_index` was called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins with step `begin_index`, as image-to-image pipelines do. `set_timesteps` forgets it."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Lays out the steps and computes every scalar they need. Starts a new run.

        Exactly one of `num_inference_steps`, `timesteps` and `sigmas` must be given.

        Args:
            num_inference_steps: Steps of the built-in grid, uniform in `u` from `1 - 1 / num_train_timesteps`.
            device: Where `self.timesteps` goes. `self.sigmas` stays on the CPU.
            mu: Log of the shift; required with `use_dynamic_shifting`, refused without.
            timesteps: What the model is to see, in `(0, num_train_timesteps]`, decreasing. Not shifted:
                `set_timesteps(timesteps=...)` accepts what another run published as `scheduler.timesteps`.
            sigmas: Noise levels before the shift, in `(0, 1]`, decreasing, as the other flow schedulers of diffusers
                take them; without the final one.

        Raises:
            ValueError: none or several grids were given, or a grid that does not decrease.
        """
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "Exactly one of `num_inference_steps`, `timesteps` and `sigmas` must be given, "
                f"got {sorted(given) or 'none'}."
            )
        if (mu is not None) != self.config.use_dynamic_shifting:
            raise ValueError(
                f"`mu` must be {'a number' if self.config.use_dynamic_shifting else 'None'} because "
                f"`use_dynamic_shifting` is {self.config.use_dynamic_shifting}, got {mu}."
            )
        shift = self.config.flow_shift
        if mu is not None:
            check_number("mu", mu, at_least=-math.log(LARGEST_SHIFT), at_most=math.log(LARGEST_SHIFT))
            shift = math.exp(mu)

        if num_inference_steps is not None:
            check_integer("num_inference_steps", num_inference_steps, at_most=MOST_STEPS)
            self._set_schedule(_uniform_times(num_inference_steps, self.config.num_train_timesteps), shift, device)
        elif sigmas is not None:
            self._set_schedule(_checked_grid("sigmas", sigmas, upper=1.0), shift, device)
        else:
            grid = _checked_grid("timesteps", timesteps, upper=self.config.num_train_timesteps)
            self._set_schedule(grid / self.config.num_train_timesteps, shift=1.0, device=device, timesteps=grid)

        self.num_inference_steps = len(self.timesteps)
        levels = self.sigmas.tolist()
        if levels[-1] >= levels[-2]:
            raise ValueError(
                f"The last noise level of the grid must be above the final one, {levels[-1]:.4g}, got "
                f"{levels[-2]:.4g}. Take fewer steps or `final_sigmas_type='zero'`."
            )
        if any(level <= following for level, following in pairwise(levels)):
            raise ValueError(
                f"{self.num_inference_steps} noise levels with a shift of {shift:.4g} must differ in fp32. Take fewer"
                " steps or a smaller `flow_shift`."
            )
        self._rules = [
            [self._rule(levels, index, order) for order in range(1, self._max_order(levels, index) + 1)]
            for index in range(self.num_inference_steps)
        ]

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns `sample`: a flow needs no scaling. Other schedulers do, so pipelines may call this."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step towards the data.

        Args:
            model_output: The velocity `v` at `sample`, `[B, ...]`.
            timestep: Tells the first step of a run where to begin, unless `set_begin_index` has. An element of
                `self.timesteps` (or a slice of it) is recognised without reading the device; any other tensor is
                read once. Later steps count on.
            sample: The current `x`, `[B, ...]`.
            generator: Source of the noise of `"sde-dpmsolver++"`.
            variance_noise: That noise itself, `[B, ...]`.
            return_dict: Whether to return a `SchedulerOutput` or a tuple of one tensor.

        Returns:
            The next `x`, computed in fp32 at least, in the dtype that `model_output` and `sample` promote to.

        Raises:
            ValueError: `set_timesteps` was not called, or all its steps are done.
        """
        return self._advance(model_output, timestep, sample, None, generator, variance_noise, return_dict)

    def step_guided(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Classifier-free guidance and `step` in one: steps with `v = u + guidance_scale * (c - u)`.

        Args:
            model_output: The velocities `u` without and `c` with the prompt, in this order, `[2 * B, ...]`. Guidance
                is computed in fp32 at least, whatever their dtype.
            guidance_scale: Weight of the prompt; 1 is `c` alone.
            timestep, sample, generator, variance_noise, return_dict: As for `step`; `sample` is `[B, ...]`.

        Returns:
            As `step`.

        Raises:
            TypeError: `guidance_scale` is not a number.
            ValueError: it is not finite; `model_output` is not two batches of velocities of the samples; or as `step`.
        """
        check_number("guidance_scale", guidance_scale)
        expected = (2 * sample.shape[0], *sample.shape[1:])
        if model_output.shape != expected:
            raise ValueError(
                f"`model_output` must be {list(expected)}, twice the batch of `sample`, got "
                f"{list(model_output.shape)}. Without guidance, call `step`."
            )
        return self._advance(
            model_output, timestep, sample, float(guidance_scale), generator, variance_noise, return_dict
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`(1 - σ) original_samples + σ noise`.

        Args:
            original_samples, noise: `[B, ...]`.
            timesteps: `[B]` or `[1]`; each stands for the `σ` of the nearest entry of `self.timesteps`. After
                `set_begin_index` the level where the run stands is used instead, as image-to-image and inpainting
                pipelines expect.

        Returns:
            `[B, ...]` in the dtype of `original_samples`.
        """
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        sigma: float | Tensor
        if self._begin_index is not None:
            sigma = self._levels[self._begin_index if self._step_index is None else self._step_index]
        else:
            device = original_samples.device
            distance = self.timesteps.to(device)[None, :] - timesteps.to(device).reshape(-1, 1)  # [B, n]
            sigma = self.sigmas.to(device, dtype)[distance.abs().argmin(dim=1)]
            sigma = sigma.reshape(-1, *[1] * (original_samples.ndim - 1))  # [B, 1, ...]
        return ((1 - sigma) * original_samples.to(dtype) + sigma * noise.to(dtype)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and order of arguments that the flow-matching schedulers use."""
        return self.add_noise(sample, noise, timestep)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The first position of `timestep` in `schedule_timesteps`, by default `self.timesteps`. Reads the device.

        Raises:
            ValueError: it is not there.
        """
        schedule = (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist()
        value = timestep.item() if isinstance(timestep, Tensor) else timestep
        if value not in schedule:
            raise ValueError(f"`timestep` must be one of `scheduler.timesteps`, {schedule}, got {value}.")
        return schedule.index(value)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _advance(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        guidance_scale: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: Tensor | None,
        return_dict: bool,
    ) -> SchedulerOutput | tuple[Tensor]:
        if self.num_inference_steps is None:
            raise ValueError("`step` was called before `set_timesteps`. Call `set_timesteps` first.")
        if self._step_index is None:
            self._step_index = self._first_index(timestep)
        if self._step_index >= self.num_inference_steps:
            raise ValueError(
                f"`step` was called after the last of {self.num_inference_steps} steps. "
                "Call `set_timesteps` to start a new run."
            )
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        sample = sample.to(torch.promote_types(dtype, torch.float32))

        is_velocity = self.config.algorithm_type == "adams_bashforth"
        rules = self._rules[self._step_index]
        rule = rules[min(len(rules), 1 + len(self._predictions)) - 1]
        prev_sample, prediction = guided_solver_step(
            model_output,
            sample,
            self._predictions[: len(rule.predictions) - 1],
            guidance_scale=guidance_scale,
            sigma=None if is_velocity else self._levels[self._step_index],
            sample_weight=rule.sample,
            prediction_weights=rule.predictions,
        )
        self._predictions = [prediction, *self._predictions][: self.config.solver_order - 1]
        if self.config.algorithm_type == "sde-dpmsolver++":
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=torch.float32
                )
            prev_sample.add_(variance_noise, alpha=rule.noise)

        self._step_index += 1
        prev_sample = prev_sample.to(dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _set_schedule(
        self,
        times: np.ndarray,
        shift: float,
        device: str | torch.device | None = None,
        timesteps: np.ndarray | None = None,
    ) -> None:
        """From uniform times `[n]`: `sigmas`, `[n + 1]` fp32, and `timesteps`, `[n]` int64. Forgets the last run."""
        levels = shift * times / (1 + (shift - 1) * times)
        if timesteps is None:
            timesteps = levels * self.config.num_train_timesteps
        self.sigmas = torch.from_numpy(np.append(levels, self._final_sigma())).to(torch.float32)
        self.timesteps = torch.from_numpy(timesteps).to(torch.int64).to(device)
        # fp32 rounding included: the scalars of a step belong to the levels that are published.
        self._levels = self.sigmas.tolist()
        self._rules = []
        self._predictions = []
        self._step_index = None
        self._begin_index = None

    def _final_sigma(self) -> float:
        if self.config.final_sigmas_type == "zero":
            return 0.0
        # In fp32, where 1 - β loses digits: diffusers does, and the difference would show in the samples.
        alpha = 1 - torch.tensor(self.config.beta_start, dtype=torch.float32)
        return ((1 - alpha) / alpha).sqrt().item()

    def _first_index(self, timestep: float | Tensor) -> int:
        if self._begin_index is not None:
            return self._begin_index
        if isinstance(timestep, Tensor):
            ours = self.timesteps.untyped_storage().data_ptr()
            if timestep.untyped_storage().data_ptr() == ours:  # a view: its offset is its position
                return int(timestep.storage_offset())
        return self.index_for_timestep(timestep)

    def _max_order(self, levels: list[float], index: int) -> int:
        """The highest order at which step `index` may run."""
        num_steps = len(levels) - 1
        order = min(self.config.solver_order, index + 1)
        is_short = self.config.lower_order_final and num_steps < 15
        if index == num_steps - 1:
            is_infinite = levels[-1] == 0 and self.config.algorithm_type != "adams_bashforth"
            return 1 if is_short or is_infinite or self.config.euler_at_final else order
        return min(order, 2) if index == num_steps - 2 and is_short else order

    def _rule(self, levels: list[float], index: int, order: int) -> _StepRule:
        past = levels[max(index - order + 1, 0) : index + 1][::-1]  # newest first
        if self.config.algorithm_type == "adams_bashforth":
            return _adams_bashforth_rule(past, levels[index + 1])
        is_stochastic = self.config.algorithm_type == "sde-dpmsolver++"
        return _dpm_rule(past, levels[index + 1], self.config.solver_type, is_stochastic)


def _dpm_rule(past: list[float], target: float, solver_type: str, is_stochastic: bool) -> _StepRule:
    """The DPM-Solver++ step to `target` from `past[0]`; the order is the number of levels in `past`.

    With `D1_k = (x0_k - x0_{k+1}) / r_k`, `r_k = h_{k-1} / h` for earlier log-SNR steps `h_{k-1}`:
    `x' = A x + c0 x0_0 + c1 D1 + c2 D2`, where `D1 = D1_0` at order 2, and at order 3
    `D1 = D1_0 + r_0 D2`, `D2 = (D1_0 - D1_1) / (r_0 + r_1)`.

    The stochastic variant replaces `h` by `2 h` in the weights. Level 1 has `λ = -∞`; the limits come out right.
    """
    h = _log_snr(target) - _log_snr(past[0])
    decay = 2 * h if is_stochastic else h
    alpha = 1 - target
    c0 = -alpha * math.expm1(-decay)
    sample = target / past[0] * (math.exp(-h) if is_stochastic else 1.0)
    noise = target * math.sqrt(-math.expm1(-2 * h)) if is_stochastic else 0.0
    if len(past) == 1:
        return _StepRule(sample, (c0,), noise)

    r0 = (_log_snr(past[0]) - _log_snr(past[1])) / h
    if len(past) == 2:
        d0 = (c0 / 2 if solver_type == "midpoint" else alpha - c0 / decay) / r0
        return _StepRule(sample, (c0 + d0, -d0), noise)

    r1 = (_log_snr(past[1]) - _log_snr(past[2])) / h
    c1 = alpha - c0 / h
    # The exact exponential integrator has twice this; the published solver and diffusers have this.
    c2 = alpha / 2 - (alpha * h - c0) / h**2
    curvature = (r0 * c1 + c2) / (r0 + r1)
    d0, d1 = (c1 + curvature) / r0, -curvature / r1
    return _StepRule(sample, (c0 + d0, d1 - d0, -d1), noise)


def _adams_bashforth_rule(past: list[float], target: float) -> _StepRule:
    """The integral from `past[0]` to `target` of the polynomial through the velocities at `past`."""
    h = target - past[0]
    if len(past) == 1:
        return _StepRule(1.0, (h,))

    a = past[0] - past[1]
    if len(past) == 2:
        slope = h**2 / (2 * a)
        return _StepRule(1.0, (h + slope, -slope))

    b = past[0] - past[2]
    return _StepRule(
        1.0,
        (
            h + h**2 * (h / 3 + (a + b) / 2) / (a * b),
            -(h**2) * (h / 3 + b / 2) / (a * (b - a)),
            h**2 * (h / 3 + a / 2) / (b * (b - a)),
        ),
    )


def _log_snr(sigma: float) -> float:
    if sigma == 0:
        return math.inf
    return -math.inf if sigma == 1 else math.log1p(-sigma) - math.log(sigma)


def _uniform_times(num_steps: int, num_train_timesteps: int) -> np.ndarray:
    """`[num_steps]` times from `1 - 1 / num_train_timesteps` down, 0 left out.

    In the operations of diffusers: timesteps are truncated, so the last bit of a time can move one by 1.
    """
    return (1.0 - np.linspace(1.0, 1.0 / num_train_timesteps, num_steps + 1))[:0:-1]


def _checked_grid(name: str, values: Any, upper: float) -> np.ndarray:
    grid = np.asarray(values, dtype=np.float64)
    if grid.ndim != 1 or grid.size == 0 or not (grid[0] <= upper and grid[-1] > 0 and (np.diff(grid) < 0).all()):
        raise ValueError(
            f"`{name}` must be a non-empty, strictly decreasing list within (0, {upper}], got {grid.tolist()}. "
            "Leave the final 0 out; the scheduler appends it."
        )
    return grid


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...], condition: str = "") -> None:
    if value not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(
            f"`{name}` must be {choices}{condition} for FlowDPMSolverScheduler, got {value!r}. "
            "Change it, or take the diffusers scheduler that has this option."
        )
