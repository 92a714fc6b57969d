"""A cluster of two nodes of the bench's own, made by hack/cluster and asked through CSI; and the link between its nodes."""

import json
import os
import subprocess
import sys
import time

from bench import host
from bench.host import Failed, run

HACK = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LINK = os.path.join(HACK, "lib", "bench", "link.py")
# The pool that only node 1 has: a volume in it is there, and has no second copy.
SINGLE = "single"
# Sparse volumes, and what is reserved for a copy that leaves, are more than the disk has.
FLAGS = "--overcommit 100"
# hack/cluster's port between replicas, and the one of the bench's own server beside it.
MIRROR_PORT, LINK_PORT = 7402, 7410
# A copy is brought up to date, or a volume is taken over, within this many seconds.
PATIENCE = 300
SHOW_PAUSE = 0.05


class Cluster:
    """Started on first use; `stop` takes the volumes away and then the cluster."""

    def __init__(self, program, directory, cleanup):
        self.program, self.directory, self.cleanup = program, directory, cleanup
        self.dir = os.path.join(directory, "cluster")
        self.staged = {}
        pools = f"--pool default={self.dir}/node-1/pool --pool {SINGLE}={self.dir}/node-1/{SINGLE}"
        self.environment = os.environ | {"TANDEM": program, "TANDEM_CLUSTER_NODE_FLAGS": FLAGS,
                                         "TANDEM_CLUSTER_NODE_FLAGS_1": f"{FLAGS} {pools}"}
        host.progress("a cluster of two nodes")
        cleanup.add(self.stop)
        self.command("up", 2)
        with open(os.path.join(self.dir, "cluster")) as file:
            said = dict(line.strip().split("=", 1) for line in file)
        self.tag, self.net = said["tag"], said["net"]

    def command(self, *words):
        """Of hack/cluster."""
        return run(os.path.join(HACK, "cluster"), "--dir", self.dir, *words, env=self.environment)

    def stop(self):
        if not os.path.exists(os.path.join(self.dir, "cluster")):
            return
        try:
            for name, node in list(self.staged.items()):
                subprocess.run(self.words(node, "volume", "unstage", name, self.stage_path(name, node)), capture_output=True,
                               timeout=60)
        finally:
            self.command("down")

    def words(self, node, *words):
        where = f"{self.dir}/node-{node}" if node else f"{self.dir}/controller"
        return [self.program, *map(str, words), "--dir", where, "--controller-endpoint",
                f"unix://{self.dir}/controller/csi.sock"]

    def ask(self, node, *words):
        """Node 0 is the controller."""
        return run(*self.words(node, *words))

    def stage_path(self, name, node):
        return f"{self.dir}/node-{node}/staged-{name}"

    def volume(self, name, size, mirrored, node=1):
        """A new volume's block device at a node."""
        place = ("--parameter", "replication=sync") if mirrored else ("--pool", SINGLE)
        self.ask(0, "volume", "create", name, "--size", size, "--block", *place)
        return self.stage(name, node)

    def stage(self, name, node):
        """Repeated until it can be used there, as kubelet does it."""
        until(lambda: subprocess.run(self.words(node, "volume", "stage", name, self.stage_path(name, node), "--block"),
                                     capture_output=True).returncode == 0, f"{name} cannot be used at node {node}")
        self.staged[name] = node
        return self.show(name, node)["device"]

    def unstage(self, name):
        node = self.staged.pop(name)
        self.ask(node, "volume", "unstage", name, self.stage_path(name, node))

    def forget(self, name, node):
        """The node was killed with the volume on it and is back."""
        self.ask(node, "volume", "unstage", name, self.stage_path(name, node))

    def delete(self, name):
        # A node with a copy: the controller knows it by its id only.
        node = self.staged.get(name, 1)
        if name in self.staged:
            self.unstage(name)
        self.ask(node, "volume", "delete", name)

    def show(self, name, node):
        return json.loads(self.ask(node, "volume", "show", name, "-o", "json"))

    def other(self, name, node):
        """What the node's copy knows of the other copy."""
        return next(copy for copy in self.show(name, node)["mirror"]["copies"] if not copy["here"])

    def is_whole(self, name, node):
        other = self.other(name, node)
        return other["state"] == "UpToDate" and other["connected"]

    def await_whole(self, name, node):
        until(lambda: self.is_whole(name, node), f"the other copy of {name} is not brought up to date")

    def inside(self, node, *words):
        """A program in the network namespace of a node."""
        return ["nsenter", f"--net={self.namespace(node)}", "--", *map(str, words)]

    def namespace(self, node):
        return f"/run/netns/{self.tag}-node-{node}"

    def address(self, node):
        return f"{self.net}.{10 + node}"


def until(true, otherwise):
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise Failed(f"{otherwise} within {PATIENCE} s")
        time.sleep(SHOW_PAUSE)


class Link:
    """The way between the nodes: what it takes, and what it takes when it is made longer."""

    def __init__(self, cluster, cleanup):
        self.cluster, self.cleanup = cluster, cleanup
        self.there = (cluster.address(2), LINK_PORT)
        self.start("server", *cluster.inside(2, sys.executable, LINK, "serve", *self.there, self.certificates(2)))

    def certificates(self, node):
        return f"{self.cluster.dir}/node-{node}/certificates"

    def start(self, what, *command):
        """In the background, from when it says that it is ready; the answer ends it."""
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        end = self.cleanup.add(host.end_process, process)
        if process.stdout.readline().strip() != b"ready":
            raise Failed(f"the {what} of the link does not start")
        return end

    def ask(self, kind, seconds):
        text = run(*self.cluster.inside(1, sys.executable, LINK, kind, *self.there, self.certificates(1), seconds))
        return json.loads(text)

    def round_trip(self, seconds):
        """Microseconds of an echo of a write's bytes over TLS."""
        return self.ask("echo", seconds)["us"]

    def bandwidth(self, seconds):
        """MB/s of one stream over TLS."""
        return self.ask("stream", seconds)["mbs"]

    def longer(self, milliseconds):
        """Puts a relay between the nodes, which ends what is connected. The answer takes it away."""
        ends = []
        for node in (1, 2):
            self.address("add", node)
            ends += [self.cluster.namespace(node), self.cluster.address(node)]
        end = self.start("relay", sys.executable, LINK, "relay", milliseconds, f"{MIRROR_PORT},{LINK_PORT}", *ends)

        def shorter():
            end()
            for node in (1, 2):
                self.address("del", node)
        return shorter

    def address(self, verb, node):
        """The other node's address on this one's loopback, where the relay is; nobody else hears of it."""
        name = f"{self.cluster.tag}-node-{node}"
        run(*self.cluster.inside(node, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore"))
        run("ip", "-n", name, "address", verb, f"{self.cluster.address(3 - node)}/32", "dev", "lo")
