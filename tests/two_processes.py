"""Runs a script, such as a test module, in two processes (gloo, on a CPU)."""

import atexit
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]


def run_in_two(script: str | Path, *arguments: str | Path) -> list[str]:
    """Runs `script` as `torchrun` would, and returns what the processes print. Raises where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
        environment |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    printed = []
    try:
        for process in processes:
            told, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            printed.append(told)
        return printed
    finally:
        for process in processes:
            process.kill()  # one that waits for the other


def join() -> int:
    """In one of the two processes: meets the other. Returns 0 or 1."""
    # diffusers' `enable_parallelism` divides by the number of accelerators, which is 0 on a CPU.
    torch.accelerator.device_count = lambda: 1
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    # Or threads of the group may abort the process at its end: "terminate called without an active exception".
    atexit.register(torch.distributed.destroy_process_group)
    return torch.distributed.get_rank()
