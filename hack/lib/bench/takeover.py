"""What becomes of a mirrored volume when the node that it is used on is killed: the seconds until the other one writes, and the bytes after it."""

import threading
import time

from bench import host
from bench.host import Failed
from bench.result import MirrorRow, median, verdict

NAME = "tandem-bench-killed"
EXTENT = 4 << 20
GOAL_SECONDS = 5
# Before the kill the first of so many parts of the volume is written to, and after it one in the middle.
PART = 8
# Between two looks at what the other node's copy is.
LOOK_SECONDS = 0.02


class Takeover:
    """From the kill of one node to the first write at the other, and when each step was seen."""

    def __init__(self, cluster, here, there):
        self.cluster, self.here, self.there = cluster, here, there
        self.moments, self.over, self.lock = {}, threading.Event(), threading.Lock()

    def note(self, what):
        with self.lock:
            self.moments.setdefault(what, time.monotonic())

    def watch(self):
        """Runs beside the calls."""
        while not self.over.wait(LOOK_SECONDS):
            try:
                mirror = self.cluster.show(NAME, self.there)["mirror"]
            except Failed:
                continue
            if mirror["wished"]:
                self.note("its copy knows that it is asked for")
            if mirror["role"].startswith("Primary"):
                self.note("lease and margin are over, it is primary")
            if mirror["role"] == "Primary" and mirror["serves"]:
                self.note("the silent copy is dropped, it serves")

    def run(self, size):
        """Seconds of each step in order, and the device at the other node."""
        watcher, began = threading.Thread(target=self.watch), time.monotonic()
        watcher.start()
        try:
            self.cluster.command("kill", "all", self.here)
            self.note("processes and devices of the node are gone")
            self.cluster.staged.pop(NAME)
            self.cluster.ask(self.there, "volume", "detach", NAME, f"node-{self.here}")
            self.note("unpublished")
            device = self.cluster.stage(NAME, self.there)
            self.note("published and staged")
            probe = host.Probe(device, size)
            probe.once()
            self.note("the first write is done")
            probe.close()
        finally:
            self.over.set()
            watcher.join()
        steps = {}
        for what, moment in sorted(self.moments.items(), key=lambda step: step[1]):
            steps[what], began = moment - began, moment
            if what == "the first write is done":
                break
        return steps, device


def kill_nodes(bench):
    mirror = bench.mirror()
    mirror.away()
    cluster, size, here, there = mirror.cluster, bench.mounted_size, 1, 2
    device = cluster.volume(NAME, size, True)
    # Not all of it: as few as its extents are, all that were ever written stay hot.
    host.fill(device, size // PART)
    took, copied = [], []
    for turn in range(bench.rounds):
        host.progress(f"killing node {here}, round {turn + 1}")
        end = bench.cleanup.add(host.end_process, host.fio_start(device, size // PART, 600, iodepth=8))
        time.sleep(2)
        hot = cluster.show(NAME, here)["mirror"]["hot_extents"]
        steps, device = Takeover(cluster, here, there).run(size)
        end()
        took.append(steps)
        copied.append(come_back(cluster, device, size, hot, here, there))
        here, there = there, here
    cluster.delete(NAME)
    yield from report(bench, size, took, copied)


def come_back(cluster, device, size, hot, here, there):
    """Writes a part without the dead node and starts it: the bytes that it got, and those that it may have lacked."""
    host.run("fio", "--name=tandem-bench-since", f"--filename={device}", f"--offset={size // 2}", f"--size={size // PART}",
             "--rw=randwrite", "--bs=4k", "--iodepth=16", "--ioengine=io_uring", "--direct=1", "--end_fsync=1",
             f"--number_ios={size // PART // 4096}")
    shown = cluster.show(NAME, there)
    lacked = shown["allocated_bytes"] + max(hot, shown["mirror"]["hot_extents"]) * EXTENT
    cluster.command("start", "all", here)
    cluster.await_whole(NAME, there)
    cluster.forget(NAME, here)
    return cluster.show(NAME, there)["mirror"]["copied_bytes"], lacked


def report(bench, size, took, copied):
    totals = [sum(steps.values()) for steps in took]
    middle = sorted(took, key=lambda steps: sum(steps.values()))[len(took) // 2]
    yield MirrorRow("mirror: node killed until the other one writes", "s", {"sync": median(totals)}, f"<= {GOAL_SECONDS} s",
                    f"{median(totals):.2f} s", verdict(median(totals), GOAL_SECONDS, True, "s"), bench.halt, {"sync": totals})
    for what, seconds in middle.items():
        yield MirrorRow(f"  {what}", "s", {"sync": seconds}, "", "", "", bench.halt)
    mib = [bytes_ >> 20 for bytes_, _ in copied]
    most = max((bytes_ - lacked) / (1 << 20) for bytes_, lacked in copied)
    bound = median([lacked >> 20 for _, lacked in copied])
    yield MirrorRow(f"mirror: resynced after a kill, of {size >> 20} MiB", "MiB", {"sync": median(mib)},
                    f"<= layers since and hot extents ({bound:,.0f} MiB)", f"{median(mib):,.0f} MiB",
                    verdict(most, 0, True, "MiB"), bench.halt, {"sync": mib})
