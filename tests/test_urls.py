"""https addresses: a local server stands in for the network; nothing leaves."""

import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from urllib.parse import unquote

import pytest
from PIL import Image

from mm1_mlx.errors import ImageError
from mm1_mlx.inputs import urls
from mm1_mlx.inputs.images import load_image
from mm1_mlx.inputs.urls import fetch, is_public

PUBLIC = "93.184.216.34"
HOST = "https://pictures.example"


class Answers(http.server.BaseHTTPRequestHandler):
    """What each path of the stand-in server answers."""

    seen: list = []  # noqa: RUF012 - shared on purpose

    def log_message(self, *_args):
        pass

    def answer(self, status=200, body=b"hello", **headers):
        self.send_response(status)
        for key, value in ({"Content_Length": str(len(body))} | headers).items():
            if value is not None:
                self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        type(self).seen.append((self.path, dict(self.headers)))
        path = unquote(self.path.partition("?")[0])
        if path == "/a.png":
            self.answer()
        elif path == "/endless":
            self.answer(body=b"x" * 3000, Content_Length=None)
        elif path == "/large":
            self.answer(body=b"", Content_Length="3000")
        elif path == "/empty":
            self.answer(body=b"")
        elif path == "/gzip":
            self.answer(Content_Encoding="gzip")
        elif path == "/short":
            self.answer(body=b"abc", Content_Length="10")
        elif path == "/loop":
            self.answer(302, Location="/loop")
        elif path.startswith("/to/"):
            self.answer(307, Location=path[4:].replace("|", "/"))
        elif path == "/garbage":
            self.wfile.write(b"not http\r\n\r\n")
        elif path == "/drip":
            self.drip()
        else:
            self.answer(404)

    def drip(self):
        """A byte now and then, for ever: each one is in time, all of them are not."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        try:
            for _ in range(200):
                self.wfile.write(b"a")
                time.sleep(0.02)
        except OSError:
            pass


@pytest.fixture
def net(monkeypatch):
    """Names resolve to PUBLIC; connections go to the stand-in server, without TLS."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Answers.seen = []
    record = {"addresses": [PUBLIC], "connected": [], "server": server}

    def resolve(host, port, **_settings):
        record.setdefault("hosts", []).append(host)
        return [(2, 1, 6, "", (a, port)) for a in record["addresses"]]

    def connect(host, address, port, deadline):
        record["connected"].append((host, address, port))
        if address in record.get("dead", ()):
            raise ConnectionRefusedError(111, "Connection refused")
        sock = socket.socket()
        sock.settimeout(5)
        sock.connect(server.server_address)
        return sock

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(urls, "_connect", connect)
    yield record
    server.shutdown()
    server.server_close()


def test_fetch(net):
    assert fetch(f"{HOST}/a.png?x=1&y=ä b#part") == b"hello"
    assert net["connected"] == [("pictures.example", PUBLIC, 443)]
    path, headers = Answers.seen[0]
    assert path == "/a.png?x=1&y=%C3%A4%20b"
    assert headers["Host"] == "pictures.example"
    assert headers["Accept-Encoding"] == "identity"
    fetch("https://BÜCHER.example:8443/a.png")
    assert net["connected"][1] == ("xn--bcher-kva.example", PUBLIC, 8443)
    assert Answers.seen[1][1]["Host"] == "xn--bcher-kva.example:8443"


def test_a_picture_through_load_image(net, tmp_path, monkeypatch):
    Image.new("RGB", (3, 2), (9, 8, 7)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(
        Answers, "do_GET", lambda self: self.answer(body=data, Content_Type="image/png")
    )
    assert load_image(f" {HOST}/a.png\n", allow_url=True).size == (3, 2)
    with pytest.raises(ImageError, match="an address on the network"):
        load_image(f"{HOST}/a.png")


def test_nothing_and_no_picture(net):
    with pytest.raises(ImageError, match="gave 0 bytes"):
        load_image(f"{HOST}/empty", allow_url=True)
    with pytest.raises(ImageError, match=r"a\.png is not an image"):
        load_image(f"{HOST}/a.png", allow_url=True)


def test_redirects(net):
    assert fetch(f"{HOST}/to/|a.png") == b"hello"
    assert fetch(f"{HOST}/to/https:||other.example|a.png") == b"hello"
    assert net["connected"][-1][0] == "other.example"
    with pytest.raises(ImageError, match="redirected more than 5 times"):
        fetch(f"{HOST}/loop")
    assert sum(path == "/loop" for path, _ in Answers.seen) == 6
    with pytest.raises(ImageError, match="is not an https:// address"):
        fetch(f"{HOST}/to/http:||other.example|a.png")
    with pytest.raises(ImageError, match="is not an https:// address"):
        fetch(f"{HOST}/to/file:|||etc|passwd")


def test_each_redirect_is_checked_again(net, monkeypatch):
    def resolve(host, port, **_settings):
        address = "127.0.0.1" if host == "inside.example" else PUBLIC
        return [(2, 1, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ImageError, match=r"inside\.example' is 127\.0\.0\.1, which is"):
        fetch(f"{HOST}/to/https:||inside.example|a.png")
    assert [host for host, *_ in net["connected"]] == ["pictures.example"]


def test_a_name_is_resolved_once_and_that_address_is_used(net):
    # A name that answers differently the second time gets no second time.
    fetch(f"{HOST}/a.png")
    assert len(net["hosts"]) == 1 == len(net["connected"])
    assert net["connected"][0][1] == PUBLIC


def test_one_private_address_among_public_ones_is_enough(net):
    net["addresses"] = [PUBLIC, "10.0.0.1"]
    with pytest.raises(ImageError, match=r"is 10\.0\.0\.1, which is not a public"):
        fetch(f"{HOST}/a.png")
    assert net["connected"] == []


def test_the_next_address_is_tried(net):
    net["addresses"] = ["2606:4700::1111", PUBLIC]
    net["dead"] = ["2606:4700::1111"]
    assert fetch(f"{HOST}/a.png") == b"hello"
    net["dead"] = net["addresses"]
    with pytest.raises(ImageError, match=r"cannot be read: .*Connection refused"):
        fetch(f"{HOST}/a.png")


PRIVATE = """
    127.0.0.1 127.8.8.8 10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254
    0.0.0.0 100.64.0.1 198.18.0.1 192.0.2.1 203.0.113.9 224.0.0.1 239.1.1.1 240.0.0.1
    255.255.255.255 :: ::1 fe80::1 fe80::1%eth0 fc00::1 fd12::1 ff02::1 2001:db8::1
    ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a00:1
    2002:7f00:1:: 2002:a00:1:: 2001:0:4136:e378:8000:63bf:3fff:fdd2
    fec0::1 feff::1 64:ff9b:1::808:808 3fff::1 5f00::1
    192.0.0.1 192.0.0.8 192.0.0.9 192.0.0.10 192.0.0.171 192.0.0.255
    ::ffff:192.0.0.9 64:ff9b::c000:9 2002:c000:9::
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        PUBLIC,
        "8.8.8.8",
        "192.0.1.1",
        "2606:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
    ],
)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1/", "https://[::1]/", "https://2130706433/"]
)
def test_numbers_as_hosts(url):
    # The system's resolver reads them without a network, in all their spellings.
    with pytest.raises(ImageError, match=r"not a public address|was not found"):
        fetch(url)


@pytest.mark.parametrize(
    "path, message",
    [
        ("/endless", "has over 1,000 bytes"),
        ("/large", "has over 1,000 bytes"),
        ("/gzip", "in the encoding 'gzip' that was not asked"),
        ("/short", "was cut off: 3 of 10 bytes arrived"),
        ("/none", "answered 404 Not Found"),
        ("/garbage", "cannot be read"),
    ],
)
def test_bad_answers(net, path, message):
    with pytest.raises(ImageError, match=message) as caught:
        fetch(HOST + path, max_bytes=1000)
    assert "\n" not in str(caught.value)


def test_the_deadline_covers_everything(net):
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"did not arrive within 0\.3 seconds"):
        fetch(f"{HOST}/drip", timeout=0.3)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://pictures.example/a.png", "is not an https:// address"),
        ("https:///a.png", "has no host name"),
        ("https://user:secret@pictures.example/", "holds a user name or password"),
        ("https://pictures.example:99999/", "is not a valid address"),
        ("https://" + "a" * 70 + ".example/", "is not a valid address"),
        ("https://[::1/", "is not a valid address"),
    ],
)
def test_bad_addresses(net, url, message):
    with pytest.raises(ImageError, match=message) as caught:
        fetch(url)
    assert "secret" not in str(caught.value)
    assert net["connected"] == []


def test_unknown_host(monkeypatch):
    def resolve(*_args, **_settings):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ImageError, match=r"'pictures\.example' was not found"):
        fetch(f"{HOST}/a.png")


def test_tls_is_checked_for_the_name_and_not_the_address(monkeypatch):
    calls = {}

    class Context:
        def wrap_socket(self, sock, server_hostname):
            calls["name"] = server_hostname
            return sock

    def connect(address, timeout):
        calls["address"] = address
        return socket.socket()

    context = ssl.create_default_context()
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED
    monkeypatch.setattr(ssl, "create_default_context", Context)
    monkeypatch.setattr(socket, "create_connection", connect)
    urls._connect("pictures.example", PUBLIC, 443, time.monotonic() + 5).close()
    assert calls == {"name": "pictures.example", "address": (PUBLIC, 443)}


def test_a_self_signed_certificate_is_refused(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=pictures.example", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_args: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    real = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda *_a, **_k: real(server.server_address)
    )
    monkeypatch.setattr(urls, "_addresses", lambda *_args: [PUBLIC])
    try:
        with pytest.raises(ImageError, match=r"the certificate is not accepted.*self"):
            fetch(f"{HOST}/a.png", timeout=5)
    finally:
        server.shutdown()
        server.server_close()
