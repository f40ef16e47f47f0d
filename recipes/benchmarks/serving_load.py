"""Requests a second, waiting, memory and ended generations of the server under clients that hold it.

    python recipes/benchmarks/serving_load.py MODEL --clients 48 --seconds 20

Two thirds of the clients ask for completions one after another. Of the others, one third sends half a request
and waits (half-open), one asks for a long stream and does not read it (slow), one asks for a long completion
and leaves after 0.2 s. At the end the processor time of the idle server is measured.
"""

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_genlm", "serve", options.model, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(port, server)
            print(json.dumps(measure(port, server.pid, options.clients, options.seconds), indent=1))
        finally:
            server.terminate()


def wait_for(port: int, server: subprocess.Popen) -> None:
    while server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def measure(port: int, pid: int, n_clients: int, seconds: float) -> dict[str, object]:
    at_start = memory_mib(pid, "VmRSS")
    end = time.monotonic() + seconds
    waits: list[float] = []
    statuses: dict[str, int] = {}
    held = dict.fromkeys(("half_open", "slow", "leaving"), 0)

    def ask() -> None:
        while time.monotonic() < end:
            start = time.monotonic()
            status = complete(port, TOKENS)
            statuses[status] = statuses.get(status, 0) + 1
            if status == "200":
                waits.append(time.monotonic() - start)

    def hold(kind: str) -> None:
        while time.monotonic() < end:
            with socket.create_connection(("localhost", port)) as connection:
                request = request_of(4000, stream=kind == "slow")
                connection.sendall(request[:-20] if kind == "half_open" else request)
                time.sleep(0.2 if kind == "leaving" else 3)
            held[kind] += 1

    kinds = list(held)
    threads = [
        threading.Thread(target=hold, args=(kinds[i // 3 % 3],))
        if i % 3 == 2
        else threading.Thread(target=ask)
        for i in range(n_clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(2)
    before = processor_s(pid)
    time.sleep(5)
    return {
        "clients": n_clients,
        "answers": statuses,
        "requests_per_s": round(len(waits) / seconds, 1),
        "tokens_per_request": TOKENS,
        "median_wait_s": round(statistics.median(waits), 2) if waits else None,
        "longest_wait_s": round(max(waits), 2) if waits else None,
        "connections_held_and_left": held,
        "memory_at_start_mib": at_start,
        "peak_memory_mib": memory_mib(pid, "VmHWM"),
        "processor_s_in_5_idle_s": round(processor_s(pid) - before, 2),
    }


def request_of(max_tokens: int, stream: bool = False) -> bytes:
    body = json.dumps({"prompt": "The value", "max_tokens": max_tokens, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


def complete(port: int, max_tokens: int) -> str:
    body = request_of(max_tokens).partition(b"\r\n\r\n")[2]
    url, headers = f"http://localhost:{port}/v1/completions", {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as answer:
            answer.read()
            return str(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return str(error.code)
    except OSError as error:
        return type(error).__name__


def memory_mib(pid: int, field: str) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) // 1024


def processor_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        return sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13])) / 100


if __name__ == "__main__":
    main()
