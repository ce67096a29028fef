"""Runs the cases of a benchmark in a worker process, so that a crash, a hang or a broken GPU context costs one case.

The worker serves one case after the other. It is replaced after a case that killed it, that exceeded its time, or that
left the GPU unusable (after an illegal memory access every later call of the process fails).
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Literal


Case = tuple[str, Callable[[], Any]]
Outcome = tuple[
    str, Literal["done", "failed", "not run"], Any
]  # name of the case, what became of it, result or reason

START_SECONDS = 300.0  # imports and the first use of the GPU


def run_isolated(cases: Callable[[], Iterable[Case]], seconds: float, case_seconds: float) -> Iterator[Outcome]:
    """Yields the outcome of every case, as soon as it is known.

    Args:
        cases: module-level function that gives names and functions; the worker calls it. Results must be picklable.
        seconds: no case begins or goes on after this time.
        case_seconds: a case that takes longer fails.

    Raises:
        RuntimeError: the worker cannot even list the cases.
    """
    end = time.monotonic() + seconds
    worker = _Worker(cases)
    try:
        for name in worker.names:
            if time.monotonic() > end:
                yield name, "not run", f"the time of {seconds:.0f} s is over"
                continue
            if not worker.is_usable:
                worker.stop()
                worker = _Worker(cases)
            yield name, *worker.run(name, min(case_seconds, max(0.0, end - time.monotonic())))
    finally:
        worker.stop()


class _Worker:
    """A process that runs cases by name."""

    def __init__(self, cases: Callable[[], Iterable[Case]]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the GPU's state
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cases), daemon=True)
        self._process.start()
        theirs.close()  # so that the worker's death ends the connection
        self.is_usable = True
        state, self.names = self._answer(START_SECONDS)
        if state != "done":
            self.stop()
            raise RuntimeError(f"the worker could not list the cases: {self.names}")

    def run(self, name: str, seconds: float) -> tuple[Any, Any]:
        """What became of a case, with its result or the reason."""
        self._connection.send(name)
        return self._answer(seconds)

    def _answer(self, seconds: float) -> tuple[Any, Any]:
        if not self._connection.poll(seconds):
            self.is_usable = False
            return "failed", f"took longer than {seconds:.0f} s"
        try:
            state, value, self.is_usable = self._connection.recv()
        except EOFError:
            self.is_usable = False
            self._process.join()
            return "failed", f"the process died with exit code {self._process.exitcode}"
        return state, value

    def stop(self) -> None:
        """Ends the process, which may hang, and those that it has started, such as the compilers of Inductor."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # where it does not have its own group yet
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, cases: Callable[[], Iterable[Case]]) -> None:
    os.setpgrp()  # so that it ends with all that it starts
    functions: dict[str, Callable[[], Any]] = {}

    def list_cases() -> list[str]:
        functions.update(cases())
        return list(functions)

    _reply(connection, list_cases)
    while True:
        _reply(connection, functions[connection.recv()])


def _reply(connection: Connection, function: Callable[[], Any]) -> None:
    try:
        answer = ("done", function())
    except Exception as error:  # Triton's errors, for instance, are no RuntimeError
        answer = ("failed", f"{type(error).__name__}: {error}"[:2000])
    connection.send((*answer, _clean_up()))


def _clean_up() -> bool:
    """Frees what the case held; whether the GPU still answers."""
    gc.collect()
    torch = sys.modules.get("torch")  # the cases import it, or do without
    if torch is None:
        return True
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
