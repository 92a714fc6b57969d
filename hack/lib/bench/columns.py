"""The four things that are compared: a raw file, a loop device on it, nbdkit + nbdfuse + loop, and Tandem."""

import os
import subprocess
import time

from bench import host
from bench.host import Failed

NAMES = ("raw", "loop", "nbdfuse", "tandem")


class Columns:
    """What is there to compare: each column is a path for fio, written once from end to end."""

    def __init__(self, directory, size, cleanup, server):
        self.directory, self.size, self.cleanup, self.server = directory, size, cleanup, server
        self.paths = {}

    def get(self, name):
        if name not in self.paths:
            host.progress(f"preparing {name}")
            self.paths[name] = getattr(self, name)()
        return self.paths[name]

    def file(self, name, size=None, written=True):
        """A file on the pool's filesystem: written, or all holes."""
        path = os.path.join(self.directory, f"{name}.img")
        with open(path, "wb") as file:
            file.truncate(size or self.size)
        if written:
            host.fill(path, size or self.size)
        return path

    def raw(self):
        return self.file("raw")

    def loop(self):
        return host.loop_attach(self.get("raw"), self.cleanup)

    def nbdfuse(self):
        path, socket = self.file("nbd"), os.path.join(self.directory, "nbd.sock")
        mount = os.path.join(self.directory, "nbdfuse")
        os.makedirs(mount)
        kit = subprocess.Popen(["nbdkit", "--foreground", "--unix", socket, "file", path], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        self.cleanup.add(host.end_process, kit)
        wait_for(lambda: os.path.exists(socket), "nbdkit")
        fuse = subprocess.Popen(["nbdfuse", f"{mount}/disk", "--unix", socket], stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
        self.cleanup.add(host.end_process, fuse)
        self.cleanup.add(host.unmount, mount)
        wait_for(lambda: os.path.exists(f"{mount}/disk"), "nbdfuse")
        return host.loop_attach(f"{mount}/disk", self.cleanup)

    def tandem(self):
        device = self.server().volume("tandem-bench-main", self.size)
        host.fill(device, self.size)
        return device


def wait_for(ready, what):
    deadline = time.monotonic() + 10
    while not ready():
        if time.monotonic() > deadline:
            raise Failed(f"{what} does not come up")
        time.sleep(0.05)
