"""The state of one call of a pipeline. It is a local object, so several threads can call one pipeline at once.

diffusers keeps this state in attributes of the pipeline, and callbacks read and set them there. `CallAttribute` gives
each of these attributes the value of the call that runs in the current thread.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from operator import attrgetter
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


@dataclass(eq=False)
class Call:
    """What a call knows, and what its callbacks may change.

    Attributes:
        scheduler: a copy of the pipeline's, for this call alone.
        guidance_scale, attention_kwargs, eta, generator: as in `SanaPipeline.__call__`.
        has_negative_prompt: False where guidance is an input of the model, as in SANA-Sprint.
        num_timesteps: steps of the loop.
        current_timestep: of the step that runs or ran last.
        interrupt: True ends the loop before the next step.
        pag_scale, pag_adaptive_scale, pag_layers: of perturbed-attention guidance.
        callback: called as `callback(step, timestep, tensors)` after each step.
        callback_inputs: names of the tensors that it gets.
        progress_bar: makes the bar of the loop, as `progress_bar(total=steps)`.
        graphs: `CudaGraphs` of the transformer, or None.
        guidance: the `Guidance` of a guider, which then takes the place of `guidance_scale`; or None.
    """

    scheduler: Any = None
    guidance_scale: float = 1.0
    attention_kwargs: dict[str, Any] | None = None
    eta: float = 0.0
    generator: torch.Generator | list[torch.Generator] | None = None
    has_negative_prompt: bool = True
    num_timesteps: int = 0
    current_timestep: float | None = None
    interrupt: bool = False
    pag_scale: float = 0.0
    pag_adaptive_scale: float = 0.0
    pag_layers: Sequence[str | int] = ()
    callback: Callable[[int, Tensor, dict[str, Any]], dict[str, Any] | None] | None = None
    callback_inputs: Sequence[str] = ("latents",)
    progress_bar: Any = None
    graphs: Any = None
    guidance: Any = None

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompts are run beside the prompts."""
        return self.has_negative_prompt and (self.guidance is not None or self.guidance_scale > 1.0)


# Pipeline, by its id, -> the call on it in the current thread or task. A callback may call another pipeline.
_CURRENT: ContextVar[dict[int, Call]] = ContextVar("current", default={})  # noqa: B039 (never changed in place)
_RUNNING: WeakKeyDictionary[Any, list[Call]] = WeakKeyDictionary()  # pipeline -> its calls in all threads
_LAST: WeakKeyDictionary[Any, Call] = WeakKeyDictionary()  # pipeline -> the call that began or ended last
_GUARD = Lock()


@contextmanager
def running(pipeline: Any, call: Call) -> Iterator[Call]:
    """Within the block, attributes of `pipeline` are those of `call` in this thread."""
    token = _CURRENT.set(_CURRENT.get() | {id(pipeline): call})
    with _GUARD:
        _RUNNING.setdefault(pipeline, []).append(call)
        _LAST[pipeline] = call
    try:
        yield call
    finally:
        _CURRENT.reset(token)
        # Only the numbers are kept.
        call.callback = call.progress_bar = call.generator = call.graphs = call.guidance = None
        with _GUARD:
            _RUNNING[pipeline].remove(call)
            _LAST[pipeline] = call


def current_call(pipeline: Any) -> Call | None:
    """The call on `pipeline` that runs in this thread, or None."""
    return _CURRENT.get().get(id(pipeline))


class CallAttribute:
    """`pipeline._name`, which is `name` of the call in this thread; outside of calls, of the last one.

    Setting it outside of calls changes all calls that run: so a server interrupts them.
    """

    name: str

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removeprefix("_")

    def __get__(self, pipeline: Any, owner: type | None = None) -> Any:
        if pipeline is None:
            return self
        call = current_call(pipeline) or _LAST.get(pipeline)
        if call is None:
            raise AttributeError(f"`{self.name}` is known during and after a call of {type(pipeline).__name__}.")
        return getattr(call, self.name)

    def __set__(self, pipeline: Any, value: Any) -> None:
        call = current_call(pipeline)
        with _GUARD:
            calls = [call] if call else _RUNNING.get(pipeline) or [_LAST.setdefault(pipeline, Call())]
            for each in calls:
                setattr(each, self.name, value)


def read_only(attribute: str, doc: str) -> Any:
    """A public property that reads an underscored attribute, as diffusers' pipelines have them."""
    return property(attrgetter(attribute), doc=doc)
