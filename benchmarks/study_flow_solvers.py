"""Error against number of model calls, for solvers of a flow whose velocity is known in closed form.

    python benchmarks/study_flow_solvers.py

writes `benchmarks/results/cpu/flow_solvers.json`, plots `docs/images/flow_solvers.webp` and renews the tables in
`docs/scheduler.md` (about two minutes on one core).

The data are mixtures of Gaussians: with `x = (1 - σ) x0 + σ ε` every component stays Gaussian, so the velocity
`E[ε - x0 | x]` needs no model. What a solver does wrong is then all that is measured. Shape legend: B samples, K
components, D dimensions.
"""

import itertools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import matplotlib
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from diffusers_sana.schedulers.scheduling_flow_dpm_solver import FlowDPMSolverScheduler


matplotlib.use("Agg")
from matplotlib import pyplot as plt


ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/cpu/flow_solvers.json"
FIGURE = ROOT / "docs/images/flow_solvers.webp"
PAGE = ROOT / "docs/scheduler.md"
BEGIN, END = "<!-- begin: benchmarks/study_flow_solvers.py -->", "<!-- end: benchmarks/study_flow_solvers.py -->"

SHIFT = 3.0
CALLS = (4, 6, 8, 10, 12, 14, 16, 20, 28, 50)
SEEDS = (0, 1, 2)
NUM_SAMPLES, NUM_COMPONENTS, NUM_DIMENSIONS = 512, 8, 16
REFERENCE_STEPS = 600

FLOWS = {
    "tight": "isotropic components, standard deviation 0.05",
    "wide": "isotropic components, standard deviation 0.3",
    "spectrum": "components with standard deviations 0.7 / k, k = 1 to 16, axes in random order",
    "guided": "`spectrum` with classifier-free guidance 4.5 towards two of the components",
}

BASELINE = "DPM-Solver++ 2 (Sana's recipe)"


class Solver(NamedTuple):
    """How to build the scheduler, and how to plot it."""

    scheduler: Callable[[], Any]
    color: str | None = None  # None: in the tables only
    has_half_end: bool = False  # the grid ends at half the time where the built-in one ends

    def prepared(self, num_steps: int) -> Any:
        """A scheduler ready for `num_steps` steps."""
        scheduler = self.scheduler()
        if self.has_half_end:
            scheduler.set_timesteps(sigmas=np.linspace(0.999, 0.999 / num_steps / 2, num_steps))
        else:
            scheduler.set_timesteps(num_steps)
        return scheduler


def _ours(**options: Any) -> Callable[[], FlowDPMSolverScheduler]:
    return lambda: FlowDPMSolverScheduler(flow_shift=SHIFT, **options)


AB2 = _ours(algorithm_type="adams_bashforth", lower_order_final=False)
AB3 = _ours(algorithm_type="adams_bashforth", lower_order_final=False, solver_order=3)
SOLVERS = {
    "Euler": Solver(lambda: FlowMatchEulerDiscreteScheduler(shift=SHIFT), "0.6"),
    "Heun": Solver(lambda: FlowMatchHeunDiscreteScheduler(shift=SHIFT), "C4"),
    "UniPC 2": Solver(
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        "C2",
    ),
    BASELINE: Solver(_ours(), "C0"),
    "DPM-Solver++ 2, heun": Solver(_ours(solver_type="heun")),
    "DPM-Solver++ 3": Solver(_ours(solver_order=3)),
    "DPM-Solver++ 2, half end": Solver(_ours(), "C0", has_half_end=True),
    "Adams-Bashforth 2, lower_order_final": Solver(_ours(algorithm_type="adams_bashforth")),
    "Adams-Bashforth 2": Solver(AB2, "C1"),
    "Adams-Bashforth 3": Solver(AB3, "C3"),
    "Adams-Bashforth 2, half end": Solver(AB2, "C1", has_half_end=True),
    "Adams-Bashforth 3, half end": Solver(AB3, "C3", has_half_end=True),
}


@dataclass
class MixtureFlow:
    """The exact velocity of a mixture of axis-aligned Gaussians, optionally guided."""

    means: Tensor  # [K, D]
    variances: Tensor  # [K, D]
    class_log_weights: Tensor | None = None  # [B, K], 0 for the components of a sample's class, else -inf
    guidance_scale: float = 1.0

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """`[B, D]` at noise level `sigma`."""
        alpha = 1 - sigma
        variances = alpha**2 * self.variances + sigma**2
        score = (x[:, None] - alpha * self.means) / variances  # [B, K, D]
        log_likelihood = -0.5 * (score.square() * variances + variances.log()).sum(-1)  # [B, K]
        # Of each component: E[ε | x] - E[x0 | x].
        velocities = sigma * score - self.means - alpha * self.variances * score

        def average(log_weights: Tensor) -> Tensor:
            return (log_weights.softmax(-1)[:, None] @ velocities).squeeze(1)

        velocity = average(log_likelihood)
        if self.class_log_weights is None:
            return velocity
        conditional = average(log_likelihood + self.class_log_weights)
        return velocity + self.guidance_scale * (conditional - velocity)


def make_flow(name: str, seed: int) -> tuple[MixtureFlow, Tensor]:
    """The flow called `name`, and its noise `[B, D]`; float64, both from the random numbers of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_COMPONENTS, NUM_DIMENSIONS)
    means = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "tight":
        deviations = torch.full(shape, 0.05, dtype=torch.float64)
    elif name == "wide":
        deviations = torch.full(shape, 0.3, dtype=torch.float64)
    else:
        ranks = [1 + torch.randperm(NUM_DIMENSIONS, generator=generator) for _ in range(NUM_COMPONENTS)]
        deviations = 0.7 / torch.stack(ranks).double()
    flow = MixtureFlow(means, deviations.square())
    if name == "guided":
        first = torch.randint(NUM_COMPONENTS, (NUM_SAMPLES, 1), generator=generator)
        classes = torch.cat([first, (first + 1) % NUM_COMPONENTS], dim=1)  # [B, 2]
        log_weights = torch.full((NUM_SAMPLES, NUM_COMPONENTS), -torch.inf, dtype=torch.float64)
        flow.class_log_weights = log_weights.scatter(1, classes, 0.0)
        flow.guidance_scale = 4.5
    noise = torch.randn(NUM_SAMPLES, NUM_DIMENSIONS, generator=generator, dtype=torch.float64)
    return flow, noise


def integrate(flow: MixtureFlow, x: Tensor, num_steps: int) -> Tensor:
    """Classical fourth-order Runge-Kutta from `σ = 1` to 0, on the shifted grid; `[B, D]`."""
    times = np.linspace(1, 0, num_steps + 1)
    sigmas = SHIFT * times / (1 + (SHIFT - 1) * times)
    for sigma, target in itertools.pairwise(sigmas):
        h = target - sigma
        k1 = flow.velocity(x, sigma)
        k2 = flow.velocity(x + h / 2 * k1, sigma + h / 2)
        k3 = flow.velocity(x + h / 2 * k2, sigma + h / 2)
        k4 = flow.velocity(x + h * k3, target)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def sample(flow: MixtureFlow, scheduler: Any, x: Tensor) -> Tensor:
    """Runs `scheduler` as a pipeline does: the flow sees the published timestep, `[B, D]`."""
    for timestep in scheduler.timesteps:
        velocity = flow.velocity(x, timestep.item() / 1000)
        x = scheduler.step(velocity, timestep, x).prev_sample
    return x


def relative_error(x: Tensor, reference: Tensor) -> float:
    """Mean distance over mean norm."""
    return ((x - reference).norm(dim=1).mean() / reference.norm(dim=1).mean()).item()


def measure() -> dict[str, Any]:
    """All errors, and what is needed to get them again."""
    start = time.process_time()
    rows, reference_errors = [], []
    for flow_name in FLOWS:
        problems = []
        for seed in SEEDS:
            flow, noise = make_flow(flow_name, seed)
            reference = integrate(flow, noise, REFERENCE_STEPS)
            reference_errors.append(relative_error(integrate(flow, noise, REFERENCE_STEPS // 2), reference))
            problems.append((flow, noise, reference))
        for name, solver in SOLVERS.items():
            for calls in CALLS:
                found = []
                for flow, noise, reference in problems:
                    scheduler = solver.prepared(num_steps=(calls + 1) // 2 if name == "Heun" else calls)
                    error = relative_error(sample(flow, scheduler, noise), reference)
                    found.append(float(f"{error:.4g}"))
                rows.append({"flow": flow_name, "solver": name, "calls": len(scheduler.timesteps), "errors": found})
        print(f"{flow_name}: done after {time.process_time() - start:.0f} s")
    return {
        "command": "python benchmarks/study_flow_solvers.py",
        "device": f"cpu ({platform.machine()}), 1 thread, float64",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "numpy": np.__version__,
        },
        "seeds": list(SEEDS),
        "samples": NUM_SAMPLES,
        "reference": f"Runge-Kutta 4, {REFERENCE_STEPS} steps",
        "reference_error": float(f"{max(reference_errors):.2g}"),
        "cpu_seconds": round(time.process_time() - start),
        "rows": rows,
    }


def errors(result: dict[str, Any], flow: str, solver: str) -> dict[int, np.ndarray]:
    """Calls -> the errors of all seeds."""
    rows = (row for row in result["rows"] if (row["flow"], row["solver"]) == (flow, solver))
    return {row["calls"]: np.array(row["errors"]) for row in rows}


def markdown(result: dict[str, Any]) -> str:
    """The tables of `docs/scheduler.md`."""
    columns = (8, 10, 14, 16, 20, 28, 50)
    header = f"| solver | {' | '.join(map(str, columns))} |\n|---|{'---|' * len(columns)}\n"
    one_step_less = {"Heun": 1}  # 2n - 1 calls for n steps: one less than an even number

    text = f"Ratio to {BASELINE}: geometric mean over the four flows and three seeds (largest).\n\n{header}"
    for solver in (solver for solver in SOLVERS if solver != BASELINE):
        cells = []
        for calls in columns:
            ratios = np.concatenate(
                [
                    errors(result, flow, solver)[calls - one_step_less.get(solver, 0)]
                    / errors(result, flow, BASELINE)[calls]
                    for flow in FLOWS
                ]
            )
            cells.append(f"{np.exp(np.log(ratios).mean()):.2f} ({ratios.max():.2f})")
        text += f"| {solver} | {' | '.join(cells)} |\n"

    for flow, description in FLOWS.items():
        text += f"\nRelative error, flow `{flow}`: {description}.\n\n{header}"
        for solver in SOLVERS:
            values = errors(result, flow, solver)
            cells = [f"{values[calls - one_step_less.get(solver, 0)].mean():.4f}" for calls in columns]
            text += f"| {solver} | {' | '.join(cells)} |\n"

    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"""{text}
The columns are model calls (Heun: one call less). "Half end" is the grid described above. Relative error: mean
distance to the reference over mean norm, mean of seeds {result["seeds"]}. Reference: {result["reference"]}, itself
converged to {result["reference_error"]:.0e}. {result["samples"]} samples. Measured on {result["device"]};
{versions}. Command: `{result["command"]}`.
"""


def write_page(result: dict[str, Any]) -> None:
    """Renews what stands between the two markers of `docs/scheduler.md`."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{markdown(result)}\n{END}{after}", encoding="utf-8")


def plot(result: dict[str, Any]) -> None:
    """Four panels, error against calls, log-log."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, constrained_layout=True)
    for axis, flow in zip(axes.flat, FLOWS, strict=True):
        for name, solver in SOLVERS.items():
            if solver.color is None:
                continue
            values = errors(result, flow, name)
            axis.loglog(
                list(values),
                [value.mean() for value in values.values()],
                color=solver.color,
                linestyle="--" if solver.has_half_end else "-",
                linewidth=2.2 if name == BASELINE else 1.4,
                marker="o",
                markersize=3.5,
                label=name,
            )
        axis.set_title(flow)
        axis.set_xticks(CALLS, [str(calls) for calls in CALLS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("model calls")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    result = measure()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result)
    write_page(result)


if __name__ == "__main__":
    main()
