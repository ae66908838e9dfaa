"""Pictures of a request as encoded bytes: from data URIs and, where allowed, from public addresses.

The HTTP process only fetches; it never decodes a picture and never opens a file.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from speculens.errors import UserError
from speculens.pictures import decode_data_uri
from speculens.server.settings import Limits

REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
# Addresses that carry another inside: 6to4, Teredo and NAT64 would lead to a private one unseen.
TUNNELS = tuple(map(ipaddress.ip_network, ("2002::/16", "2001::/32", "64:ff9b::/96", "64:ff9b:1::/48", "::/96")))


def fetch(url: str, limits: Limits, deadline: float) -> bytes:
    """The bytes behind a data URI or an http(s) address. Raises UserError, which never quotes the data.

    deadline  by the monotonic clock: an address that has not answered in full by then is given up
    """
    if url[:5].lower() == "data:":
        if len(url) > limits.image_bytes * 3:  # as long as every byte is written %41
            raise UserError(f"A picture is larger than {limits.image_bytes:,} bytes.")
        data = decode_data_uri(url)
    elif is_remote(url):
        if not limits.remote_images:
            raise UserError(
                "This server fetches no pictures: send them as data URIs, or start it with --allow-remote-images."
            )
        data = _download(url, limits, deadline)
    else:
        raise UserError("A picture's url must be a data URI or an http(s) address.")
    if not data:
        raise UserError("A picture is empty.")
    if len(data) > limits.image_bytes:
        raise UserError(f"A picture is larger than {limits.image_bytes:,} bytes.")
    return data


def is_remote(url: str) -> bool:
    """Whether somebody else has to answer for the picture."""
    return url[:8].lower().startswith(("http://", "https://"))


def public_address(host: str, port: int) -> str:
    """The address to connect to. Every address of the name must be public, or a second look-up could pick another."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise UserError(f"The picture's host {host[:80]!r} is not known.") from None
    if not found or not all(map(is_public, found)):
        raise UserError(f"The picture's host {host[:80]!r} is not a public address.")
    return min(found, key=lambda address: (":" in address, address))  # IPv4 first: more networks have it


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet, and not to this machine, its networks or a tunnel to them."""
    try:
        place = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(place, ipaddress.IPv6Address):
        if place.ipv4_mapped or any(place in tunnel for tunnel in TUNNELS):
            return False
        if place.is_site_local:
            return False
    return place.is_global and not (place.is_multicast or place.is_reserved or place.is_unspecified)


def _download(url: str, limits: Limits, deadline: float) -> bytes:
    for _ in range(REDIRECTS + 1):
        place = _parsed(url)
        try:
            with _connected(place, deadline) as connection:
                path = (place.path or "/") + (f"?{place.query}" if place.query else "")
                connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "speculens"})
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, answer.headers.get("Location", ""))
                    continue
                if answer.status != 200:
                    raise UserError(f"The picture's server answered {answer.status}.")
                data = answer.read(limits.image_bytes + 1)
                # Reading so many bytes raises nothing when the answer breaks off, or is cut, before its end.
                if len(data) <= limits.image_bytes and (answer.length or time.monotonic() >= deadline):
                    raise http.client.IncompleteRead(data, answer.length)
        except (OSError, ValueError, http.client.HTTPException) as error:
            late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
            why = f"did not arrive within {limits.image_seconds:g} seconds" if late else "could not be fetched"
            raise UserError(f"A picture {why}.") from None
        return data
    raise UserError(f"A picture's address leads through more than {REDIRECTS} redirects.")


def _parsed(url: str) -> SplitResult:
    try:
        place = urlsplit(url)
        known = place.scheme in PORTS and place.hostname and place.port != 0
    except ValueError:
        known = False
    if not known or place.username is not None or place.password is not None or not url.isascii() or _blank(url):
        raise UserError("A picture's address is not a plain http(s) address.")
    return place


def _blank(url: str) -> bool:
    return any(letter <= " " or letter == "\x7f" for letter in url)


@contextmanager
def _connected(place: SplitResult, deadline: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to the very address that was checked, cut at the deadline however slowly it trickles."""
    host, port = str(place.hostname), place.port or PORTS[place.scheme]
    _left(deadline)  # whoever waited too long for its turn need not look up a name
    address = public_address(host, port)
    with (
        socket.create_connection((address, port), timeout=_left(deadline)) as stream,
        _cut(stream, deadline),
        closing(http.client.HTTPConnection(host, port)) as connection,
    ):
        secure = place.scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(stream, server_hostname=host) if secure else stream
        yield connection


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextmanager
def _cut(stream: socket.socket, deadline: float) -> Iterator[None]:
    """A block in which a connection ends at the deadline, whoever waits for it.

    By a descriptor of its own: TLS takes that of `stream` away with its first step, the handshake.
    """
    with stream.dup() as own:
        cut = threading.Timer(max(deadline - time.monotonic(), 0), _hang_up, (own,))
        cut.daemon = True
        cut.start()
        try:
            yield
        finally:
            cut.cancel()
            cut.join()  # or it could meet the descriptor's next owner


def _hang_up(stream: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        stream.shutdown(socket.SHUT_RDWR)
