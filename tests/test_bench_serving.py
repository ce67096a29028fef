"""The load test of the server: how it counts, against a server that answers in every way there is."""

import http.server
import os
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.bench_serving import PNG, Clients, free_port, metrics, percentile, replica_processes


@pytest.fixture
def server():
    """Answers the n-th request by the n-th of `answers`: a status, or None to break the connection."""
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = answers.pop(0) if answers else 200
            if answer is None:
                self.close_connection = True
                return
            self.send_response(answer)
            self.end_headers()
            self.wfile.write(PNG if answer == 200 else b"{}")

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'# HELP a\na_total{model="x"} 3.0\nb 1e3\n')

        def log_message(self, *arguments):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening.server_port, answers
    listening.shutdown()
    listening.server_close()


def test_every_request_is_counted(server):
    port, answers = server
    answers += [500, None, 503, None, 200]
    clients = Clients(port, ["x"], 1)
    time.sleep(0.6)
    report = clients.finish()
    outcomes = report["outcomes"]
    for outcome in ("status 503", "status 500", "lost: RemoteDisconnected", "cut off after refusals"):
        assert outcomes[outcome] == 1
    assert report["requests"] == sum(outcomes.values())
    assert report["lost"] == 2  # an error after acceptance, and no answer
    assert outcomes["image"] / report["seconds"] == pytest.approx(report["images_per_second"], rel=0.1)
    assert metrics(port) == {'a_total{model="x"}': 3.0, "b": 1000.0}


def test_a_server_that_has_ended_loses_nothing():
    clients = Clients(free_port(), ["x"], 1)
    time.sleep(0.3)
    report = clients.finish()
    assert report["lost"] == 0
    assert set(report["outcomes"]) == {"connection refused"}
    assert report["latency_seconds"] == {}


def test_percentiles():
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([3.0], 50) == 3.0


def test_replicas_are_descendants_with_rays_title():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()', 'ray::ServeReplica:images:x.f'])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while not (found := replica_processes(parent.pid, "x")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(found) == 1
        assert found[0] != parent.pid
        assert replica_processes(os.getpid(), "y") == []
        assert replica_processes(found[0] + 1, "x") == []
    finally:
        parent.stdin.close()
        parent.wait()
