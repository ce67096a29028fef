"""Runs a script, such as a test module, in two processes (gloo, on a CPU)."""

import atexit
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
SECONDS = 600  # a process that waits for the other is ended after this time


def run_in_two(script: str | Path, *arguments: str | Path, fresh: bool = False) -> list[str]:
    """Runs `script` as `torchrun` would, and returns what the processes print. Raises where one of them fails.

    Args:
        fresh: whether each process starts by itself, with its own order of sets. Otherwise a process imports what the
            script imports, which takes several seconds, and forks into the two.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.two_processes", folder, "fresh" if fresh else "forked", script]
        failed = subprocess.run([*map(str, command), *map(str, arguments)], env=environment).returncode
        printed, errors = (
            [Path(folder, f"{stream}{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
            for stream in ("stdout", "stderr")
        )
    assert not failed, "\n".join(errors)
    return printed


def join() -> int:
    """In one of the two processes: meets the other. Returns 0 or 1."""
    import torch  # the process that starts the two does without

    # diffusers' `enable_parallelism` divides by the number of accelerators, which is 0 on a CPU.
    torch.accelerator.device_count = lambda: 1
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    # Or threads of the group may abort the process at its end: "terminate called without an active exception".
    atexit.register(torch.distributed.destroy_process_group)
    return torch.distributed.get_rank()


def main(folder: str, kind: str, script: str, *arguments: str) -> None:
    """Starts the two processes, ends both when one fails, and exits with 1 then."""
    if kind == "forked":
        from diffusers_sana import SanaPipeline  # noqa: F401  (and what `script` itself imports)

        runpy.run_path(script)
    processes = set()
    for rank in ("0", "1"):
        process = os.fork()
        if process == 0:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            for stream in (sys.stdout, sys.stderr):
                name = stream.name.strip("<>")
                os.dup2(os.open(f"{folder}/{name}{rank}", os.O_WRONLY | os.O_CREAT), stream.fileno())
            signal.alarm(SECONDS)
            if kind == "fresh":
                os.execv(sys.executable, [sys.executable, script, *arguments])
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
            return
        processes.add(process)
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status:
            for other in processes:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
