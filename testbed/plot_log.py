"""Draws the training curves: `python -m testbed.plot_log` (needs matplotlib: the `plot` extra).

testbed/logs/FAMILY.jsonl are the logs as `testbed.train` wrote them, one after the other; curve.png shows the share of
answer tokens foreseen on the batches just seen (drawn, real and prose pieces), against the pictures drawn so far.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

LOGS = Path(__file__).parent / "logs"
KINDS = {"drawn": "tab:blue", "real": "tab:orange", "prose": "tab:grey"}


def main() -> None:
    """Writes curve.png beside the logs."""
    logs = sorted(LOGS.glob("*.jsonl"))
    figure, axes = plt.subplots(1, len(logs), figsize=(5 * len(logs), 3.6), sharey=True, layout="constrained")
    for axis, log in zip(axes, logs, strict=True):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for kind, colour in KINDS.items():
            points = [(line["pictures"], line[kind][1]) for line in lines if kind in line]
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=kind)
        axis.set(title=log.stem, xlabel="pictures drawn", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("answer tokens foreseen")
    axes[0].legend(loc="lower right")
    figure.savefig(LOGS / "curve.png", dpi=110)


if __name__ == "__main__":
    main()
