#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Random requests to llama-server, stock and on Headwise: does every one get the answer that it gets alone?

Prompts share beginnings, some are long, some clients leave in the middle. First each request is asked of a server with
one slot that keeps nothing between requests; then all of them, in random order and several times, of one with --slots,
by as many clients. Greedy answers in company are not those alone to the last token on any memory (a batch of another
size rounds otherwise): the share of equal ones is shown for the stock memory and for ours.
"""
import argparse
import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time


class Server:
    """A llama-server on a port of its own, until the end of the block."""

    def __init__(self, args, slots, memory):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = dict(os.environ)
        if memory:
            environment["LD_PRELOAD"] = os.path.abspath(memory)
        self.process = subprocess.Popen(
            [args.server, "--model", args.model, "--port", str(self.port), "--parallel", str(slots), "--ctx-size",
             str(args.context * slots), "--no-kv-unified", "--threads", str(args.threads), "--no-webui", "--verbosity",
             "4"],
            stdout=self.log, stderr=subprocess.STDOUT, env=environment)

    def __enter__(self):
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                status, _ = self.call("GET", "/health")
                if status == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        self.fail("the server does not answer")

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        if kind is None and self.process.returncode != 0:
            self.fail(f"the server ended with {self.process.returncode}")

    def fail(self, what):
        self.log.flush()
        sys.exit(f"{what}; the end of {self.log.name}:\n{pathlib.Path(self.log.name).read_text()[-2000:]}")

    def text(self):
        return pathlib.Path(self.log.name).read_text(errors="replace")

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def answer(self, request, keep):
        status, body = self.call("POST", "/completion", {**request, "temperature": 0, "cache_prompt": keep})
        if status != 200:
            self.fail(f"a request was answered {status}: {body}")
        return body["content"]

    def leave_early(self, request):
        """Begins to listen and goes away."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request("POST", "/completion", json.dumps({**request, "temperature": 0, "stream": True}),
                               {"Content-Type": "application/json"})
            connection.getresponse().read(1)
        finally:
            connection.close()


def requests_of(text, count, chance):
    """Distinct requests, most of which share a beginning with others."""
    words = text.split()
    beginnings = []
    for length in (0, 20, 60, 200, 400, 900):
        first = chance.randrange(len(words) - length - 1)
        beginnings.append(words[first:first + length])
    made = []
    for _ in range(count):
        first = chance.randrange(len(words) - 40)
        own = words[first:first + chance.randint(3, 40)]
        made.append({"prompt": " ".join(chance.choice(beginnings) + own), "n_predict": chance.randint(1, 16)})
    return made


def measure(args, memory, requests, order):
    """Share of answers that are as alone, and its standard error: a request's answers are alike, so requests count."""
    with Server(args, 1, memory) as alone:
        expected = [alone.answer(request, keep=False) for request in requests]
    answers = [[] for _ in requests]  # of each request: whether as alone
    total = left = 0
    lock = threading.Lock()
    queue = list(order)
    with Server(args, args.slots, memory) as server:
        began = time.monotonic()

        def client():
            nonlocal total, left
            while True:
                with lock:
                    if not queue or server.process.poll() is not None:
                        return
                    idx, leaves = queue.pop()
                if leaves:
                    server.leave_early(requests[idx])
                    with lock:
                        left += 1
                else:
                    answer = server.answer(requests[idx], keep=True)
                    with lock:
                        total += 1
                        answers[idx].append(answer == expected[idx])

        clients = [threading.Thread(target=client) for _ in range(args.slots + 1)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        if queue or total + left != len(order):
            server.fail(f"{total + left} of {len(order)} requests were answered")
        seconds = time.monotonic() - began
    pages = re.findall(r"headwise: (\d+) pages in use at the end", server.text())
    if memory and (not pages or any(int(n) != 0 for n in pages)):
        server.fail(f"pages in use at the end: {pages}, expected 0")
    name = "headwise" if memory else "stock"
    shares = [sum(one) / len(one) for one in answers if one]
    share = statistics.mean(shares)
    error = statistics.stdev(shares) / len(shares) ** 0.5
    print(f"{name:10} {total:6} {left:6} {100 * share:8.1f} % {100 * error:6.1f} {seconds:10.0f}", flush=True)
    return share, error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="llama-server of a llama.cpp with hooks.patch")
    parser.add_argument("--memory", required=True, help="libheadwise_memory.so")
    parser.add_argument("--model", required=True, help="GGUF")
    parser.add_argument("--text", default="/usr/share/common-licenses/GPL-3", help="what prompts are made of")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096, help="tokens a slot")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in (args.server, args.memory, args.model, args.text):
        if not os.path.isfile(path):
            sys.exit(f"{path}: no such file")
    chance = random.Random(args.seed)
    requests = requests_of(pathlib.Path(args.text).read_text(), max(2, args.requests // 5), chance)
    order = [(chance.randrange(len(requests)), chance.random() < 0.1) for _ in range(args.requests)]
    print(f"{'memory':10} {'asked':>6} {'left':>6} {'as alone':>10} {'+-':>6} {'seconds':>10}")
    stock, of_stock = measure(args, None, requests, order)
    ours, of_ours = measure(args, args.memory, requests, order)
    if ours < stock - 2 * (of_stock ** 2 + of_ours ** 2) ** 0.5:
        sys.exit("on Headwise fewer answers are as alone than chance explains")


if __name__ == "__main__":
    main()
