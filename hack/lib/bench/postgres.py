"""A PostgreSQL of the bench's own, and pgbench on it."""

import glob
import os
import re

from bench import host
from bench.host import Failed, run
from bench.result import interleaved

SCALE = 10


def programs():
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not found:
        raise Failed("PostgreSQL is not installed: run hack/setup")
    return found[-1]


class Cluster:
    """Initialised, filled and running until `stop`."""

    def __init__(self, data, bench):
        self.bin, self.data = programs(), data
        self.sockets = os.path.join(bench.directory, f"pg-{len(os.listdir(bench.directory))}")
        for path in (self.data, self.sockets):
            os.makedirs(path)
            run("chown", "postgres", path)
        host.progress(f"initdb in {data}")
        self.as_postgres("initdb", "--pgdata", data, "--auth", "trust", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={self.sockets} -c shared_buffers=128MB -c max_wal_size=4GB"
        self.as_postgres("pg_ctl", "--pgdata", data, "--wait", "--log", f"{self.sockets}/log", "-o", options, "start")
        self.stop = bench.cleanup.add(self.end)
        self.as_postgres("pgbench", "-h", self.sockets, "-i", "-q", "-s", SCALE, "postgres")

    def as_postgres(self, program, *arguments):
        return run("runuser", "-u", "postgres", "--", f"{self.bin}/{program}", *arguments, cwd="/")

    def end(self):
        self.as_postgres("pg_ctl", "--pgdata", self.data, "--wait", "--mode", "fast", "stop")

    def tps(self, seconds):
        text = self.as_postgres("pgbench", "-h", self.sockets, "-c", 8, "-j", 2, "-T", seconds, "postgres")
        return float(re.search(r"tps = ([0-9.]+)", text).group(1))


def compare(bench, mounts):
    """The transactions per second of a PostgreSQL in each of these directories."""
    clusters = {column: Cluster(os.path.join(path, "data"), bench) for column, path in mounts.items()}

    def measure(column):
        host.progress(f"pgbench {column} (halt poll {bench.halt})")
        return clusters[column].tps(bench.pgbench_seconds)

    values, rounds = interleaved(bench, measure, tuple(mounts))
    for cluster in clusters.values():
        cluster.stop()
    return values, rounds
