"""No network at run time: a block at the socket level, for tests and for the cautious.

The course needs no network after installation. With RLHF_GUIDE_BLOCK_NETWORK=1 every attempt to
leave this machine raises `DownloadRefused`; loopback and Unix sockets (kernels, workers) work.
"""

import ipaddress
import os
import socket
from collections.abc import Callable
from typing import Any

from .errors import DownloadRefused

BLOCK_VARIABLE = "RLHF_GUIDE_BLOCK_NETWORK"

_ORIGINALS = {
    "connect": socket.socket.connect,
    "connect_ex": socket.socket.connect_ex,
    "sendto": socket.socket.sendto,
}
_GETADDRINFO = socket.getaddrinfo


def block_if_asked() -> None:
    """Block the network when the environment variable RLHF_GUIDE_BLOCK_NETWORK is set."""
    if os.environ.get(BLOCK_VARIABLE, "").lower() in ("1", "true", "yes"):
        block_network()


def block_network() -> None:
    """Refuse every connection of this process that leaves the machine, name look-ups included."""
    for name, original in _ORIGINALS.items():
        setattr(socket.socket, name, _guarded(original))
    socket.getaddrinfo = _guarded_lookup


def unblock_network() -> None:
    """Undo `block_network`."""
    for name, original in _ORIGINALS.items():
        setattr(socket.socket, name, original)
    socket.getaddrinfo = _GETADDRINFO


def is_local(host: Any) -> bool:
    """Whether a host name or address is this machine's loopback."""
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(sock: socket.socket, *arguments: Any) -> Any:
        address = arguments[-1]  # of `connect`; `sendto` ends with it as well
        if sock.family != socket.AF_UNIX and isinstance(address, tuple):
            _refuse_unless_local(address[0])
        return original(sock, *arguments)

    return guarded


def _guarded_lookup(host: Any, *arguments: Any, **options: Any) -> Any:
    _refuse_unless_local(host)
    return _GETADDRINFO(host, *arguments, **options)


def _refuse_unless_local(host: Any) -> None:
    if not is_local(host):
        raise DownloadRefused(
            f"refused to connect to {host}: the network is blocked ("
            f"{BLOCK_VARIABLE}=1). To download models or data, unset that variable and pass "
            "allow_download=True (on the command line --set allow_download=true, or the "
            "environment variable RLHF_GUIDE_ALLOW_DOWNLOAD=1)."
        )
