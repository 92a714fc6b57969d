"""A `tandem standalone` of the bench's own, asked through its command line as an operator would."""

import json
import os
import signal
import subprocess
import time

from bench import host
from bench.host import Failed, run

# Sparse volumes of a TiB on a pool that has less.
OVERCOMMIT = 100
# Merges go on in the background; the bench waits this long for one.
MERGE_PATIENCE = 300


class Server:
    """Started on first use, ended with everything that it has by `stop`."""

    def __init__(self, program, directory, cleanup):
        self.program, self.directory, self.cleanup = program, directory, cleanup
        self.dir = os.path.join(directory, "server")
        self.staged = {}
        self.log = open(os.path.join(directory, "server.log"), "ab")
        command = [program, "standalone", "--dir", self.dir, "--pool", f"default={directory}/pool",
                   "--overcommit", str(OVERCOMMIT), "--max-volumes-per-node", "1100"]
        os.makedirs(f"{directory}/pool", exist_ok=True)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        cleanup.add(self.stop)
        self.wait_ready()

    def wait_ready(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if subprocess.run([self.program, "volume", "list", "--dir", self.dir], capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        with open(f"{self.directory}/server.log") as file:
            raise Failed("the server does not start: " + " ".join(file.read().splitlines()[-3:]))

    def ask(self, *words):
        return run(self.program, *words, "--dir", self.dir)

    def ask_json(self, *words):
        return json.loads(self.ask(*words, "-o", "json"))

    def create(self, name, size, *more):
        """Seconds that it took, the start of the command line included."""
        began = time.monotonic()
        self.ask("volume", "create", name, "--size", str(size), "--block", *more)
        return time.monotonic() - began

    def stage(self, name):
        """The volume's block device."""
        path = os.path.join(self.directory, "stage", name)
        self.ask("volume", "stage", name, path, "--block")
        self.staged[name] = path
        return self.show(name)["device"]

    def volume(self, name, size):
        """A new volume's block device."""
        self.create(name, size)
        return self.stage(name)

    def show(self, name):
        return self.ask_json("volume", "show", name)

    def snapshot(self, volume, name):
        began = time.monotonic()
        self.ask("snapshot", "create", volume, name)
        return time.monotonic() - began

    def settle(self, name):
        """Waits until nothing of the volume waits for a merge."""
        deadline = time.monotonic() + MERGE_PATIENCE
        while time.monotonic() < deadline:
            if self.show(name)["merging_layers"] == 0:
                return
            time.sleep(0.2)
        raise Failed(f"volume {name} is still merging after {MERGE_PATIENCE} s")

    def delete(self, name):
        if name in self.staged:
            self.ask("volume", "unstage", name, self.staged.pop(name))
        self.ask("volume", "delete", name)

    def engine(self):
        """Process id of the engine."""
        return self.ask_json("status")["replica_pid"]

    def holders(self):
        """Processes that outlive the server on purpose."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read().decode(errors="replace").split("\0")
            except OSError:
                continue
            if len(words) > 1 and words[1] == "holder" and any(self.directory in word for word in words):
                found.append(int(pid))
        return found

    def stop(self):
        """Takes every volume off the machine, then ends the server. What refuses is ended by force."""
        for name, path in list(self.staged.items()):
            subprocess.run([self.program, "volume", "unstage", name, path, "--dir", self.dir], capture_output=True,
                           timeout=60)
        host.end_process(self.process)
        deadline = time.monotonic() + 10
        while self.holders() and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in self.holders():
            os.kill(pid, signal.SIGKILL)
        self.log.close()
