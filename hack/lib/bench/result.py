"""What a row of the table says, and how its rounds become one figure."""

import statistics

from bench.columns import NAMES

# The columns of the mirror's rows: one copy, two, qemu's two, and the round trip of an echo over the same TLS.
MIRROR = ("none", "sync", "qemu", "echo")


def median(rounds):
    return statistics.median(rounds) if rounds else None


def verdict(value, limit, at_most, unit):
    """`met`, or by how much it is missed."""
    if value is None or limit is None:
        return ""
    if value <= limit if at_most else value >= limit:
        return "met"
    return f"missed by {abs(value - limit):.3g} {unit}".rstrip()


class Row:
    """One line of the result, in the table that has its columns."""

    def __init__(self, name, unit, values, goal="", reached="", verdict="", halt="", rounds=None, columns=NAMES):
        self.name, self.unit, self.values, self.goal = name, unit, values, goal
        self.reached, self.verdict, self.halt, self.rounds = reached, verdict, halt, rounds or {}
        self.columns = columns

    def json(self):
        return dict(vars(self))


class MirrorRow(Row):
    """A line of the mirror's table."""

    def __init__(self, *line):
        super().__init__(*line)
        self.columns = MIRROR


def interleaved(bench, measure, columns=NAMES):
    """The medians of short rounds, all columns in each round, so that a change of the machine's mood meets all."""
    rounds = {name: [] for name in columns}
    for _ in range(bench.rounds):
        for name in columns:
            rounds[name].append(measure(name))
    return {name: median(values) for name, values in rounds.items()}, rounds
