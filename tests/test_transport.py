"""Connections of the ranks' own: who is let in, who is noticed to be gone, and the messages of a step."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading
import time

import numpy as np
import pytest
import torch
from ranks import start_ranks

from mfdist.cluster import connecting, transport
from mfdist.cluster.addresses import own_address
from mfdist.cluster.connecting import HELLO, MAGIC, Listener, _proof, call, connect
from mfdist.cluster.transport import DATA, PULSE, Address, Transport
from mfdist.errors import LostRankError, MfdistError, UsageError
from mfdist.kernels import sockets
from mfdist.kernels.bfloat16 import narrow_lines, widen_lines

SECRET = b"s" * 32


@contextlib.contextmanager
def door(rank=0, ranks=3):
    listener = Listener("127.0.0.1")
    listener.open(rank, ranks, SECRET)
    try:
        yield listener
    finally:
        listener.close()
        for link in listener.wait(0, 0).values():
            link.close()


def at(listener, name="host"):
    return Address("127.0.0.1", listener.port, name, ("here", name))


def refused_by(listener, link):
    """Whether the door hangs up without another word."""
    with contextlib.suppress(ConnectionResetError):
        link.settimeout(10)
        rest = link.recv(4096)
        assert len(rest) <= 32, "only its own number may follow"
        while rest:
            rest = link.recv(4096)
    link.close()
    end = time.monotonic() + 5
    while not listener.refused and time.monotonic() < end:
        time.sleep(0.01)
    return listener.refused == ["127.0.0.1"]


def hello(purpose=DATA, caller=1, called=0, magic=MAGIC):
    return HELLO.pack(magic, purpose, caller, called, b"n" * 32)


def answered(listener, greeting, secret):
    """A connection that has given its answer to the door's number."""
    link = socket.create_connection(("127.0.0.1", listener.port), 5)
    link.sendall(greeting)
    number = connecting._read(link, 32)
    link.sendall(_proof(secret, b"call", greeting, number))
    return link


@pytest.mark.parametrize(
    "greeting", [hello(caller=0), hello(caller=3), hello(called=1), hello(purpose=7), hello(magic=b"mfdist-0")]
)
def test_a_peer_with_the_secret_that_is_not_due_is_refused(greeting):
    with door() as listener:
        assert refused_by(listener, answered(listener, greeting, SECRET))
        assert listener.wait(1, 0.05) == {}


def test_strangers_are_refused_and_the_door_stays_open_to_peers(monkeypatch):
    monkeypatch.setattr(connecting, "HANDSHAKE_SECONDS", 2.0)
    with door() as listener:
        assert refused_by(listener, answered(listener, hello(), b"x" * 32))
        listener.refused.clear()
        web = socket.create_connection(("127.0.0.1", listener.port), 5)
        web.sendall(b"GET / HTTP/1.1\r\nHost: somewhere with a long name for enough bytes\r\n\r\n")
        silent = socket.create_connection(("127.0.0.1", listener.port), 5)  # says nothing, and keeps nobody waiting
        began = time.monotonic()
        peer = call(at(listener), 1, 0, DATA, SECRET)
        assert time.monotonic() - began < 1.5
        found = listener.wait(1, 5)
        assert list(found) == [(1, DATA)]
        peer.sendall(b"hello")
        assert connecting._read(found[1, DATA], 5) == b"hello"
        with pytest.raises(OSError):  # a rank calls once
            call(at(listener), 1, 0, DATA, SECRET)
        for link in (web, silent):
            link.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                while link.recv(100):
                    pass
        end = time.monotonic() + 5  # who is refused is noted after the door is shut
        while len(listener.refused) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert len(listener.refused) >= 3
        for link in (web, silent, peer, *found.values()):
            link.close()


def test_an_answer_cannot_be_used_again():
    with door() as listener:
        greeting = hello()
        heard = b""
        with answered(listener, greeting, SECRET) as link:
            heard = connecting._read(link, 32)
        assert heard
        again = socket.create_connection(("127.0.0.1", listener.port), 5)
        again.sendall(greeting)
        connecting._read(again, 32)
        again.sendall(heard)
        assert refused_by(listener, again)


def test_a_door_that_does_not_know_the_secret_is_left():
    with door() as listener, pytest.raises(OSError):
        call(at(listener), 1, 0, DATA, b"x" * 32)


def test_after_its_peers_are_there_a_rank_does_not_listen():
    with door() as listener:
        port = listener.port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 0.3)
    with door() as listener, pytest.raises(MfdistError, match=r"rank 1 \(host-1\) did not connect to rank 0"):
        connect(0, [at(listener), Address("127.0.0.1", 1, "host-1", ())], listener, SECRET)


def test_addresses(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert own_address("lo") == "127.0.0.1" and own_address("127.0.0.3") == "127.0.0.3"
    assert own_address(None) == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address(None) == "127.0.0.1"
    with pytest.raises(UsageError, match=r"--interface nowhere.*there are .*lo"):
        own_address("nowhere")
    with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.7"):
        Listener("203.0.113.7")


# A peer that is gone ------------------------------------------------------------------------------


@contextlib.contextmanager
def two_ranks():
    """The transports of two ranks in one process."""
    doors = [Listener("127.0.0.1") for _ in range(2)]
    places = [at(listener, f"host-{rank}") for rank, listener in enumerate(doors)]
    found = {}

    def join(rank):
        doors[rank].open(rank, 2, SECRET)
        links = connect(rank, places, doors[rank], SECRET)
        found[rank] = Transport(rank, places, links, doors[rank].refused)
        doors[rank].close()

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    try:
        yield found[0], found[1]
    finally:
        for one in found.values():
            with contextlib.suppress(OSError):
                one.leave(all_alive=True)


def error_of_waiting(one, seconds=20.0):
    began = time.monotonic()
    with pytest.raises(LostRankError) as caught:
        while time.monotonic() - began < seconds:
            one.wait([1 - one.rank], [], began, seconds)
            time.sleep(0.01)
    return str(caught.value), time.monotonic() - began


def test_a_peer_that_says_nothing_is_named_within_seconds(monkeypatch):
    monkeypatch.setattr(transport, "SILENT_SECONDS", 1.5)
    with two_ranks() as (first, second):
        second._pulse._closing.set()  # stopped, its connections still open
        second._pulse._thread.join()
        text, seconds = error_of_waiting(first)
    assert "rank 1 of this job (host-1, 127.0.0.1) was lost: it has not answered" in text
    assert seconds < 6


def test_a_peer_that_ends_is_named_at_once():
    with two_ranks() as (first, second):
        for link in (*second._data.values(), *second._pulse._links.values()):
            link.shutdown(socket.SHUT_RDWR)
        text, seconds = error_of_waiting(first)
    assert "rank 1 of this job" in text and "its process has ended" in text and seconds < 3


def with_words_unread(first, second):
    """Stop the second one's thread until the first one's next word is there, unread: to close now is a reset."""
    second._pulse._closing.set()
    second._pulse._thread.join()
    assert select.select([second._pulse._links[first.rank]], [], [], 10)[0]


def test_a_peer_that_ends_with_words_unread_has_ended_too():
    with two_ranks() as (first, second):
        with_words_unread(first, second)
        second._pulse._links[0].close()
        text, seconds = error_of_waiting(first)
    assert "rank 1 of this job" in text and "its process has ended" in text and seconds < 3


@pytest.mark.parametrize("unread", [False, True])
def test_a_peer_that_leaves_with_an_error_says_so(unread):
    with two_ranks() as (first, second):
        if unread:
            with_words_unread(first, second)
        second.leave(all_alive=False)
        text, seconds = error_of_waiting(first)
    assert "rank 1 of this job" in text and "that rank or the launcher says why" in text and seconds < 3


def test_who_is_alive_but_late_is_waited_for_until_the_time_is_over():
    with two_ranks() as (first, _second):
        text, seconds = error_of_waiting(first, 0.4)
    assert "it is alive, but sent nothing" in text and seconds >= 0.4


def third_is_killed(world, path):
    """Rank 2 is killed, rank 1 leaves because of that, and only then rank 0 looks at rank 1's connection."""
    found = connecting.open_transport(world)
    assert isinstance(found, Transport)
    world.barrier()
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    while found._pulse.lost is None:
        time.sleep(0.01)
    if world.rank == 1:
        found.leave(all_alive=False)
    else:
        time.sleep(1.0)
        with pytest.raises(LostRankError) as caught:
            found.lose(1, "it closed its connection")
        path.write_text(str(caught.value))
    os._exit(1)


def test_the_rank_that_was_lost_first_is_named(tmp_path):
    children, queue = start_ranks(3, third_is_killed, (tmp_path / "said",), str(tmp_path / "store"))
    for child in children:
        child.join(120)
    queue.close()
    said = (tmp_path / "said").read_text()
    assert "rank 2 of this job" in said and "its process has ended" in said


# Messages -----------------------------------------------------------------------------------------


def test_sections_go_through_a_narrow_connection_whole_and_in_order():
    first, second = socket.socketpair()
    for link in (first, second):
        link.setblocking(False)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    rng = np.random.default_rng(1)
    parts = [rng.integers(0, 255, size, dtype=np.uint8) for size in (64, 0, 30_000, 1, 7_777)]
    sections, state = (np.zeros((2, sockets.MOST, 2), np.int64), np.zeros((2, 3), np.int64))
    targets = [np.zeros_like(part) for part in parts]
    for k, arrays in enumerate((parts, targets)):
        sockets.clear_message(state[k])
        for array in arrays:
            sockets.add_section(sections[k], state[k], array.ctypes.data, array.nbytes)
    assert state[0, sockets.COUNT] == 4  # an empty one is none
    turns = 0
    while True:
        sent = sockets.send_some(first.fileno(), sections[0], state[0])
        came = sockets.receive_some(second.fileno(), sections[1], state[1])
        turns += 1
        assert sent in (sockets.MOVING, sockets.WHOLE)
        if came == sockets.WHOLE:
            break
    assert turns > 2 and all((a == b).all() for a, b in zip(parts, targets, strict=True))
    sockets.clear_message(state[1])
    sockets.add_section(sections[1], state[1], targets[0].ctypes.data, 64)
    assert sockets.receive_some(second.fileno(), sections[1], state[1]) == sockets.MOVING
    first.close()
    assert sockets.receive_some(second.fileno(), sections[1], state[1]) == sockets.CLOSED
    sockets.clear_message(state[0])
    sockets.add_section(sections[0], state[0], parts[0].ctypes.data, 64)
    assert sockets.send_some(second.fileno(), sections[0], state[0]) < 0  # and no signal ends the process
    second.close()


def test_bfloat16_is_torchs():
    values = torch.cat([torch.randn(5000), torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-42, 3.4e38])])
    values = torch.cat([values, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan")]), torch.zeros(1)])
    bits = values.numpy().view(np.uint32)
    width = 10
    lines = len(bits) // width
    narrow, back = np.zeros((lines + 3, width), np.uint16), np.zeros((lines + 2) * width, np.uint32)
    narrow_lines(bits, narrow, 0, lines, 3)
    expected = values[: lines * width].to(torch.bfloat16)
    found = torch.from_numpy(narrow[3:].reshape(-1).view(np.int16).copy()).view(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    widen_lines(narrow[3:], back, 0, lines, 2)
    wide = torch.from_numpy(back[2 * width :].view(np.float32))
    assert torch.equal(wide.nan_to_num(7.0), expected.float().nan_to_num(7.0)) and not narrow[:3].any()


def test_pulses_are_words_of_two_bytes():
    assert struct.calcsize("!H") == 2 and transport.ALIVE == 2**16 - 1 and PULSE != DATA
