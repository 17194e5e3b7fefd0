"""What the benchmark runs beside the proxy, each in a process of its own:

    peers.py provider PORT        answers canned bytes, whole or streamed, on kept connections
    peers.py naive PORT URL       the naive proxy: http.server and urlopen, nothing else
    peers.py original URL         the Rust original, where `import iron_cage` works
    peers.py keys URL             what the original asks for a key
    peers.py load PORT CONNECTIONS REQUESTS KIND PID     loads a port; prints one JSON line

KIND may be "CLIENT on API" or "CLIENT on API, streamed": one of the nine pairs of dialects.
"""
import http.server
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "unit")]

from screenshots import conversation

CHUNKS = 200
PACED_CHUNKS, PACE_S = 30, 0.1
USAGE = {"prompt_tokens": 60, "completion_tokens": 72, "total_tokens": 132}
BODY = json.dumps({
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 600},
                 "finish_reason": "stop"}], "usage": USAGE}).encode()
WHOLE = (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
         % len(BODY)) + BODY
SSE_HEAD = (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n")


def event(number, usage=None):
    choices = [] if usage else [{"index": 0, "delta": {"content": f"word {number} "},
                                 "logprobs": None, "finish_reason": None}]
    data = b"data: %b\n\n" % json.dumps({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1,
        "model": "gpt-4o-mini", "choices": choices, "usage": usage}).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM = [event(number) for number in range(CHUNKS)] + [
    event(0, USAGE), b"e\r\ndata: [DONE]\n\n\r\n", b"0\r\n\r\n"]


def answers():
    """{path: (whole, streamed)} in the three APIs, of CHUNKS words, as bytes on the wire."""
    from dialects import PATHS
    from vendor_answers import Answer, Say, answer_of, counted
    says = [Say("".join(f" word{number}" for number in range(CHUNKS)))]
    made = {}
    for api, path in PATHS.items():
        asked = {"model": "gpt-4o-mini", "stream_options": {"include_usage": True}}
        whole, streamed = (answer_of(api, {**asked, "stream": stream}, Answer(
            says, counted(says, 60))) for stream in (False, True))
        body = whole.body
        made[path.encode()] = (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body),
            [SSE_HEAD, *(b"%x\r\n%b\r\n" % (len(step), step) for step in streamed.steps),
             b"0\r\n\r\n"])
    return made


def pace(sock):
    """A stream of PACED_CHUNKS, each with the time when it was sent, PACE_S apart."""
    sock.sendall(SSE_HEAD)
    for _ in range(PACED_CHUNKS):
        data = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}],"sent":%.6f}\n\n' \
            % time.time()
        sock.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        time.sleep(PACE_S)
    for part in STREAM[-3:]:
        sock.sendall(part)


def provide(port):
    in_dialects = answers()

    def serve(sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = sock.makefile("rb")
        for line in iter(reader.readline, b""):
            path, length = line.split(b" ")[1], 0
            for line in iter(reader.readline, b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            body = reader.read(length)
            whole, streamed = in_dialects.get(path, (b"", []))
            if b"in dialects" in body:
                for part in streamed if b'"stream": true' in body else [whole]:
                    sock.sendall(part)
            elif b'"paced"' in body:
                pace(sock)
            elif b'"stream": true' in body:
                sock.sendall(SSE_HEAD)
                for chunk in STREAM:
                    sock.sendall(chunk)
            else:
                sock.sendall(WHOLE)

    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        print("ready", flush=True)
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def proxy_naively(port, url):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = urllib.request.Request(url + self.path, body, {
                "Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers["Content-Type"])
                if answer.headers["Content-Length"] is not None:
                    data = answer.read()
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    return
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while data := answer.read1(65536):
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 1024

    server = Server(("127.0.0.1", port), Handler)
    print("ready", flush=True)
    server.serve_forever()


def run_original(url):
    """The LlmRouter of PyPI's iron-cage 0.2.0, with its log going nowhere.

    With a key of its own it knows no provider but api.openai.com, so that the key and the URL come
    from a stand-in for its server: a process of its own, since the constructor waits for its
    answer with the interpreter's lock held.
    """
    server = subprocess.Popen([sys.executable, __file__, "keys", url], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    told = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from iron_cage import LlmRouter
    router = LlmRouter(api_key="ic_bench_0123456789", cache_ttl_seconds=10 ** 9, budget=1000.0,
                       server_url=server.stdout.readline().strip())
    while True:                            # its constructor may return before the port is open
        try:
            socket.create_connection(("127.0.0.1", router.port)).close()
            break
        except OSError:
            time.sleep(0.01)
    os.write(told, b"http://127.0.0.1:%d\n" % router.port)
    threading.Event().wait()


def serve_keys(url):
    """What the original asks its server for, until standard input ends."""
    class KeyServer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            data = json.dumps({"provider_key": "sk-bench", "provider": "openai", "base_url": url,
                               "budget_granted": 10 ** 9, "lease_id": "lease"}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), KeyServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    sys.stdin.read()


def cpu_s(pid):
    """CPU seconds of a process so far; None where /proc does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_kb(pid, which):
    """VmRSS or VmHWM (the most so far) of a process; None where /proc does not tell."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(which))
    except (OSError, StopIteration):
        return None


def load_paced(port, streams, pid):
    """So many streams at once, each with a chunk every PACE_S: how late they come."""
    body = request_of("paced")
    begun_cpu_s, lags_s, firsts_s, open_socks = cpu_s(pid), [], [], selectors.DefaultSelector()
    for _ in range(streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(body)
        open_socks.register(sock, selectors.EVENT_READ, [False])
    chunks, faults = 0, 0
    while open_socks.get_map():
        for key, _ in open_socks.select():
            data = key.fileobj.recv(65536)
            now_s = time.time()
            sent_s = [float(text) for text in re.findall(rb'"sent":([\d.]+)', data)]
            lags_s += [now_s - sent for sent in sent_s]
            if sent_s and not key.data[0]:
                key.data[0] = True
                firsts_s.append(now_s - sent_s[0])
            chunks += len(sent_s)
            if not data or b"[DONE]" in data:
                faults += not data
                open_socks.unregister(key.fileobj)
                key.fileobj.close()
    after = cpu_s(pid)
    lags_s.sort()
    firsts_s.sort()
    print(json.dumps({
        "p50_ms": lags_s[len(lags_s) // 2] * 1e3, "p99_ms": lags_s[int(len(lags_s) * .99)] * 1e3,
        "first_ms": firsts_s[len(firsts_s) // 2] * 1e3, "faults": faults,
        "cpu_us": None if after is None else (after - begun_cpu_s) / chunks * 1e6,
        "rss_mb": (memory_kb(pid, "VmRSS") or 0) / 1024}))


def request_of(kind):
    """The bytes of one request; a paced one is a stream."""
    if " on " in kind:
        return request_in_dialects(*kind.partition(", ")[0].split(" on "), "streamed" in kind)
    size = {"long": 400_000, "huge": 20_000_000}.get(kind, 900)
    fields = {"model": "gpt-4o-mini", "max_tokens": 72,
              "messages": [{"role": "user", "content": "some words " * (size // 11)}]}
    if kind in ("stream", "paced"):
        fields.update(stream=True, user=kind)
    if kind == "screens":
        fields = conversation("chat", 20_000_000, "gpt-4o-mini")
    body = json.dumps(fields).encode()
    return (b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer "
            b"ic_bench_0123456789\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(body)) + body


def request_in_dialects(client, api, stream):
    """What a client of one dialect asks a model behind an API."""
    from dialects import PATHS, Ask, model_of, request_of as asked
    fields = asked(client, Ask(words="some words in dialects " * 40, system="Be brief.",
                               tools=("weather", "clock"), cap=300), model_of(client, api), stream)
    body = json.dumps(fields).encode()
    return (b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer ic_bench_0123456789\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (PATHS[client].encode(), len(body))) + body


def load(port, connections, requests, kind, pid):
    request = request_of(kind)
    times_s, faults = [], []

    def run(count):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(count):
                start, data = time.perf_counter(), b""
                sock.sendall(request)
                while b"\r\n\r\n" not in data:
                    data += sock.recv(65536)
                head, _, rest = data.partition(b"\r\n\r\n")
                if b" 200 " not in head[:20]:
                    faults.append(head[:20])
                lower = head.lower()
                if b"content-length:" in lower:
                    length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
                    while len(rest) < length:
                        rest += sock.recv(65536)
                else:
                    while not rest.endswith(b"0\r\n\r\n"):
                        rest = rest[-8:] + sock.recv(65536)
                times_s.append(time.perf_counter() - start)

    run(1 if kind in ("huge", "screens") else 10)
    del times_s[:]
    threads = [threading.Thread(target=run, args=(requests // connections,))
               for _ in range(connections)]
    before, start = cpu_s(pid), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s, after = time.perf_counter() - start, cpu_s(pid)
    times_s.sort()
    cpu_us = None if before is None else (after - before) / len(times_s) * 1e6
    print(json.dumps({
        "per_s": len(times_s) / took_s, "p50_us": times_s[len(times_s) // 2] * 1e6,
        "p99_us": times_s[int(len(times_s) * 0.99)] * 1e6, "max_us": times_s[-1] * 1e6,
        "cpu_us": cpu_us, "faults": len(faults), "rss_mb": (memory_kb(pid, "VmRSS") or 0) / 1024,
        "most_mb": (memory_kb(pid, "VmHWM") or 0) / 1024}))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "provider":
        provide(int(rest[0]))
    elif what == "naive":
        proxy_naively(int(rest[0]), rest[1])
    elif what == "original":
        run_original(rest[0])
    elif what == "keys":
        serve_keys(rest[0])
    elif rest[3] == "paced":
        load_paced(int(rest[0]), int(rest[1]), int(rest[4]))
    else:
        load(int(rest[0]), int(rest[1]), int(rest[2]), rest[3], int(rest[4]))
