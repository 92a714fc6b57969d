"""The rows of the mirror: volumes with and without a second copy in one cluster, and what becomes of them when nodes die."""

import collections
import os
import shutil
import subprocess
import time

from bench import host, postgres, qemu, takeover
from bench.cluster import Cluster, Link, until
from bench.host import Failed
from bench.result import MirrorRow, interleaved, median, verdict

GIB = 1 << 30
# What the goal of the latency allows beside the network.
ALLOWANCE_US = 15
# Reads are "as none": the rounds of one column differ by as much.
LIKE_PERCENT = 10
# How often a resync is looked at: each look is a process on a machine of two cores.
LOOK_SECONDS = 0.2
# All rounds of one of its rows: a resync that is not done by then is told as far as it came, and the other rows go on.
RESYNC_PATIENCE = 300
# Blocks are scattered and applications write in these, so that a resync gains nothing from neighbours.
BLOCK = 4096


class Mirror:
    """What the rows share: the cluster, its volumes by column, and the link."""

    def __init__(self, program, bench):
        self.bench, self.cleanup, self.directory = bench, bench.cleanup, bench.directory
        room(bench)
        self.cluster = Cluster(program, bench.directory, bench.cleanup)
        self.link = Link(self.cluster, bench.cleanup)
        self.paths, self.why_not = {}, {}

    def device(self, column):
        """The column's block device; None if it cannot be had, and `why_not` says why."""
        if column not in self.paths:
            host.progress(f"preparing {column}")
            self.paths[column] = self.quorum() if column == "qemu" else self.volume(column)
        return self.paths[column]

    def volume(self, column):
        device = self.cluster.volume(f"tandem-bench-{column}", self.bench.mirror_size, column == "sync")
        host.fill(device, self.bench.working_set)
        return device

    def quorum(self):
        try:
            return qemu.quorum(self.cluster, self.directory, self.bench.size, self.cleanup)
        except (Failed, OSError, subprocess.TimeoutExpired) as error:
            self.why_not["qemu"] = str(error)
            return None

    def away(self):
        """The volumes of the columns are at node 1: they go before it is killed."""
        for column in ("none", "sync"):
            if self.paths.pop(column, None):
                self.cluster.delete(f"tandem-bench-{column}")

    def fio(self, column, **job):
        size = self.bench.size if column == "qemu" else self.bench.working_set
        return host.fio(self.device(column), size, self.bench.seconds, **job)


def room(bench):
    """The disk must hold all copies: a pool that becomes full makes writes wait, for ever here."""
    wanted = 3 * bench.working_set + 2 * bench.size + 4 * bench.scattered + GIB
    free = shutil.disk_usage(bench.directory).free
    if free < wanted:
        raise Failed(f"{bench.directory} has {free / GIB:.0f} GiB free, and the mirror's rows want {wanted / GIB:.0f}: "
                     "choose another --dir, or a smaller --working-set")


def write_latency(bench):
    mirror, name = bench.mirror(), "mirror: 4k randwrite qd1"
    columns = [column for column in ("none", "sync", "qemu") if mirror.device(column)]

    def measure(column):
        host.progress(f"{name} {column} (halt poll {bench.halt})")
        return mirror.link.round_trip(bench.seconds) if column == "echo" else mirror.fio(column)["us"]

    values, rounds = interleaved(bench, measure, (*columns, "echo"))
    more = values["sync"] - values["none"] - values["echo"]
    yield MirrorRow(name, "us", values, f"<= none + echo + {ALLOWANCE_US} us", f"none + echo {more:+.1f} us",
              verdict(more, ALLOWANCE_US, True, "us"), bench.halt, rounds)
    if "qemu" in columns:
        share = 100 * values["sync"] / values["qemu"]
        yield MirrorRow(f"{name} against qemu", "%", {"sync": share}, "<= 60 % of qemu", f"{share:.0f} %, whose link is in the clear",
                  verdict(share, 60, True, "%"), bench.halt)
    else:
        yield MirrorRow(f"{name} against qemu", "%", {}, "<= 60 % of qemu", f"no qemu: {mirror.why_not['qemu']}", "", bench.halt)


def read_latency(bench):
    mirror, name = bench.mirror(), "mirror: 4k randread qd1"

    def measure(column):
        host.progress(f"{name} {column} (halt poll {bench.halt})")
        return mirror.fio(column, rw="randread")["us"]

    values, rounds = interleaved(bench, measure, ("none", "sync"))
    share = 100 * values["sync"] / values["none"]
    yield MirrorRow(name, "us", values, f"as none: <= {100 + LIKE_PERCENT} %", f"{share:.0f} % of none",
              verdict(share, 100 + LIKE_PERCENT, True, "%"), bench.halt, rounds)


def throughput(bench, name, share, figure="iops", **job):
    mirror = bench.mirror()

    def measure(column):
        host.progress(f"{name} {column} (halt poll {bench.halt})")
        return mirror.fio(column, **job)[figure]

    values, rounds = interleaved(bench, measure, ("none", "sync"))
    reached = 100 * values["sync"] / values["none"]
    yield MirrorRow(name, "IOPS" if figure == "iops" else "MB/s", values, f">= {share} % of none", f"{reached:.0f} % of none",
              verdict(reached, share, False, "%"), bench.halt, rounds)


def pgbench(bench):
    mirror, mounts, undo = bench.mirror(), {}, []
    for column in ("none", "sync"):
        name = f"tandem-bench-postgres-{column}"
        device = mirror.cluster.volume(name, bench.mounted_size, column == "sync")
        host.fill(device, bench.mounted_size)
        mounts[column] = os.path.join(bench.directory, f"mnt-mirror-{column}")
        undo.append((host.make_filesystem("ext4", device, mounts[column], True, bench.cleanup), name))
    values, rounds = postgres.compare(bench, mounts)
    for unmount, name in undo:
        unmount()
        mirror.cluster.delete(name)
    share = 100 * values["sync"] / values["none"]
    yield MirrorRow("mirror: pgbench", "TPS", values, ">= 70 % of none", f"{share:.0f} % of none", verdict(share, 70, False, "%"),
              bench.halt, rounds)


def far(bench):
    """With a longer way between the nodes, and the round trip measured over that way."""
    mirror = bench.mirror()
    mirror.device("sync")
    for milliseconds, depths in ((1, (1, 8)), (5, (32,)), (10, (32,))):
        shorter = mirror.link.longer(milliseconds)
        mirror.cluster.await_whole("tandem-bench-sync", 1)
        for depth in depths:
            name = f"mirror: 4k randwrite qd{depth}, {milliseconds} ms away"

            def measure(column, name=name, depth=depth):
                host.progress(f"{name} {column}")
                return mirror.link.round_trip(bench.seconds) if column == "echo" else mirror.fio(column, iodepth=depth)["us"]

            values, rounds = interleaved(bench, measure, ("sync", "echo"))
            more = 100 * (values["sync"] / values["echo"] - 1)
            yield MirrorRow(name, "us", values, "<= echo + 15 %", f"echo {more:+.0f} %, {depth * 1e6 / values['sync']:,.0f} IOPS",
                      verdict(more, 15, True, "%"), bench.halt, rounds)
        shorter()
        mirror.cluster.await_whole("tandem-bench-sync", 1)


CaughtUp = collections.namedtuple("CaughtUp", "seconds copied equal requests left")


class Resync:
    """Node 2's replica is killed, `scattered` bytes are written without it, and it comes back."""

    def __init__(self, mirror):
        self.mirror, self.cluster, self.name = mirror, mirror.cluster, "tandem-bench-sync"
        self.device, self.bytes = mirror.device("sync"), mirror.bench.scattered

    def fall_behind(self):
        self.cluster.command("kill", "replica", 2)
        until(lambda: self.cluster.other(self.name, 1)["state"] != "UpToDate", "the killed copy is not dropped")
        host.run("fio", "--name=tandem-bench-scatter", f"--filename={self.device}", f"--size={self.mirror.bench.mirror_size}",
                 "--rw=randwrite", f"--bs={BLOCK}", "--iodepth=32", "--ioengine=io_uring", "--direct=1", "--end_fsync=1",
                 f"--number_ios={self.bytes // BLOCK}", "--randrepeat=1", "--randseed=11")

    def catch_up(self, deadline):
        """Seconds of the copying, the bytes that were copied and compared, the requests that an application has had written
        meanwhile, and what is left if it is not done by the deadline."""
        self.cluster.command("start", "replica", 2)
        began = None
        while True:
            mirror = self.cluster.show(self.name, 1)["mirror"]
            other = next(copy for copy in mirror["copies"] if not copy["here"])
            now, requests = time.monotonic(), host.requests(self.device, "write")
            if began is None and other["state"] == "SyncTarget":
                began, first = now, requests
            whole = other["state"] == "UpToDate" and other["connected"]
            if whole or now > deadline:
                break
            time.sleep(LOOK_SECONDS)
        if began is None:
            raise Failed("the copy was brought up to date before anybody could look: more must be scattered" if whole
                         else "nobody began to bring the copy up to date")
        return CaughtUp(now - began, mirror["copied_bytes"], mirror["equal_bytes"], requests - first,
                        0 if whole else other["left_bytes"])

    def loaded(self):
        """An application at depth 8, and what ends it."""
        load = host.fio_start(self.device, self.mirror.bench.working_set, 3600, iodepth=8)
        end = self.mirror.cleanup.add(host.end_process, load)
        time.sleep(1)
        return end

    def undisturbed(self):
        """Its requests per second while both copies are members."""
        end, seconds = self.loaded(), 2 * self.mirror.bench.seconds
        before = host.requests(self.device, "write")
        time.sleep(seconds)
        requests = host.requests(self.device, "write") - before
        end()
        return requests / seconds


def rounds(bench, name, measure):
    """What each round says, until one is not done by the deadline of them all; and how far that one came."""
    deadline, values = time.monotonic() + RESYNC_PATIENCE, []
    for turn in range(bench.rounds):
        host.progress(f"{name}, round {turn + 1}")
        value, done = measure(deadline)
        values.append(value)
        if done.left:
            how_far = f"NOT DONE within {RESYNC_PATIENCE} s: {done.copied >> 20:,} MiB copied, at most {done.left >> 20:,} left"
            return values, how_far
        if time.monotonic() > deadline:
            break
    return values, f"{done.copied >> 20:,} MiB copied, {done.equal >> 20:,} compared and equal, in {done.seconds:.1f} s"


def resync(bench):
    mirror = bench.mirror()
    work = Resync(mirror)
    disk = median([mirror.fio("none", rw="randwrite", iodepth=32)["mbs"] for _ in range(bench.rounds)])
    link = mirror.link.bandwidth(bench.seconds)
    least, size = min(disk, link), f"{bench.scattered >> 20} MiB scattered over {bench.mirror_size >> 20}"

    def alone(deadline):
        work.fall_behind()
        done = work.catch_up(deadline)
        return done.copied / done.seconds / 1e6, done

    def beside(deadline):
        whole = work.undisturbed()
        work.fall_behind()
        end = work.loaded()
        done = work.catch_up(deadline)
        end()
        return 100 * (1 - done.requests / done.seconds / whole), done

    rates, how_far = rounds(bench, "resync", alone)
    share = 100 * median(rates) / least
    yield MirrorRow(f"mirror: resync of {size}", "MB/s", {"sync": median(rates)}, f">= 80 % of min(disk {disk:.0f}, link {link:.0f})",
                    f"{share:.0f} %, {how_far}", verdict(share, 80, False, "%"), bench.halt, {"sync": rates})
    mirror.cluster.await_whole("tandem-bench-sync", 1)
    lost, how_far = rounds(bench, "resync under load", beside)
    yield MirrorRow("mirror: application IOPS lost to a resync, qd8", "%", {"sync": median(lost)}, "<= 10 %",
                    f"{median(lost):.0f} %, {how_far}", verdict(median(lost), 10, True, "%"), bench.halt, {"sync": lost})


# As in rows.py.
ROWS = (
    ("mirror-randwrite-qd1", write_latency, True),
    ("mirror-randread-qd1", read_latency, True),
    ("mirror-randwrite-qd32", lambda b: throughput(b, "mirror: 4k randwrite qd32", 50, rw="randwrite", iodepth=32), True),
    ("mirror-randread-qd32", lambda b: throughput(b, "mirror: 4k randread qd32", 100 - LIKE_PERCENT, rw="randread", iodepth=32),
     True),
    ("mirror-write-1m", lambda b: throughput(b, "mirror: 1M write qd8", 45, figure="mbs", rw="write", bs="1M", iodepth=8), True),
    ("mirror-pgbench", pgbench, False),
    ("mirror-far", far, False),
    ("mirror-resync", resync, False),
    ("mirror-killed-node", takeover.kill_nodes, False),
)
