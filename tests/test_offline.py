"""The network block refuses what leaves the machine and nothing else."""

import socket
import urllib.request

import pytest

from rlhf_guide.errors import DownloadRefused
from rlhf_guide.offline import block_if_asked, block_network, is_local, unblock_network


@pytest.fixture
def blocked():
    block_network()
    yield
    unblock_network()


def test_names_and_addresses_are_refused(blocked):
    with pytest.raises(DownloadRefused, match="allow_download=True"):
        socket.create_connection(("example.org", 80), timeout=1)
    with socket.socket() as sock, pytest.raises(DownloadRefused):
        sock.connect(("192.0.2.1", 80))
    with socket.socket() as sock, pytest.raises(DownloadRefused):
        sock.connect_ex(("192.0.2.1", 80))
    with socket.socket(type=socket.SOCK_DGRAM) as sock, pytest.raises(DownloadRefused):
        sock.sendto(b"x", ("192.0.2.1", 53))
    with pytest.raises(DownloadRefused):
        urllib.request.urlopen("http://example.org", timeout=1)


def test_loopback_and_unix_sockets_work(blocked, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=2).close()
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=2).close()
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen()
        client.connect(path)


def test_blocking_twice_and_undoing(blocked):
    block_network()
    unblock_network()
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 9))


def test_only_when_asked(monkeypatch):
    before = socket.socket.connect
    monkeypatch.delenv("RLHF_GUIDE_BLOCK_NETWORK", raising=False)
    block_if_asked()
    assert socket.socket.connect is before


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("", True),
        (b"127.0.0.2", True),
        ("0.0.0.1", False),
        ("example.org", False),
        ("10.0.0.1", False),
    ],
)
def test_what_counts_as_local(host, local):
    assert is_local(host) is local
