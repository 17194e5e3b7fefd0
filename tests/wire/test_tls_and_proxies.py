"""The way to a provider: TLS, verified, proxies from the environment, and none to anybody else.

Certificates are made with the `openssl` command; where it is absent these tests skip.
"""
import base64
import json
import shutil
import socket
import ssl
import subprocess
import threading

import pytest
from support import (TOKEN, MockProvider, RawClient, Served, call, proxy_environment,
                     settled_status, start_proxy)

CHAT = {"model": "gpt-4o-mini", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) of a provider called localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", cert,
                    "-days", "2", "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return cert, key


@pytest.fixture
def tls_mock(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with MockProvider(context) as mock:
        yield mock


@pytest.fixture
def trusted(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])


@pytest.fixture
def tls_proxy(tls_mock, trusted):
    proxy = start_proxy(tls_mock, "--budget", "100")
    yield proxy
    proxy.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_calls_over_tls_share_one_connection_and_are_billed(tls_mock, tls_proxy, stream):
    with RawClient(tls_proxy.port) as client:
        for _ in range(5):
            client.request("POST", "/v1/chat/completions",
                           json.dumps({**CHAT, "stream": stream}).encode())
            assert 200 == client.read_answer().status

    assert 1 == tls_mock.connections
    assert tls_mock.billed_microdollars == settled_status(tls_proxy)["spent_microdollars"] > 0


def test_large_bodies_travel_over_tls_both_ways(tls_mock, tls_proxy):
    """What TLS has decrypted but not handed out is read without waiting for the socket."""
    tls_mock.input_tokens = 10
    tls_mock.output_text = "wort " * 1_000_000
    tls_mock.output_tokens = 9
    prompt = "x" * 8_000_000
    fields = {**CHAT, "messages": [{"role": "user", "content": prompt}], "max_tokens": 1_000_000}

    answer = call(tls_proxy.port, "POST", "/v1/chat/completions", fields)

    assert 200 == answer.status, answer.body[:300]
    assert 4_999_000 < len(answer.json["choices"][0]["message"]["content"])
    assert prompt == tls_mock.seen[0].json["messages"][0]["content"]


def test_a_certificate_that_is_not_trusted_is_an_unreachable_provider(tls_mock, monkeypatch):
    proxy = start_proxy(tls_mock, "--budget", "1")

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    proxy.stop()
    assert (502, "upstream_unreachable") == (answer.status, answer.json["error"]["code"])
    assert "certificate" in answer.json["error"]["message"].lower()
    assert ([], 0) == (tls_mock.seen, proxy.router.controller.total_spent())


class ConnectProxy:
    """A proxy that opens tunnels, or refuses them; it notes what it was asked."""

    def __init__(self, refuses=None):
        self.asked, self._refuses = [], refuses
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._tunnel, args=(client,), daemon=True).start()

    def _tunnel(self, client):
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        self.asked.append(head.decode())
        if self._refuses is not None:
            credentials = head.partition(b"Proxy-Authorization: ")[2].split(b"\r\n")[0]
            client.sendall(self._refuses % credentials)
            client.close()
            return
        host, _, port = head.split()[1].decode().partition(":")
        server = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=relay, args=(source, target), daemon=True).start()


def relay(source, target):
    try:
        for data in iter(lambda: source.recv(65536), b""):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def elsewhere(monkeypatch):
    """Make the provider's name look like another machine's, so that proxies apply to it."""
    import ironcage_proxy
    monkeypatch.setattr(ironcage_proxy, "LOOPBACK_HOST", ironcage_proxy.re.compile(r"127\..*"))


@pytest.mark.parametrize("refuses", [
    None, b"HTTP/1.1 407 Who is %b?\r\n\r\n", b"HTTP/1.1 what %b\r\n\r\n", b"%b\r\n\r\n"])
def test_https_proxy_is_used_with_its_credentials_and_never_sees_the_key(
        tls_mock, trusted, elsewhere, monkeypatch, refuses):
    tunnels = ConnectProxy(refuses)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{tunnels.port}")
    monkeypatch.setenv("NO_PROXY", "")
    proxy = start_proxy(tls_mock, "--budget", "1")

    answers = [call(proxy.port, "POST", "/v1/chat/completions", CHAT) for _ in range(2)]

    proxy.stop()
    tunnels.close()
    credentials = base64.b64encode(b"user:secret").decode()
    assert f"CONNECT localhost:{tls_mock.port} " in tunnels.asked[0]
    assert f"Basic {credentials}" in tunnels.asked[0]
    assert not [asked for asked in tunnels.asked if "sk-" in asked]
    if refuses is not None:
        assert (502, "upstream_unreachable") == (
            answers[0].status, answers[0].json["error"]["code"])
        assert "secret" not in answers[0].body.decode()
        assert credentials not in answers[0].body.decode()
        assert 0 == proxy.router.controller.total_spent()
    else:
        assert [200, 200] == [answer.status for answer in answers]
        assert 1 == len(tunnels.asked) == tls_mock.connections
        assert "proxy-authorization" not in dict(tls_mock.seen[0].headers)


@pytest.mark.parametrize("no_proxy", ["localhost", "*"])
def test_no_proxy_is_honoured(tls_mock, trusted, elsewhere, monkeypatch, no_proxy):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    proxy = start_proxy(tls_mock, "--budget", "1")

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    proxy.stop()
    assert 200 == answer.status


def test_a_provider_on_this_machine_is_never_reached_through_a_proxy(mock, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    proxy = start_proxy(mock, "--budget", "1", environ=proxy_environment(mock))

    answer = call(proxy.port, "POST", "/v1/chat/completions", CHAT)

    proxy.stop()
    assert 200 == answer.status


# Nobody else.

WATCHED = """
import sys, ironcage_proxy
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "subprocess.Popen"):
        print("SEEN", event, arguments[-1] if event == "socket.connect" else arguments[:2],
              file=sys.stderr)
sys.addaudithook(watch)
sys.exit(ironcage_proxy.main())
"""


def test_no_connection_is_opened_but_to_configured_providers(mock, tmp_path):
    """Python reports each connection, look-up and process of the program."""
    with Served("--token", TOKEN, "--budget", "1", "--ledger", str(tmp_path / "cage.db"),
                code=WATCHED, environ=proxy_environment(mock)) as served:
        statuses = [call(served.port, "POST", path, {**CHAT, **more}).status for path, more in (
            ("/v1/chat/completions", {}), ("/v1/messages", {"stream": True}),
            ("/v1/messages", {"model": "claude-haiku-4-5"}),
            ("/v1/chat/completions", {"model": "claude-haiku-4-5", "stream": True}),
            ("/v1/chat/completions", {"model": "http://elsewhere.example/gpt"}),
            ("/https://elsewhere.example/v1/chat/completions", {}))]
        statuses += [call(served.port, "GET", path).status for path in (
            "/", "/v1/models", "/ironcage/status", "/ironcage/metrics", "/ironcage/usage",
            "http://elsewhere.example/v1/models")]
        _, _, log = served.stop()
    seen = [line for line in log.splitlines() if line.startswith("SEEN ")]

    assert [200] * 4 == statuses[:4] and 400 <= min(statuses[4:6])
    assert f"SEEN socket.connect ('127.0.0.1', {mock.port})" in seen
    assert {f"SEEN socket.connect ('127.0.0.1', {mock.port})",
            "SEEN socket.getaddrinfo ('127.0.0.1', 0)",                 # to listen
            f"SEEN socket.getaddrinfo ('127.0.0.1', {mock.port})"} >= set(seen)
