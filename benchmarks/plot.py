"""Curves of one or several runs in one picture, from their log.csv: losses, accuracy, bytes.

    python benchmarks/plot.py runs/gsm8k-fedbiot-b0.2-s2-seed0 runs/… --out curves.png

Needs matplotlib (pip install matplotlib); of this project only the comparison's pictures do, too.
"""
import argparse
import csv
import sys
from itertools import accumulate
from pathlib import Path

MODELS = {"base": "x", "adapemu": "s", "adapfu": "o", "full": "o", "small": "s", "distilled": "D",
          "proxy": "o"}             # the mark of each


def read_log(folder) -> list[dict[str, float]]:
    """The rows of a run's log.csv; a cell that is empty is absent."""
    path = Path(folder) / "log.csv"
    if not path.is_file():
        sys.exit(f"error: {path}: no such file; expected a run folder of train.py")
    with open(path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return rows or sys.exit(f"error: {path}: no finished round yet")


def column(rows, name) -> tuple[list[float], list[float]]:
    """(rounds, values) where the column has a value."""
    found = [(row["round"], row[name]) for row in rows if name in row]
    return [x for x, _ in found], [y for _, y in found]


def exchanged(rows) -> tuple[list[float], list[float]]:
    """(rounds, MB down and up a client since the start). The bootstrap is not in the log."""
    so_far = accumulate(row["bytes_down"] + row["bytes_up"] for row in rows)
    return column(rows, "round")[0], [b / 1e6 for b in so_far]


def measured(runs: dict[str, list[dict]]) -> list[str]:
    """The losses of any run, in the log's order: the client's, and every term of the alignment."""
    names = (name for rows in runs.values() for row in rows for name in row)
    return list(dict.fromkeys(n for n in names if n == "client_loss" or n.startswith("align_")))


def draw(runs: dict[str, list[dict]], plt):
    """One panel a quantity, one colour a run; a model's accuracy has its own mark."""
    losses = measured(runs)
    titles = [*losses, "accuracy", "MB a client, down + up, so far"]
    figure, axes = plt.subplots(1, len(titles), figsize=(4 * len(titles), 4), sharex=True,
                                layout="constrained")
    for axis, title in zip(axes, titles):
        axis.set(title=title.replace("_", " "), xlabel="round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    *of_losses, accuracy, megabytes = axes
    for i, (label, rows) in enumerate(runs.items()):
        colour = f"C{i}"
        for axis, name in zip(of_losses, losses):
            axis.plot(*column(rows, name), color=colour, label=label)
        for name, mark in MODELS.items():
            if any(name in row for row in rows):
                accuracy.plot(*column(rows, name), color=colour, marker=mark, markersize=7,
                              label=f"{label}: {name}")
        megabytes.plot(*exchanged(rows), color=colour)
    for axis in (axes[0], accuracy):
        axis.legend(fontsize=7)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--out", default="curves.png", help="picture to write: .png, .svg, .pdf")
    args = parser.parse_args(argv)
    runs = {Path(folder).resolve().name: read_log(folder) for folder in args.runs}
    if len(runs) < len(args.runs):                      # two runs of one name: show where they lie
        runs = {str(folder): read_log(folder) for folder in args.runs}
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: matplotlib is not installed; pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    draw(runs, plt).savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
