"""The rows of the table: what is run, in which columns, and what Tandem has to reach."""

import os
import threading
import time

from bench import host, postgres
from bench.columns import NAMES
from bench.result import Row, interleaved, median, verdict

GIB = 1 << 30


def latency(bench, name, direction, allowance):
    def measure(column):
        host.progress(f"{name} {column} (halt poll {bench.halt})")
        return host.fio(bench.columns.get(column), bench.size, bench.seconds, rw=direction)["us"]
    for column in NAMES:
        bench.columns.get(column)
    values, rounds = interleaved(bench, measure)
    more = values["tandem"] - values["loop"]
    yield Row(name, "us", values, f"<= loop + {allowance} us", f"loop + {more:.1f} us",
              verdict(more, allowance, True, "us"), bench.halt, rounds)


def throughput(bench, name, share, twice_nbd=False, figure="iops", **job):
    """Also what a write costs the engine, since this is the run in which it is busiest."""
    spent = {"ns": [], "switches": []}
    writes = job["rw"] == "randwrite"

    def measure(column):
        host.progress(f"{name} {column} (halt poll {bench.halt})")
        path = bench.columns.get(column)
        if column != "tandem" or not writes:
            return host.fio(path, bench.size, bench.seconds, **job)[figure]
        pid, before, count = bench.server().engine(), None, host.requests(path, "write")
        before = host.usage(pid)
        result = host.fio(path, bench.size, bench.seconds, **job)[figure]
        after, count = host.usage(pid), host.requests(path, "write") - count
        for key, found in spent.items():
            found.append((after[key] - before[key]) / count)
        return result

    for column in NAMES:
        bench.columns.get(column)
    values, rounds = interleaved(bench, measure)
    of_loop, of_nbd = 100 * values["tandem"] / values["loop"], values["tandem"] / values["nbdfuse"]
    unit = "IOPS" if figure == "iops" else "MB/s"
    yield Row(name, unit, values, f">= {share} % of loop", f"{of_loop:.0f} % of loop",
              verdict(of_loop, share, False, "%"), bench.halt, rounds)
    if twice_nbd:
        yield Row(f"{name} against nbdfuse", "times", {"tandem": of_nbd}, ">= 2", f"{of_nbd:.1f}",
                  verdict(of_nbd, 2, False, "times"), bench.halt)
    if writes:
        cpu, switches = median(spent["ns"]) / 1e3, median(spent["switches"])
        yield Row("engine CPU per 4k write", "us", {"tandem": cpu}, "<= 10 us", f"{cpu:.1f} us",
                  verdict(cpu, 10, True, "us"), bench.halt, {"tandem": spent["ns"]})
        yield Row("context switches per 4k write", "", {"tandem": switches}, "<= 0.6", f"{switches:.2f}",
                  verdict(switches, 0.6, True, ""), bench.halt, {"tandem": spent["switches"]})


def pair(bench, filesystem, written):
    """The same filesystem on a loop device and on a volume, both in the same state of allocation: two mount points."""
    mounts, undo = {}, []
    tag = f"{filesystem}-{'written' if written else 'holes'}"
    path = bench.columns.file(f"{tag}", bench.mounted_size, written)
    devices = {"loop": host.loop_attach(path, bench.cleanup)}
    volume = f"tandem-bench-{tag}"
    devices["tandem"] = bench.server().volume(volume, bench.mounted_size)
    if written:
        host.fill(devices["tandem"], bench.mounted_size)
    for column, device in devices.items():
        mounts[column] = os.path.join(bench.directory, f"mnt-{tag}-{column}")
        undo.append(host.make_filesystem(filesystem, device, mounts[column], written, bench.cleanup))

    def away():
        for action in undo:
            action()
        bench.server().delete(volume)
        bench.cleanup.now(host.loop_detach, (devices["loop"],))
        os.unlink(path)
    return mounts, away


def appends(bench, filesystem, written):
    mounts, away = pair(bench, filesystem, written)
    name = f"fsync'd appends, {filesystem}" + ("" if written else ", sparse")

    def measure(column):
        host.progress(f"{name} {column} (halt poll {bench.halt})")
        path = os.path.join(mounts[column], "append")
        result = host.fio(path, "768M", bench.seconds, rw="write", ioengine="psync", direct=0, fdatasync=1,
                          fallocate="none")["iops"]
        os.unlink(path)
        return result

    values, rounds = interleaved(bench, measure, ("loop", "tandem"))
    away()
    share = 100 * values["tandem"] / values["loop"]
    yield Row(name, "IOPS", values, ">= 80 % of loop", f"{share:.0f} % of loop", verdict(share, 80, False, "%"),
              bench.halt, rounds)


def pgbench(bench):
    mounts, away = pair(bench, "ext4", True)
    values, rounds = postgres.compare(bench, mounts)
    away()
    share = 100 * values["tandem"] / values["loop"]
    yield Row("pgbench", "TPS", values, ">= 85 % of loop", f"{share:.0f} % of loop", verdict(share, 85, False, "%"),
              bench.halt, rounds)


def hundred_snapshots(bench):
    server, plain = bench.server(), bench.columns.get("tandem")
    name, count = "tandem-bench-chain", bench.chain
    chain = server.volume(name, bench.size)
    host.fill(chain, bench.size)
    for i in range(count):
        host.progress(f"snapshot {i + 1} of {count}")
        server.snapshot(name, f"tandem-bench-chain-{i}")
        host.run("fio", "--name=tandem-bench-dirty", f"--filename={chain}", f"--size={bench.size}", "--rw=randwrite",
                 "--bs=4k", "--iodepth=16", "--ioengine=io_uring", "--direct=1", "--number_ios=256", f"--randseed={i + 1}")
    paths = {"none": plain, "chain": chain}
    values, rounds = interleaved(
        bench, lambda k: host.fio(paths[k], bench.size, bench.seconds, rw="randread", iodepth=32)["iops"], paths)
    for i in range(count):
        server.ask("snapshot", "delete", f"tandem-bench-chain-{i}")
    server.settle(name)
    server.delete(name)
    share = 100 * values["chain"] / values["none"]
    yield Row(f"randread qd32 with {count} snapshots", "IOPS", {"tandem": values["chain"]},
              f">= 90 % of the volume without ({values['none']:,.0f})", f"{share:.0f} %", verdict(share, 90, False, "%"),
              bench.halt, rounds)


def after_snapshot(bench):
    """Before each round every block is the volume's own again: the snapshot goes and its layer is merged."""
    server, name = bench.server(), "tandem-bench-cow"
    device = server.volume(name, bench.size)
    host.fill(device, bench.size)
    rounds = {"before": [], "right after": [], "every 5 s": []}
    seconds = bench.every_seconds

    def writes(duration):
        return host.fio(device, bench.size, duration, rw="randwrite", iodepth=32)["iops"]

    for turn in range(bench.rounds):
        host.progress(f"writes after snapshots, round {turn + 1}")
        rounds["before"].append(writes(bench.seconds))
        server.snapshot(name, f"tandem-bench-cow-{turn}")
        rounds["right after"].append(writes(bench.seconds))
        taken, stop = [f"tandem-bench-cow-{turn}"], threading.Event()

        def every_five_seconds():
            while not stop.wait(5 if taken[1:] else 0.5):
                taken.append(f"tandem-bench-cow-{turn}-{len(taken)}")
                server.snapshot(name, taken[-1])

        thread = threading.Thread(target=every_five_seconds)
        thread.start()
        rounds["every 5 s"].append(writes(seconds))
        stop.set()
        thread.join()
        for snapshot in taken:
            server.ask("snapshot", "delete", snapshot)
        server.settle(name)
    server.delete(name)
    before = median(rounds["before"])
    for key, goal in (("right after", 80), ("every 5 s", 65)):
        share = 100 * median(rounds[key]) / before
        title = "randwrite qd32 right after a snapshot" if goal == 80 else "randwrite qd32, a snapshot every 5 s"
        yield Row(title, "IOPS", {"tandem": median(rounds[key])}, f">= {goal} % of before ({before:,.0f})",
                  f"{share:.0f} %", verdict(share, goal, False, "%"), bench.halt, rounds)


def fragment(device, size, extents):
    """One block in each stretch of equal length: as many extents as that."""
    gap = size // extents - 4096
    host.run("fio", "--name=tandem-bench-fragment", f"--filename={device}", f"--size={size}", f"--rw=write:{gap}",
             "--bs=4k", "--iodepth=64", "--ioengine=io_uring", "--direct=1", f"--number_ios={extents}")


def stalls(bench):
    """The slowest request at depth 1 around the call, under load, and how long the call takes, by size."""
    server, worst, durations = bench.server(), {"snapshot": 0.0, "clone": 0.0, "nothing": 0.0}, {}
    for size, extents in bench.stall_sizes:
        name, label = f"tandem-bench-stall-{size // GIB}", f"{size // GIB} GiB"
        host.progress(f"fragmenting {label}")
        device = server.volume(name, size)
        fragment(device, size, extents)
        load = host.fio_start(device, size, 120)
        bench.cleanup.add(host.end_process, load)
        probe = host.Probe(device, size)
        time.sleep(1)
        calls = {"nothing": lambda: time.sleep(1), "snapshot": lambda: server.snapshot(name, f"{name}-s"),
                 "clone": lambda: server.create(f"{name}-c", size, "--from-volume", name)}
        for call, action in calls.items():
            slowest, took = around(probe, action)
            worst[call] = max(worst[call], slowest)
            durations.setdefault(call, []).append((label, took))
        probe.close()
        host.end_process(load)
        server.ask("volume", "delete", f"{name}-c")
        server.ask("snapshot", "delete", f"{name}-s")
        server.delete(name)
    quiet = f"(without a call {worst['nothing'] * 1e3:.1f} ms)"
    for call in ("snapshot", "clone"):
        stall = worst[call] * 1e3
        took = ", ".join(f"{label} {seconds * 1e3:.0f} ms" for label, seconds in durations[call])
        yield Row(f"stall of a {call} under load", "ms", {"tandem": stall}, "< 20 ms", f"{stall:.1f} ms {quiet}",
                  verdict(stall, 20, True, "ms"), bench.halt)
        growth = durations[call][-1][1] / durations[call][0][1]
        yield Row(f"duration of a {call}", "ms", {"tandem": durations[call][-1][1] * 1e3}, "independent of the size", took,
                  verdict(growth, 2, True, "times the first size"), bench.halt)


def around(probe, action):
    """The slowest request while `action` runs and for half a second after, and the seconds of the action."""
    took, ended = [0.0], [None]

    def act():
        began = time.monotonic()
        action()
        ended[0] = time.monotonic()
        took[0] = ended[0] - began

    thread = threading.Thread(target=act)
    thread.start()
    slowest = probe.until(lambda: not thread.is_alive() and time.monotonic() > (ended[0] or 0) + 0.5)
    thread.join()
    return slowest, took[0]


def open_after_kill(bench):
    server, name, (size, extents) = bench.server(), "tandem-bench-open", bench.open_size
    host.progress(f"writing {extents} extents")
    device = server.volume(name, size)
    fragment(device, size, extents)
    probe, times = host.Probe(device, size), []
    for _ in range(bench.rounds):
        os.kill(server.engine(), 9)
        times.append(probe.once(write=False))
        probe.once()
        time.sleep(2)
    probe.close()
    server.delete(name)
    value = median(times)
    yield Row(f"open after kill, {size >> 30} GiB, {extents:,} extents", "s", {"tandem": value}, "< 1 s", f"{value:.2f} s",
              verdict(value, 1, True, "s"), bench.halt, {"tandem": times})


def idle(bench):
    """Attached and not used. The rows are of the engine, whose growth over an empty one is what volumes cost."""
    server, count = bench.server(), bench.idle
    began, names, creates = host.usage(server.engine()), [], []
    for i in range(count):
        host.progress(f"idle volume {i + 1} of {count}")
        names.append(f"tandem-bench-idle-{i}")
        creates.append(server.create(names[-1], GIB))
        server.stage(names[-1])
    time.sleep(3)
    pid = server.engine()
    before = host.usage(pid)
    time.sleep(10)
    after = host.usage(pid)
    late = sorted(creates[count // 2:])
    p99 = late[min(len(late) - 1, int(len(late) * 0.99))] * 1e3
    for name in names:
        server.delete(name)
    percent = (after["ns"] - before["ns"]) / 1e8
    per_hundred, mib = percent * 100 / count, after["rss"] / (1 << 20)
    threads = after["threads"] - began["threads"]
    yield Row(f"CPU of {count} idle volumes", "%", {"tandem": percent}, "<= 1 % of a core per 100",
              f"{per_hundred:.2f} % per 100", verdict(per_hundred, 1, True, "%"), bench.halt)
    yield Row(f"memory of {count} idle volumes", "MiB", {"tandem": mib}, f"<= {64 + count} MiB", f"{mib:.0f} MiB",
              verdict(mib, 64 + count, True, "MiB"), bench.halt)
    yield Row(f"threads more with {count} volumes", "", {"tandem": threads}, "none for each", f"{threads}",
              verdict(threads, count // 10, True, ""), bench.halt)
    yield Row(f"CreateVolume p99 with {count // 2} to {count} volumes", "ms", {"tandem": p99}, "< 100 ms", f"{p99:.0f} ms",
              verdict(p99, 100, True, "ms"), bench.halt)


# Name, how it is measured, and whether a halted CPU matters to it, so that it is measured both ways.
ROWS = (
    ("randwrite-qd1", lambda b: latency(b, "4k randwrite qd1", "randwrite", 12), True),
    ("randread-qd1", lambda b: latency(b, "4k randread qd1", "randread", 15), True),
    ("randwrite-qd32", lambda b: throughput(b, "4k randwrite qd32", 80, True, rw="randwrite", iodepth=32), True),
    ("randread-qd32", lambda b: throughput(b, "4k randread qd32", 80, True, rw="randread", iodepth=32), True),
    ("write-1m", lambda b: throughput(b, "1M write qd8", 90, figure="mbs", rw="write", bs="1M", iodepth=8), True),
    ("read-1m", lambda b: throughput(b, "1M read qd8", 90, figure="mbs", rw="read", bs="1M", iodepth=8), True),
    ("appends-ext4", lambda b: appends(b, "ext4", True), True),
    ("appends-xfs", lambda b: appends(b, "xfs", True), True),
    ("appends-ext4-sparse", lambda b: appends(b, "ext4", False), False),
    ("appends-xfs-sparse", lambda b: appends(b, "xfs", False), False),
    ("pgbench", pgbench, False),
    ("snapshots-100", hundred_snapshots, False),
    ("after-snapshot", after_snapshot, False),
    ("stalls", stalls, False),
    ("open-after-kill", open_after_kill, False),
    ("idle", idle, False),
)
