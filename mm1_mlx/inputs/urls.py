"""Pictures from https addresses, without letting an address reach into a private net.

Standard library only. http, ssl and socket are imported inside the functions, so a run
without a URL never loads them.

What is guarded: https only, certificates and host names checked; every address that a
name resolves to must be public, and the connection goes to the very address that was
checked (a name cannot resolve to something else in between); each redirect is checked
again; bytes are counted while reading; one deadline covers the whole fetch. Proxies
set in the environment are not used.
"""

import io
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from mm1_mlx.errors import ImageError
from mm1_mlx.inputs.sources import shown

MAX_URL_BYTES = 20_000_000
_CHUNK = 65536
_NAT64 = "64:ff9b::/96"
# Not the open internet, but some versions of Python take them for it: protocol
# assignments, site-local, NAT64 inside a network, documentation, segment routing.
_NEVER = (
    "192.0.0.0/24",
    "fec0::/10",
    "64:ff9b:1::/48",
    "3fff::/20",
    "5f00::/16",
)


def is_public(address: str) -> bool:
    """Whether an IP address is on the open internet, also inside its IPv6 wrappings."""
    import ipaddress

    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in ipaddress.ip_network(_NAT64):
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.sixtofour is not None and not is_public(str(ip.sixtofour)):
            return False
    networks = map(ipaddress.ip_network, _NEVER)
    if any(ip.version == net.version and ip in net for net in networks):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _split(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port or 443
        host = (parts.hostname or "").rstrip(".")
        if ":" not in host:
            host = host.encode("idna").decode("ascii")
    except (ValueError, UnicodeError) as error:
        raise ImageError(f"{shown(url)} is not a valid address: {error}.") from error
    if parts.scheme.lower() != "https":
        raise ImageError(
            f"{shown(url)} is not an https:// address. Only https is read, so that "
            f"nobody in between can change the picture."
        )
    if parts.username is not None or parts.password is not None:
        raise ImageError(
            f"The address of {host} holds a user name or password. Download the file "
            f"first and give its path."
        )
    if not host:
        raise ImageError(f"{shown(url)} has no host name: expected https://host/path.")
    return parts, host, port


def _addresses(url: str, host: str, port: int) -> list[str]:
    """The public addresses of a host; one private address among them is an error."""
    import socket

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ImageError(
            f"{shown(url)}: the host {host!r} was not found ({error}). Check the "
            f"address and the network."
        ) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not is_public(address):
            raise ImageError(
                f"{shown(url)}: the host {host!r} is {address}, which is not a public "
                f"address. Private, local and reserved ranges are not read; download "
                f"the file yourself and give its path."
            )
    return addresses


class _DeadlineReader(io.RawIOBase):
    """Reads a socket until a moment in time, however slowly the bytes drip."""

    def __init__(self, sock, deadline: float):
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._sock.settimeout(_remaining(self._deadline))
        return self._sock.recv_into(buffer)


class _DeadlineSocket:
    """What http.client needs of a socket, with one deadline for all of it."""

    def __init__(self, sock, deadline: float):
        self._sock, self._deadline = sock, deadline

    def sendall(self, data) -> None:
        self._sock.settimeout(_remaining(self._deadline))
        self._sock.sendall(data)

    def makefile(self, *_args, **_kwargs):
        return io.BufferedReader(_DeadlineReader(self._sock, self._deadline))

    def close(self) -> None:
        """Nothing: http.client closes its socket before the body is read."""


def _remaining(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _connect(host: str, address: str, port: int, deadline: float):
    """A TLS connection to this address that must prove to be this host."""
    import socket
    import ssl

    sock = socket.create_connection((address, port), timeout=_remaining(deadline))
    try:
        sock.settimeout(_remaining(deadline))
        return ssl.create_default_context().wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise


def _request(url: str, deadline: float):
    """The open socket and the response of one address, without following anything."""
    import http.client

    parts, host, port = _split(url)
    last: Exception | None = None
    for address in _addresses(url, host, port):
        try:
            sock = _connect(host, address, port, deadline)
            break
        except OSError as error:
            last = error
    else:
        raise last or OSError("no address")
    connection = http.client.HTTPConnection(host, port)
    connection.sock = _DeadlineSocket(sock, deadline)  # type: ignore[assignment]
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {
        "Host": (f"[{host}]" if ":" in host else host)
        + ("" if port == 443 else f":{port}"),
        "User-Agent": "mm1_mlx",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    try:
        connection.request("GET", _quoted(target), headers=headers)
        return sock, connection.getresponse()
    except BaseException:
        sock.close()
        raise


def _quoted(target: str) -> str:
    from urllib.parse import quote

    return quote(target, safe="/?&=%:+,;@!$'()*~#[]-._")


def _body(url: str, response, max_bytes: int) -> bytes:
    too_big = (
        f"{shown(url)} has over {max_bytes:,} bytes, the limit for addresses. Download "
        f"the file and give its path."
    )
    declared = response.length
    if (declared or 0) > max_bytes:
        raise ImageError(too_big)
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise ImageError(
            f"{shown(url)} was sent in the encoding {encoding!r} that was not asked "
            f"for. Download the file and give its path."
        )
    data = bytearray()
    while chunk := response.read(min(_CHUNK, max_bytes + 1 - len(data))):
        data += chunk
        if len(data) > max_bytes:
            raise ImageError(too_big)
    if declared is not None and len(data) < declared:
        raise ImageError(
            f"{shown(url)} was cut off: {len(data):,} of {declared:,} bytes arrived. "
            f"Try again."
        )
    return bytes(data)


def fetch(
    url: str,
    *,
    max_bytes: int = MAX_URL_BYTES,
    timeout: float = 20.0,
    max_redirects: int = 5,
) -> bytes:
    """The bytes behind an https address, within a size, a time and public addresses.

    timeout: seconds for everything together. Raises ImageError for anything else.
    """
    import http.client
    import ssl

    deadline = time.monotonic() + timeout
    current = url
    for _ in range(max_redirects + 1):
        try:
            sock, response = _request(current, deadline)
            try:
                target = response.headers.get("Location")
                if response.status in (301, 302, 303, 307, 308) and target:
                    current = urljoin(current, target)
                    continue
                if response.status != 200:
                    raise ImageError(
                        f"{shown(current)} answered {response.status} "
                        f"{shown(response.reason)}, but a picture was expected. Open "
                        f"the address in a browser to check it."
                    )
                return _body(current, response, max_bytes)
            finally:
                response.close()
                sock.close()
        except TimeoutError as error:
            raise ImageError(
                f"{shown(current)} did not arrive within {timeout:g} seconds. Try "
                f"again, or download the file and give its path."
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise ImageError(
                f"{shown(current)}: the certificate is not accepted "
                f"({error.verify_message}). With Python from python.org on a Mac, run "
                f"its 'Install Certificates.command' once."
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = shown(str(error) or type(error).__name__)
            raise ImageError(
                f"{shown(current)} cannot be read: {reason}. Check the address and the "
                f"network."
            ) from error
    raise ImageError(
        f"{shown(url)} was redirected more than {max_redirects} times. Give the final "
        f"address."
    )
