"""Methods x dropout x adapter x seeds on one model, one data set and one budget: the paper's Table 2.

Every cell is one run of train.py in its own folder; a finished run is not repeated and a killed one
goes on, so the command can be stopped and given again. Learning rates come first: of RATES every cell
tries three neighbours, and then the next beyond the best, until that is worse, at the first seed with
--validate, which holds out training rows. The test set takes no part in the choice. All methods get
the same rounds, steps and batch; flags after `--` go to every train.py.

    python benchmarks/compare.py --methods fedbiot fedot offsite fedavg --dropouts 0.2 0.5 --adapters 2 4 --seeds 0 1 2
    python benchmarks/compare.py --ablations --seeds 0 1 2
    python benchmarks/compare.py --methods fedbiot fedot -- --ckpt llama-2-7b --data-dir data
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ONE_SHAPE = {"fedavg", "fedkseed", "fedkseed-pro", "fedtt", "fedtt+", "fedpt"}      # no dropout, no adapter
TWO_PLUS_TWO = {"fedot", "offsite"}                                             # --adapter 2: first and last two
HOLDS_FULL = {"fedavg", "fedkseed", "fedkseed-pro", "fedtt", "fedtt+"}
STEPS = 30                                       # of a client in a round, for all: FedKSeed's own default is 200
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
START = {"fedkseed": (0, 1, 2), "fedkseed-pro": (0, 1, 2), "fedtt": (2, 3, 4), "fedtt+": (2, 3, 4)}    # else 1, 2, 3
ABLATIONS = {
    "default": [], "epsilon = 0": ["--prox", "0"], "epsilon = 0.001": ["--prox", "0.001"],
    "epsilon = 0.1": ["--prox", "0.1"], "epsilon = 1": ["--prox", "1"], "lambda = 0": ["--kl-weight", "0"],
    "lambda = 0.1": ["--kl-weight", "0.1"], "lambda = 10": ["--kl-weight", "10"],
    "lambda = 100": ["--kl-weight", "100"], "no re-alignment": ["--align-steps", "0"],
    "alignment on all tokens": ["--align-tokens", "all"], "official-code preset": ["--preset", "official-code"]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=["fedbiot", "fedot", "offsite", "fedavg"])
    add("--dropouts", nargs="+", default=["0.2", "0.5"])
    add("--adapters", nargs="+", type=int, default=[2, 4])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--lr", type=float, help="for all of them, instead of the search")
    add("--validate", type=int, default=200, help="training rows held out for the search")
    add("--ablations", action="store_true", help="FedBiOT's ablations (first dropout and adapter) instead of the grid")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, one thread each")
    add("--out", default="runs/compare", help="folder of the runs, table.md and the pictures")
    add("--client-memory", help=argparse.SUPPRESS)
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        ours, theirs = ours[:ours.index("--")], ours[ours.index("--") + 1:]
    args = parser.parse_args(ours)
    args.flags = theirs
    return args


# ---- the grid -----------------------------------------------------------------------------------

def cells(args) -> list[tuple[str, str, int]]:
    """(method, dropout, adapter), without the combinations that would be the same run twice."""
    found = []
    for method, dropout, adapter in itertools.product(args.methods, args.dropouts, args.adapters):
        if method in ONE_SHAPE and (dropout, adapter) != (args.dropouts[0], args.adapters[0]):
            continue
        if method in TWO_PLUS_TWO and adapter != 2:
            continue
        found.append((method, dropout, adapter))
    return found


def run(folder: Path, argv: list[str]) -> dict:
    """The summary of the run in `folder`, which is made or finished first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "summary.json").is_file():
        with open(f"{folder}.out", "a") as log:
            code = subprocess.run(argv, stdout=log, stderr=log).returncode
        if code:
            raise SystemExit(f"{' '.join(argv)}\nended with status {code}; see {folder}.out")
    return json.loads((folder / "summary.json").read_text())


class Runs:
    """Runs of train.py in folders of `out`, args.jobs at a time in the order in which they were started."""

    def __init__(self, args, out: Path, expected: int):
        self.args, self.out, self.started, self.lock = args, out, {}, Lock()
        self.pool, self.bar = ThreadPoolExecutor(args.jobs), tqdm(total=expected, desc="runs")

    def start(self, name: str, cell, seed: int, lr: float, *extra: str) -> Future:
        """What a run will have in its summary.json; the same name is the same run."""
        with self.lock:
            if name not in self.started:
                argv = command(self.args, self.out / name, cell, seed, lr, extra)
                self.started[name] = self.pool.submit(run, self.out / name, argv)
                self.started[name].add_done_callback(lambda _: self.bar.update())
        return self.started[name]

    def each(self, work, items: list) -> list:
        """work(item) of all items side by side; the first failure ends the runs that have not begun."""
        with ThreadPoolExecutor(len(items)) as side_by_side:
            futures = [side_by_side.submit(work, item) for item in items]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                whole = all(future.done() and not future.exception() for future in futures)
                self.pool.shutdown(cancel_futures=not whole)
        self.bar.close()
        failures = [failed for future in futures if (failed := future.exception())]
        if failures:                                        # RuntimeError: of one that came after the shutdown
            raise min(failures, key=lambda failed: isinstance(failed, (CancelledError, RuntimeError)))
        return [future.result() for future in futures]


def command(args, folder: Path, cell, seed: int, lr: float, extra=()) -> list[str]:
    method, dropout, adapter = cell
    return [sys.executable, str(ROOT / "train.py"), "--method", method, "--dropout", dropout, "--adapter", str(adapter),
            "--seed", str(seed), "--threads", "1", "--local-steps", str(STEPS), "--lr", f"{lr:g}",
            "--out", str(folder), "--resume", *args.flags, *extra]


def name_of(cell) -> str:
    return f"{cell[0]}-b{cell[1]}-s{cell[2]}"


def final(summary: dict) -> dict:
    """Where a method ends: AdapFu, the full model, or the proxy: the last of its metrics."""
    return list(summary["metrics"].values())[-1]


def search(runs: Runs, cell) -> tuple[float, list[list[str]]]:
    """(the best learning rate of a cell on held-out training rows, the search's lines of search.md).

    No rate changes the alignment before round 1, so that of a run whose clients learn nothing serves them all
    (but for its optimizer's state, which begins anew).
    """
    args, seed, (method, dropout, _) = runs.args, runs.args.seeds[0], cell
    if args.lr:
        return args.lr, []
    extra = ["--validate", str(args.validate)]
    if method not in ONE_SHAPE:
        emulated = ("fedot", dropout, 2) if method in TWO_PLUS_TWO else cell
        name = f"aligned-{name_of(emulated)}"
        runs.start(name, emulated, seed, 0.0, "--rounds", "1", "--local-steps", "1", "--eval-limit", "1").result()
        extra += ["--init-lora", str(runs.out / name), "--align-init", "0"]
    tried, wanted = {}, START.get(method, (1, 2, 3))
    while wanted:
        jobs = {i: runs.start(f"search-{name_of(cell)}-lr{RATES[i]:g}", cell, seed, RATES[i], *extra) for i in wanted}
        tried |= {i: final(job.result())["accuracy"] for i, job in jobs.items()}
        best = max(sorted(tried), key=tried.get)
        wanted = [i for i in (best - 1, best + 1) if i not in tried and i in range(len(RATES))]
    return RATES[best], [[*map(str, cell), f"{RATES[i]:g}", f"{100 * tried[i]:.1f}", "chosen" if i == best else ""]
                         for i in sorted(tried)]


# ---- a client's memory --------------------------------------------------------------------------

def client_memory(argv: list[str]) -> int:
    """Peak bytes of a process that is one client for a few steps, above what importing PyTorch takes."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("server", "client"):
            done = subprocess.run([sys.executable, __file__, "--client-memory", f"{part}:{folder}", "--", *argv],
                                  capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def client_memory_part(spec: str, argv: list[str]):
    sys.path.insert(0, str(ROOT))
    import resource

    import torch

    import baselines
    import train
    from model import load_tokenizer
    part, folder = spec.split(":", 1)
    given = vars(train.make_parser().parse_args(argv)) | {"align_init": 2, "local_steps": 5}
    cfg = train.resolve({name: value for name, value in given.items() if name not in ("resume", "plan", "json")})
    torch.set_num_threads(1)
    module = baselines.module_of(cfg.method)
    tokenizer = load_tokenizer(cfg.ckpt, train.ModelConfig.read(cfg.ckpt))
    path = Path(folder) / "payloads.pt"
    if part == "server":
        full = train.load(cfg.ckpt)[0]
        server = module.Server(full, train.make_public(cfg.data_dir, tokenizer, cfg.max_len), cfg)
        torch.save((server.bootstrap(), server.broadcast(0)), path)
        return
    shards = train.make_shards(cfg.task, cfg.data_dir, tokenizer, cfg.clients, cfg.max_len, cfg.seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bootstrap, payload = torch.load(path, weights_only=True)
    module.Client(bootstrap, cfg).update(0, payload, shards[0], 0)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


# ---- the table and the pictures -----------------------------------------------------------------

def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{100 * mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{100 * mean:.1f}"


def row_of(cell, lr, summaries: list[dict], plan: dict, memory: int) -> list[str]:
    method, dropout, adapter = cell
    metrics = [list(s["metrics"].values()) for s in summaries]
    middle = [m[-2]["accuracy"] for m in metrics] if len(metrics[0]) > 2 else None
    down, up = (statistics.mean(s[f"bytes_{way}_per_client_round"] for s in summaries) for way in ("down", "up"))
    shape = ("–", "–") if method in ONE_SHAPE else (dropout, "2+2" if method in TWO_PLUS_TWO else str(adapter))
    return [method, *shape, f"{lr:g}", spread([m[0]["accuracy"] for m in metrics]),
            spread(middle) if middle else "–", spread([m[-1]["accuracy"] for m in metrics]),
            f"{down:,.0f}", f"{up:,.0f}", f"{plan['trainable_params']:,}", f"{1e3 * plan['gmac_per_token']:.2f}",
            f"{memory / 1e6:.0f}", f"{statistics.mean(s['seconds'] for s in summaries):.0f}",
            "yes" if method in HOLDS_FULL else "no", "yes" if method == "fedpt" else "no"]


HEAD = ["method", "β", "s", "lr", "base %", "AdapEmu %", "AdapFu %", "bytes down", "bytes up", "trainable", "MMAC/token",
        "client MB", "s / run", "client holds the full model", "server sees logits only"]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * 3 + ["--:"] * (len(head) - 3), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(rows: list[list[str]], out: Path):
    """Two pictures: where each method ends, and at how many bytes."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures: pip install -r benchmarks/requirements.txt brings matplotlib")
        return
    names = [f"{r[0]}" + ("" if r[1] == "–" else f"\nβ={r[1]} s={r[2]}") for r in rows]
    emu, fu = ([[float(x) for x in (r[i] + " ± 0").split(" ± ")[:2]] if r[i] != "–" else [0, 0] for r in rows]
               for i in (5, 6))
    base = float(rows[0][4].split()[0])
    figure, axis = plt.subplots(figsize=(1.1 * len(rows) + 2, 4))
    for shift, values, label in ((-0.2, emu, "AdapEmu (at the client)"), (0.2, fu, "AdapFu (at the owner)")):
        axis.bar([i + shift for i in range(len(rows))], [v[0] for v in values], 0.38, yerr=[v[1] for v in values],
                 capsize=3, label=label)
    axis.axhline(base, color="black", linestyle=":", label="base model")
    axis.set_xticks(range(len(rows)), names, fontsize=8)
    axis.set_ylabel("accuracy, %")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3, frameon=False)
    figure.tight_layout()
    figure.savefig(out / "compare.png", dpi=120)
    figure, axis = plt.subplots(figsize=(9, 4.5))
    for r, name, (value, error), marker in zip(rows, names, fu, itertools.cycle("osD^v<>P*Xhdp")):
        size = sum(float(r[i].replace(",", "")) for i in (7, 8))
        axis.errorbar(size, value, error, fmt=marker, capsize=3, label=name.replace("\n", " "))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axis.axhline(base, color="black", linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel("bytes a client a round, down + up")
    axis.set_ylabel("accuracy after tuning, %")
    figure.tight_layout()
    figure.savefig(out / "bytes.png", dpi=120)


def compare(args, out: Path):
    runs = Runs(args, out, len(cells(args)) * (len(args.seeds) + (0 if args.lr else 5)))

    def work(cell):
        rate, searched = search(runs, cell)
        jobs = [runs.start(f"{name_of(cell)}-lr{rate:g}-seed{seed}", cell, seed, rate) for seed in args.seeds]
        summaries = [job.result() for job in jobs]
        argv = [word for word in command(args, out, cell, 0, rate)[2:] if word != "--resume"]
        plan = subprocess.run([sys.executable, str(ROOT / "train.py"), *argv, "--plan", "--json"],
                              capture_output=True, text=True, check=True).stdout
        memory = runs.pool.submit(client_memory, argv).result()
        return row_of(cell, rate, summaries, json.loads(plan), memory), searched
    found = runs.each(work, cells(args))
    rows = [row for row, _ in found]
    if not args.lr:
        write_search(out, [line for _, lines in found for line in lines])
    (out / "table.md").write_text(markdown(HEAD, rows))
    draw(rows, out)
    print((out / "table.md").read_text())


def write_search(out: Path, lines: list[list[str]]):
    (out / "search.md").write_text(markdown(["method", "β", "s", "lr", "held-out %", ""], lines))


def ablate(args, out: Path):
    cell = ("fedbiot", args.dropouts[0], args.adapters[0])
    runs = Runs(args, out, len(ABLATIONS) * len(args.seeds) + (0 if args.lr else 5))

    def work(cell):
        rate, searched = search(runs, cell)                 # of the default; every ablation has it
        jobs = {}
        for (name, extra), seed in itertools.product(ABLATIONS.items(), args.seeds):
            folder = f"ablation-{name_of(cell)}-{name.replace(' ', '')}-lr{rate:g}-seed{seed}"
            jobs[name, seed] = runs.start(folder, cell, seed, rate, *extra)
        return {key: job.result()["metrics"] for key, job in jobs.items()}, searched
    (found, searched), = runs.each(work, [cell])
    if not args.lr:
        write_search(out, searched)
    rows = []
    for name, extra in ABLATIONS.items():
        metrics = [found[name, seed] for seed in args.seeds]
        rows.append([name, f"`{' '.join(extra)}`" if extra else "–", f"β={cell[1]} s={cell[2]}",
                     *(spread([m[model]["accuracy"] for m in metrics]) for model in ("base", "adapemu", "adapfu"))])
    text = markdown(["ablation", "flags", "setting", "base %", "AdapEmu %", "AdapFu %"], rows)
    (out / f"ablations-b{cell[1]}-s{cell[2]}.md").write_text(text)
    print(text)


def main():
    args = parse_args()
    if args.client_memory:
        return client_memory_part(args.client_memory, args.flags)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    ablate(args, out) if args.ablations else compare(args, out)


if __name__ == "__main__":
    main()
