"""The two pictures of a comparison, from the table.json that compare.py writes.

    python benchmarks/pictures.py runs/compare --out benchmarks

compare.png: where every method ends, side by side within each dropout, AdapEmu beside AdapFu.
bytes.png: accuracy against what a client exchanges in a round. Needs matplotlib (pip install -r
benchmarks/requirements.txt); nothing that trains does.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import mean, stdev

NAMES = {"fedbiot": "FedBiOT", "fedot": "FedOT", "offsite": "Offsite-\nTuning", "fedavg": "FedAvg",
         "fedkseed": "FedKSeed", "fedkseed-pro": "FedKSeed-\nPro", "fedtt": "FedTT",
         "fedtt+": "FedTT+", "fedpt": "FedPT"}
ORDER = ["offsite", "fedot", "fedbiot"]                 # of the methods that have an emulator
LIGHT, DARK, OTHER = "#a9c4e4", "#1f5fa8", "#777777"    # AdapEmu, AdapFu, base and what is not run
MARKS = [("o", "#1f5fa8"), ("s", "#d1701c"), ("^", "#8a3fa0"), ("v", "#b03030")]    # a dropout
NO_EMULATOR = ("D", "#3a8f4d")


def name_of(row: dict, lines: bool = True) -> str:
    """`lines`: under a bar, in two or three lines; else beside a point, in one."""
    name = NAMES[row["method"]] + (f"\ns = {row['s']}" if row["s"] not in ("–", "2+2") else "")
    return name if lines else name.replace("-\n", "-").replace("\n", ", ")


def error(values: list[float]) -> float:
    return 100 * stdev(values) if len(values) > 1 else 0.0


# ---- where the methods end ----------------------------------------------------------------------

def bar(axis, x: float, values: list[float], colour: str, width: float):
    height = 100 * mean(values)
    axis.bar(x, height, width, yerr=error(values) or None, color=colour, capsize=2,
             error_kw={"elinewidth": 1})
    axis.text(x, height + error(values) + 1.2, f"{height:.0f}", ha="center", fontsize=9)


def panel(axis, rows: list[dict], title: str, base: float):
    for x, row in enumerate(rows):
        if not row.get("adapfu"):
            axis.text(x, 3, "not run", ha="center", rotation=90, color=OTHER, fontsize=9)
        elif row["adapemu"]:
            bar(axis, x - 0.21, row["adapemu"], LIGHT, 0.38)
            bar(axis, x + 0.21, row["adapfu"], DARK, 0.38)
        else:
            bar(axis, x, row["adapfu"], DARK, 0.5)
    axis.axhline(base, color=OTHER, linestyle=":", linewidth=1.2, zorder=0)
    axis.set_xticks(range(len(rows)), [name_of(row) for row in rows], fontsize=9)
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def draw_accuracy(rows: list[dict], path: Path, plt):
    base = 100 * next(row["base"][0] for row in rows if row.get("base"))
    panels = []
    for dropout in sorted({row["dropout"] for row in rows} - {"–"}):
        own = [row for row in rows if row["dropout"] == dropout]
        own.sort(key=lambda row: (ORDER.index(row["method"]), row["s"]))
        panels.append((own, f"dropout β = {dropout}"))
    if whole := [row for row in rows if row["dropout"] == "–"]:
        panels.append((whole, "no emulator"))
    lines = [panels[:-1], panels[-1:]] if len(whole) > 2 and panels[1:] else [panels]
    figure = plt.figure(figsize=(9, 0.5 + 3.2 * len(lines)))
    height = 0.94 if lines[1:] else 0.92                    # below the legend
    grid = figure.add_gridspec(len(lines), 1, top=height - 0.08 / len(lines), bottom=0.17 /
                               len(lines), left=0.07, right=0.99, hspace=0.42)
    for line, spot in zip(lines, grid):
        parts = spot.subgridspec(1, len(line), width_ratios=[len(own) for own, _ in line],
                                 wspace=0.06)
        for part, (own, title) in zip(parts, line):
            axis = figure.add_subplot(part)
            panel(axis, own, title, base)
            axis.set(ylim=(0, 108), yticks=range(0, 101, 20))
            if own is line[0][0]:
                axis.set_ylabel("accuracy, %")
            else:
                axis.set_yticklabels([])
    handles = [plt.Rectangle((0, 0), 1, 1, color=LIGHT), plt.Rectangle((0, 0), 1, 1, color=DARK),
               plt.Line2D([], [], color=OTHER, linestyle=":")]
    labels = ["AdapEmu: what the client has", "AdapFu: what the owner has", "base model"]
    figure.legend(handles, labels, loc="upper center", ncol=3, fontsize=9.5, frameon=False)
    figure.savefig(path, dpi=100)


# ---- accuracy against bytes ---------------------------------------------------------------------

def place_label(axis, x: float, y: float, text: str, colour: str, taken: list, renderer):
    """Beside the point, or further off with a line to it, where it overlaps nothing."""
    from matplotlib.text import Text
    spots = [(9, 0, "left", "center"), (0, 9, "center", "bottom"), (-9, 0, "right", "center"),
             (0, -9, "center", "top"), (7, 8, "left", "bottom"), (-7, 8, "right", "bottom"),
             (7, -8, "left", "top"), (-7, -8, "right", "top")]
    for far, (dx, dy, across, up) in itertools.product((1, 3, 5), spots):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7} if far > 1 else None
        label = axis.annotate(text, (x, y), (far * dx, far * dy), textcoords="offset points",
                              ha=across, va=up, fontsize=9, color=colour, arrowprops=line)
        label.update_positions(renderer)
        box = Text.get_window_extent(label, renderer)       # of the words, without the line
        inside = axis.bbox.contains(box.x0, box.y0) and axis.bbox.contains(box.x1, box.y1)
        if inside and not any(box.overlaps(other) for other in taken):
            break
        label.remove()
    taken.append(box)


def draw_bytes(rows: list[dict], path: Path, plt):
    from matplotlib.transforms import Bbox
    rows = [row for row in rows if row.get("adapfu")]
    figure, axis = plt.subplots(figsize=(9, 6.2))
    shown = sorted({row["dropout"] for row in rows} - {"–"})
    marks = dict(zip(shown, MARKS))
    if any(row["dropout"] == "–" for row in rows):
        marks |= {"–": NO_EMULATOR}
    points = [(row["bytes"] / 1e3, 100 * mean(row["adapfu"])) for row in rows]
    for row, (x, y) in zip(rows, points):
        mark, colour = marks[row["dropout"]]
        axis.errorbar(x, y, error(row["adapfu"]) or None, fmt=mark, color=colour, capsize=3)
    axis.set(xscale="log", xlabel="kB a client exchanges in a round, down + up",
             ylabel="accuracy after tuning (AdapFu), %")
    low, high = min(y for _, y in points), max(y for _, y in points)
    axis.set_ylim(low - 4, min(high + 4, 101))
    axis.set_xlim(min(x for x, _ in points) / 1.5, max(x for x, _ in points) * 1.9)
    ticks = [t for t in (10, 20, 50, 100, 200, 500, 1000) if axis.get_xlim()[0] < t <
             axis.get_xlim()[1]]
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Line2D([], [], marker=mark, color=colour, linestyle="")
               for mark, colour in marks.values()]
    labels = [f"β = {d}" if d != "–" else "no emulator" for d in marks]
    figure.legend(handles, labels, loc="upper center", ncol=3, fontsize=9.5, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    renderer = figure.canvas.get_renderer()
    taken = []
    for row, (x, y) in zip(rows, points):                   # the points and their error bars
        (left, low), (_, high) = axis.transData.transform(
            [(x, y - error(row["adapfu"])), (x, y + error(row["adapfu"]))])
        taken.append(Bbox.from_extents(left - 6, min(low, (low + high) / 2 - 6), left + 6,
                                       max(high, (low + high) / 2 + 6)))
    for row, (x, y) in sorted(zip(rows, points), key=lambda pair: -pair[1][1]):
        colour = marks[row["dropout"]][1]
        place_label(axis, x, y, name_of(row, lines=False), colour, taken, renderer)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--out of compare.py")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: the same)")
    args = parser.parse_args()
    path, out = args.folder / "table.json", args.out or args.folder
    if not path.is_file():
        sys.exit(f"error: {path}: no such file; python benchmarks/compare.py --table writes it")
    rows = json.loads(path.read_text())
    if not any(row.get("adapfu") for row in rows):
        sys.exit(f"error: {path}: no finished run in it")
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: matplotlib is not installed; pip install -r benchmarks/requirements.txt")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    draw_accuracy(rows, out / "compare.png", plt)
    draw_bytes(rows, out / "bytes.png", plt)


if __name__ == "__main__":
    main()
