"""A load test of `examples/ray_serve.py` on loopback: throughput, latency, and whether any request is lost.

    diffusers-sana quantize sana-emoji --out outputs/sana-emoji-int4
    python -m benchmarks.bench_serving --model-4bit outputs/sana-emoji-int4 [--clients 8] [--seconds 40]

Clients ask for one image after another, each for the next when it has the last. Three phases: all is well; a replica
is killed (SIGKILL) in the middle; the server is told to end (SIGTERM) in the middle. A request is lost if it gets
neither its image nor an error that says to try again (503), which the server gives before it accepts a request.
Writes `benchmarks/results/<device>/serving.json`.
"""

import argparse
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, environment, write_results
from tests.two_processes import ROOT


PNG = b"\x89PNG\r\n\x1a\n"
OBJECTS = ("apple", "fox", "panda", "lemon", "penguin", "cat")


def call(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    """Status and body of an answer. Raises OSError or HTTPException if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(port: int, server: subprocess.Popen, seconds: float) -> dict[str, int]:
    """Waits for the server and returns its replicas."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            status, body = call(port, "/health")
            if status == 200:
                return json.loads(body)["replicas"]
        except OSError:
            pass
        time.sleep(5)
    raise TimeoutError("the server does not answer; run it alone to see why: python -m examples.ray_serve")


def metrics(port: int) -> dict[str, float]:
    """What the server counts."""
    lines = call(port, "/metrics")[1].decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def replica_processes(server: int, model: str) -> list[int]:
    """Process ids of the replicas of a model: descendants of the server with Ray's title."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1]
                )
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0 ")
            except OSError:
                continue  # it has ended

    def is_ours(process: int) -> bool:
        while process in parents and process != server:
            process = parents[process]
        return process == server

    # A replica that is computing adds what: "ray::ServeReplica:images:sana-emoji.handle_request".
    is_replica = re.compile(rf":{re.escape(model)}(\.\w+)?$").search
    return [process for process, title in titles.items() if is_replica(title) and is_ours(process)]


class Clients:
    """Threads that ask for images until they are told to stop.

    Args:
        port: of the server.
        models: asked in turn.
        count: threads.
    """

    def __init__(self, port: int, models: list[str], count: int) -> None:
        self.port, self.models = port, models
        self.stopped = threading.Event()
        self.answers: list[tuple[str, float, float]] = []  # what became of each request, when it was sent, and seconds
        self.threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]
        self.started = time.perf_counter()
        for thread in self.threads:
            thread.start()

    def _ask(self, client: int) -> None:
        number = client
        while not self.stopped.is_set():
            body = {
                "prompt": f"a {OBJECTS[number % len(OBJECTS)]} on a blue background",
                "model": self.models[number % len(self.models)],
                "seed": number,
            }
            start = time.perf_counter()
            try:
                status, answer = call(self.port, "/", body)
                outcome = "image" if status == 200 and answer.startswith(PNG) else f"status {status}"
            except ConnectionRefusedError:
                outcome = "connection refused"
            except (OSError, http.client.HTTPException) as error:
                outcome = f"lost: {type(error).__name__}"
            self.answers.append((outcome, start, time.perf_counter() - start))
            number += len(self.threads)
            if outcome in ("status 503", "connection refused"):
                self.stopped.wait(0.2)

    def finish(self) -> dict[str, Any]:
        """Waits for the last answers and sums up."""
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        seconds = time.perf_counter() - self.started
        # After its first refusal the server accepts nothing more, so what its end cuts off then was not accepted.
        refused = min(
            (sent + took for outcome, sent, took in self.answers if outcome == "status 503"), default=math.inf
        )
        outcomes = Counter(
            "cut off after refusals" if outcome.startswith("lost") and sent > refused else outcome
            for outcome, sent, _ in self.answers
        )
        times = sorted(took for outcome, _, took in self.answers if outcome == "image")
        answered = ("image", "status 503", "connection refused", "cut off after refusals")
        return {
            "seconds": round(seconds, 1),
            "requests": len(self.answers),
            "outcomes": dict(outcomes),
            "lost": sum(count for outcome, count in outcomes.items() if outcome not in answered),
            "images_per_second": round(len(times) / seconds, 2),
            "latency_seconds": {f"p{p}": round(percentile(times, p), 2) for p in (50, 90, 95, 99, 100) if times},
        }


def percentile(sorted_values: list[float], p: float) -> float:
    """The smallest of the values that `p` percent of them do not exceed."""
    return sorted_values[max(0, math.ceil(p / 100 * len(sorted_values)) - 1)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=40, help="of each of the first two phases")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--replicas-4bit", type=int, default=1)
    parser.add_argument("--model-4bit", help="saved in 4 bits; default: quantized by each replica at its start")
    parser.add_argument("--cpus-per-replica", type=float, default=1)
    parser.add_argument("--gpus-per-replica", type=float, default=0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--startup", type=float, default=300, help="seconds to wait for the server")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    port = free_port()
    names = ("replicas", "replicas_4bit", "model_4bit", "cpus_per_replica", "gpus_per_replica", "steps", "batch_size")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = ["-m", "examples.ray_serve", "--port", str(port), *options]
    server = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    try:
        started = time.perf_counter()
        replicas = wait_until_ready(port, server, args.startup)
        startup = time.perf_counter() - started
        models = list(replicas)
        for model in models:
            assert call(port, "/", {"prompt": "a fox", "model": model})[0] == 200
        phases = {}

        clients = Clients(port, models, args.clients)
        time.sleep(args.seconds)
        phases["steady"] = clients.finish()
        counts = metrics(port)

        clients = Clients(port, models, args.clients)
        time.sleep(args.seconds / 4)
        os.kill(replica_processes(server.pid, models[0])[0], signal.SIGKILL)
        time.sleep(args.seconds * 3 / 4)
        phases["a replica is killed"] = clients.finish()
        phases["a replica is killed"]["images_generated_again"] = sum(
            value for name, value in metrics(port).items() if name.startswith("diffusers_sana_retries_total")
        )

        clients = Clients(port, models, args.clients)
        time.sleep(args.seconds / 8)
        server.send_signal(signal.SIGTERM)
        code = server.wait(args.startup)
        phases["the server is told to end"] = clients.finish() | {"exit_code": code}
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait(60)

    import ray

    report = environment()
    report["versions"]["ray"] = ray.__version__
    report |= {"clients": args.clients, "server": command, "replicas": replicas, "startup_seconds": round(startup, 1)}
    report["mean_batch_of_an_image"] = {
        model: round(
            counts[f'diffusers_sana_batch_size_sum{{model="{model}"}}']
            / counts[f'diffusers_sana_batch_size_count{{model="{model}"}}'],
            2,
        )
        for model in models
    }
    report["phases"] = phases
    print(json.dumps(report, indent=1))
    print(write_results("serving", report, args.results))


if __name__ == "__main__":
    main()
