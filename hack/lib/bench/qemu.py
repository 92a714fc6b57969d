"""The peer of the mirror: qemu-storage-daemon, a quorum of a local file and of qemu-nbd at the other node."""

import json
import os
import shutil
import subprocess

from bench import host
from bench.columns import wait_for
from bench.host import Failed

PORT = 10809
PROGRAMS = ("qemu-storage-daemon", "qemu-nbd")


def quorum(cluster, directory, size, cleanup):
    """A loop device whose writes are done when both files have them. Its connection is in the clear."""
    host.run(os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "setup"), "qemu",
             timeout=3600)
    for program in PROGRAMS:
        if not shutil.which(program):
            raise Failed(f"{program} is not installed, and hack/setup qemu does not bring it")
    files = [os.path.join(directory, f"qemu-{node}.img") for node in (1, 2)]
    for path in files:
        with open(path, "wb") as file:
            file.truncate(size)
        host.fill(path, size)
    address, log = cluster.address(2), open(os.path.join(directory, "qemu.log"), "ab")
    mount = os.path.join(directory, "qemu-fuse")
    open(mount, "wb").close()
    local = {"driver": "file", "filename": files[0], "aio": "native", "cache": {"direct": True}, "node-name": "local"}
    far = {"driver": "nbd", "server": {"type": "inet", "host": address, "port": str(PORT)}, "node-name": "far"}
    both = {"driver": "quorum", "vote-threshold": 2, "children": ["local", "far"], "node-name": "both"}
    export = {"type": "fuse", "id": "export", "node-name": "both", "mountpoint": mount, "writable": True}
    nbd = cluster.inside(2, "qemu-nbd", "--persistent", "--shared=2", "--format=raw", "--cache=none", "--aio=native",
                         f"--bind={address}", f"--port={PORT}", files[1])
    start(nbd, log, cleanup)
    wait_for(lambda: not subprocess.run(cluster.inside(1, "qemu-nbd", "--list", f"--bind={address}", f"--port={PORT}"),
                                        capture_output=True).returncode, "qemu-nbd")
    blocks = [word for node in (local, far, both) for word in ("--blockdev", json.dumps(node))]
    daemon = cluster.inside(1, "qemu-storage-daemon", *blocks, "--export", json.dumps(export))
    process = start(daemon, log, cleanup)
    cleanup.add(host.unmount, mount)
    wait_for(lambda: process.poll() is not None or os.path.getsize(mount) == size, "qemu-storage-daemon")
    if process.poll() is not None:
        with open(os.path.join(directory, "qemu.log")) as file:
            raise Failed("qemu-storage-daemon ends at once: " + " ".join(file.read().splitlines()[-2:]))
    return host.loop_attach(mount, cleanup)


def start(command, log, cleanup):
    process = subprocess.Popen(command, stdout=log, stderr=log)
    cleanup.add(host.end_process, process)
    return process
