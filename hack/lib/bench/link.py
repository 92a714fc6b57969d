#!/usr/bin/env python3
"""What lies between two nodes: an echo over TLS with their certificates, and a relay that takes its time.

    link.py serve ADDRESS PORT CERTIFICATES              answers echoes and swallows streams, until it is ended
    link.py echo ADDRESS PORT CERTIFICATES SECONDS       microseconds of a round trip of one write's bytes
    link.py stream ADDRESS PORT CERTIFICATES SECONDS     megabytes per second in one direction
    link.py relay MILLISECONDS PORTS NETNS ADDRESS NETNS ADDRESS     makes the round trip that much longer

Both ends of an echo block in their system calls, as the engines do, and have an interpreter between them and the kernel,
which the engines have not. The relay stands in each node's network namespace at the address of the other node.
"""

import collections
import ctypes
import json
import os
import select
import socket
import ssl
import statistics
import sys
import threading
import time

# A write of one block: the block and a header go there, a header comes back.
THERE, BACK = 4096 + 64, 64
# What is sent at once in a stream, and what a relay reads at once.
PIECE = 256 << 10
WARM_UP = 200
# What a relay has under way in one direction before it reads no more: the bandwidth of memory for 10 ms.
MOST_UNDER_WAY = 64 << 20
ECHO, STREAM = b"e", b"s"
PR_SET_TIMERSLACK = 29
CLONE_NEWNET = 0x40000000


def context(purpose, certificates):
    made = ssl.SSLContext(purpose)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    # The name of a node is in a URI, which is the replicas' business; whose certificate it is is checked here, too.
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(os.path.join(certificates, "ca.crt"))
    made.load_cert_chain(os.path.join(certificates, "tls.crt"), os.path.join(certificates, "tls.key"))
    return made


def read(stream, count):
    """False: the other end has closed."""
    left = count
    while left:
        got = len(stream.recv(min(left, PIECE)))
        if not got:
            return False
        left -= got
    return True


def answer(plain, tls):
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        with tls.wrap_socket(plain, server_side=True) as stream:
            if stream.recv(1) == ECHO:
                while read(stream, THERE):
                    stream.sendall(bytes(BACK))
            else:
                while read(stream, PIECE):
                    pass
    except OSError:
        pass  # the caller has ended


def serve(address, port, certificates):
    tls = context(ssl.PROTOCOL_TLS_SERVER, certificates)
    tls.num_tickets = 0
    with socket.create_server((address, int(port))) as listener:
        print("ready", flush=True)
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0], tls), daemon=True).start()


def call(address, port, certificates, kind):
    plain = socket.create_connection((address, int(port)), timeout=30)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream = context(ssl.PROTOCOL_TLS_CLIENT, certificates).wrap_socket(plain)
    stream.sendall(kind)
    return stream


def echo(address, port, certificates, seconds):
    times, request = [], os.urandom(THERE)
    with call(address, port, certificates, ECHO) as stream:
        end = None
        while end is None or time.perf_counter() < end:
            began = time.perf_counter()
            stream.sendall(request)
            if not read(stream, BACK):
                sys.exit("the other end of the echo is gone")
            times.append(time.perf_counter() - began)
            if end is None and len(times) >= WARM_UP:
                times, end = [], time.perf_counter() + float(seconds)
    print(json.dumps({"us": statistics.fmean(times) * 1e6, "median_us": statistics.median(times) * 1e6}))


def stream(address, port, certificates, seconds):
    piece, sent = os.urandom(PIECE), 0
    with call(address, port, certificates, STREAM) as to:
        began = time.perf_counter()
        while time.perf_counter() - began < float(seconds):
            to.sendall(piece)
            sent += len(piece)
        took = time.perf_counter() - began
    print(json.dumps({"mbs": sent / took / 1e6}))


class Way:
    """One direction of one connection: what was read, and when it is due at the other end."""

    def __init__(self, source, target, delay):
        self.source, self.target, self.delay = source, target, delay
        self.under_way, self.size = collections.deque(), 0

    def read(self):
        """False: the connection is over."""
        try:
            data = self.source.recv(PIECE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.under_way.append((time.monotonic() + self.delay, data))
        self.size += len(data)
        return bool(data)

    def due(self):
        return self.under_way[0][0] if self.under_way else None

    def write(self):
        """Sends what is due. False: the connection is over."""
        while self.under_way and self.under_way[0][0] <= time.monotonic():
            due, data = self.under_way[0]
            try:
                sent = self.target.send(data)
            except BlockingIOError:
                return True
            except OSError:
                return False
            self.size -= sent
            if sent == len(data):
                self.under_way.popleft()
            else:
                self.under_way[0] = (due, data[sent:])
        return True


class Relay:
    """Listens in two namespaces; a call in one goes on in the other. One thread; it sleeps to the microsecond."""

    def __init__(self, milliseconds, ports, ends):
        self.delay = float(milliseconds) / 2e3
        self.namespaces = {name: os.open(name, os.O_RDONLY) for name, _ in ends}
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
        self.listeners, self.ways = {}, []
        for (here, _), (there, address) in (ends, ends[::-1]):
            for port in ports:
                listener = self.inside(here, lambda at: socket.create_server(at, backlog=64), (address, port))
                self.listeners[listener] = (there, (address, port))

    def inside(self, namespace, make, *arguments):
        """A socket belongs to the namespace in which it is made, wherever its process is afterwards."""
        if self.libc.setns(self.namespaces[namespace], CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        return make(*arguments)

    def accept(self, listener):
        near = listener.accept()[0]
        try:
            far = self.inside(self.listeners[listener][0], socket.create_connection, self.listeners[listener][1])
        except OSError:
            return near.close()
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)
        self.ways += [Way(near, far, self.delay), Way(far, near, self.delay)]

    def close(self, way):
        for end in (way.source, way.target):
            end.close()
        self.ways = [other for other in self.ways if other.source is not way.source and other.source is not way.target]

    def run(self):
        while True:
            now = time.monotonic()
            blocked = [way.target for way in self.ways if way.under_way and way.due() <= now]
            later = [way.due() for way in self.ways if way.under_way and way.due() > now]
            sources = [way.source for way in self.ways if way.size < MOST_UNDER_WAY]
            readable, _, _ = select.select([*self.listeners, *sources], blocked, [],
                                           max(0, min(later) - now) if later else None)
            for listener in self.listeners.keys() & set(readable):
                self.accept(listener)
            for way in list(self.ways):
                if way.source.fileno() < 0:
                    continue
                if (way.source in readable and not way.read()) or not way.write():
                    self.close(way)


def relay(milliseconds, ports, *ends):
    made = Relay(milliseconds, [int(port) for port in ports.split(",")], [ends[:2], ends[2:]])
    print("ready", flush=True)
    made.run()


if __name__ == "__main__":
    {"serve": serve, "echo": echo, "stream": stream, "relay": relay}[sys.argv[1]](*sys.argv[2:])
