"""The machine under the bench: processes, loop devices, fio, and putting everything back."""

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time

HALT_POLL = "/sys/module/haltpoll/parameters/guest_halt_poll_ns"
HALT_POLL_ON = 200_000
# No single program of the bench takes longer; a hang is a failure, not a wait.
PATIENCE = 600
# What the engine sets on its own loop devices: the baselines get the same.
QUEUE = (("scheduler", "none"), ("wbt_lat_usec", "0"), ("nr_requests", "256"))

MKFS = {"ext4": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"),
        "xfs": ("mkfs.xfs", "-q", "-f", "-K")}


class Failed(Exception):
    """Something that the bench needs did not work; the text says what."""


def run(*command, check=True, timeout=PATIENCE, **options):
    """The output of a program that must succeed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, **options)
    if check and done.returncode:
        text = (done.stderr or done.stdout).strip().splitlines()
        raise Failed(f"{' '.join(map(str, command))}: {' '.join(text[-3:]) or done.returncode}")
    return done.stdout


def progress(text):
    """What is being done, for people only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


class Cleanup:
    """Undoes what was done, last first, whatever happened. An undo that fails is said and does not stop the others."""

    def __init__(self):
        self.undo = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda n, _: sys.exit(128 + n))

    def add(self, action, *arguments):
        self.undo.append((action, arguments))
        return lambda: self.now(action, arguments)

    def now(self, action, arguments):
        if (action, arguments) in self.undo:
            self.undo.remove((action, arguments))
            action(*arguments)

    def all(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while self.undo:
            action, arguments = self.undo.pop()
            try:
                action(*arguments)
            except Exception as error:  # noqa: BLE001: everything else still has to be undone
                print(f"cleaning up: {error}", file=sys.stderr)


def halt_poll_set(value):
    with open(HALT_POLL, "w") as file:
        file.write(str(value))


def halt_poll_modes(wanted, cleanup):
    """Which settings are measured. Where there is no such setting it is measured once, as `none`."""
    if not os.access(HALT_POLL, os.W_OK):
        return ["none"]
    with open(HALT_POLL) as file:
        cleanup.add(halt_poll_set, int(file.read()))
    return {"both": ["on", "off"], "on": ["on"], "off": ["off"]}[wanted]


def halt_poll(mode):
    if mode != "none":
        halt_poll_set(HALT_POLL_ON if mode == "on" else 0)


def prepare_queue(loop):
    for name, value in QUEUE:
        try:
            with open(f"/sys/block/{os.path.basename(loop)}/queue/{name}", "w") as file:
                file.write(value)
        except OSError:
            pass  # wbt is not in every kernel


def loop_detach(loop):
    """A device that something just closed may be busy for a moment."""
    for _ in range(50):
        if subprocess.run(["losetup", "--detach", loop], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    raise Failed(f"{loop} cannot be detached")


def loop_attach(path, cleanup):
    loop = run("losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096", path).strip()
    cleanup.add(loop_detach, loop)
    with open(f"/sys/block/{os.path.basename(loop)}/loop/dio") as file:
        if file.read().strip() != "1":
            raise Failed(f"{loop} on {path} does no direct I/O")
    prepare_queue(loop)
    return loop


def unmount(path):
    run("umount", path, check=False)
    if os.path.ismount(path):
        run("umount", "--lazy", path)


def end_process(process):
    """Ends a process that the bench started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def remove_tree(path):
    shutil.rmtree(path, ignore_errors=True)


def rewrite(device):
    """Writes every block of a device over itself: what reads as zeros is written from then on."""
    run("dd", f"if={device}", f"of={device}", "bs=1M", "conv=notrunc,fsync", "iflag=direct", "oflag=direct")


def make_filesystem(filesystem, device, mount, written, cleanup):
    """Makes it and mounts it; the answer undoes the mount. `written`: no block of it is a hole below."""
    os.makedirs(mount, exist_ok=True)
    run(*MKFS[filesystem], device)
    if written:
        # mkfs asks for zeros in journal and inode tables, and gets holes: they are written once, too.
        rewrite(device)
    run("mount", "-t", filesystem, device, mount)
    return cleanup.add(unmount, mount)


def fill(path, size):
    """Writes a file or device once from end to end, so that every block of it is allocated and written."""
    run("fio", "--name=tandem-bench-fill", f"--filename={path}", f"--size={size}", "--rw=write", "--bs=1M", "--iodepth=8",
        "--ioengine=io_uring", "--direct=1", "--end_fsync=1", "--randrepeat=1", "--randseed=7")


def fio(path, size, seconds=2.0, extra=(), **job):
    """One short run with a fixed seed; the figures of its writes or reads, whichever it did."""
    options = {"rw": "randwrite", "bs": "4k", "iodepth": 1, "ioengine": "io_uring", "direct": 1, "size": size} | job
    command = ["fio", "--name=tandem-bench", f"--filename={path}", "--output-format=json", "--time_based",
               f"--runtime={seconds}", "--ramp_time=0.3", "--randrepeat=1", "--randseed=4242", "--norandommap"]
    command += [f"--{name}={value}" for name, value in options.items()] + list(extra)
    text = run(*command, timeout=seconds + 120)
    done = json.loads(text[text.index("{"):])["jobs"][0]
    side = done["write"] if done["write"]["total_ios"] else done["read"]
    if done["error"] or not side["total_ios"]:
        raise Failed(f"fio on {path}: error {done['error']}, {side['total_ios']} requests")
    return {"iops": side["iops"], "mbs": side["bw_bytes"] / 1e6, "us": side["lat_ns"]["mean"] / 1e3,
            "max_us": side["lat_ns"]["max"] / 1e3}


def fio_start(path, size, seconds, **job):
    """The same in the background."""
    options = {"rw": "randwrite", "bs": "4k", "iodepth": 16, "ioengine": "io_uring", "direct": 1, "size": size} | job
    command = ["fio", "--name=tandem-bench-load", f"--filename={path}", "--time_based", f"--runtime={seconds}",
               "--norandommap", "--randseed=99"] + [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def requests(device, direction):
    """Requests that a block device has completed since it was made."""
    with open(f"/sys/block/{os.path.basename(device)}/stat") as file:
        return int(file.read().split()[0 if direction == "read" else 4])


def usage(pid):
    """CPU nanoseconds (threads that have ended included), context switches, threads and resident bytes of a process."""
    switches, threads = 0, 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/status") as file:
                switches += sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)
        except FileNotFoundError:
            continue
        threads += 1
    with open(f"/proc/{pid}/stat") as file:
        ticks = sum(int(field) for field in file.read().rsplit(")", 1)[1].split()[11:13])
    with open(f"/proc/{pid}/status") as file:
        resident = next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS")), 0)
    nanoseconds = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return {"ns": nanoseconds, "switches": switches, "threads": threads, "rss": resident}


class Probe:
    """One writer or reader of single blocks at queue depth 1, straight to a device, that keeps its slowest request."""

    def __init__(self, device, size):
        self.file = os.open(device, os.O_RDWR | os.O_DIRECT)
        self.block = mmap.mmap(-1, 4096)
        self.blocks = size // 4096
        self.at = 12345

    def close(self):
        os.close(self.file)

    def once(self, write=True):
        """Seconds that one request took."""
        self.at = (self.at * 1103515245 + 12345) % self.blocks
        began = time.monotonic()
        if write:
            os.pwritev(self.file, [self.block], self.at * 4096)
        else:
            os.preadv(self.file, [self.block], self.at * 4096)
        return time.monotonic() - began

    def until(self, over):
        """The slowest request until `over()` says so, in seconds."""
        slowest = 0.0
        while not over():
            slowest = max(slowest, self.once())
        return slowest
