"""Clients of the load test, in a process of their own: the server's process has its cores to itself.

    python benchmarks/serve_clients.py PORT RATE COUNT STEPS

Sends COUNT requests with Poisson arrivals at RATE a second, and prints one line of JSON: the seconds until the last
answer, and the latency of each request. Images are not decoded. Only the standard library is imported, so that the
clients cost little.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
import time
from itertools import accumulate

PROMPTS = ["a noto emoji of a red apple", "a dog", "a fluent emoji of a cat on a green background", "一辆绿色的汽车"]


def post(port: int, body: dict | bytes) -> tuple[int, bytes]:
    """Status and content of the answer to one request for images."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    content = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", "/v1/images/generations", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    read = answer.status, answer.read()
    connection.close()
    return read


def send(port: int, rate: float, count: int, steps: int) -> tuple[float, list[float]]:
    """Seconds from the first arrival's clock to the last answer, and the latency of each request from its arrival."""
    draw = random.Random(0)
    arrivals = list(accumulate(draw.expovariate(rate) for _ in range(count)))
    latencies, failed = [0.0] * count, []
    start = time.perf_counter()

    def request(index: int) -> None:
        status, _ = post(port, {"prompt": PROMPTS[index % len(PROMPTS)], "seed": index, "steps": steps})
        latencies[index] = time.perf_counter() - start - arrivals[index]
        if status != 200:
            failed.append(status)

    # a thread begins when its request arrives: waiting ones would cost memory and wake-ups
    threads = [threading.Thread(target=request, args=(index,)) for index in range(count)]
    for thread, arrival in zip(threads, arrivals, strict=True):
        time.sleep(max(0.0, start + arrival - time.perf_counter()))
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"{len(failed)} of {count} requests failed, the first with status {failed[0]}")
    return time.perf_counter() - start, latencies


def main() -> None:
    port, rate, count, steps = sys.argv[1:]
    seconds, latencies = send(int(port), float(rate), int(count), int(steps))
    print(json.dumps({"seconds": seconds, "latencies": latencies}))


if __name__ == "__main__":
    main()
