"""Methods x dropout x adapter x seeds on one model, one data set and one budget: the paper's Table 2.

Every cell is one run of train.py in its own folder; a finished run is not repeated and a killed one
goes on, so the command can be stopped and given again. Learning rates come first: of RATES every cell
tries two neighbours, and then the next beyond the better, until that is worse, at the first seed with
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ONE_SHAPE = {"fedavg", "fedkseed", "fedkseed-pro", "fedtt", "fedtt+", "fedpt"}      # no dropout, no adapter
TWO_PLUS_TWO = {"fedot", "offsite"}                                             # --adapter 2: first and last two
HOLDS_FULL = {"fedavg", "fedkseed", "fedkseed-pro", "fedtt", "fedtt+"}
STEPS = 30                                       # of a client in a round, for all: FedKSeed's own default is 200
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
START = {"fedkseed": (1, 2), "fedkseed-pro": (1, 2)}        # the search's first two of them; for all others 2, 3
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


def command(args, folder: Path, cell, seed: int, lr: float | None, extra: list[str]) -> list[str]:
    method, dropout, adapter = cell
    rate = [] if lr is None else ["--lr", f"{lr:g}"]
    return [sys.executable, str(ROOT / "train.py"), "--method", method, "--dropout", dropout, "--adapter", str(adapter),
            "--seed", str(seed), "--threads", "1", "--local-steps", str(STEPS), "--out", str(folder), "--resume",
            *rate, *args.flags, *extra]


def run(folder: Path, argv: list[str]) -> dict:
    """The summary of the run in `folder`, which is made or finished first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "summary.json").is_file():
        with open(f"{folder}.out", "a") as log:
            code = subprocess.run(argv, stdout=log, stderr=log).returncode
        if code:
            raise SystemExit(f"{' '.join(argv)}\nended with status {code}; see {folder}.out")
    return json.loads((folder / "summary.json").read_text())


def run_all(jobs: dict, args, title: str) -> dict:
    """{key: summary} of {key: (folder, argv)}, args.jobs at a time."""
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {key: pool.submit(run, *job) for key, job in jobs.items()}
        bar = tqdm(total=len(futures), desc=title)
        for future in futures.values():
            future.add_done_callback(lambda _: bar.update())
        try:
            results = {key: future.result() for key, future in futures.items()}
        except SystemExit:
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()
    return results


def final(summary: dict) -> dict:
    """Where a method ends: AdapFu, the full model, or the proxy: the last of its metrics."""
    return list(summary["metrics"].values())[-1]


def aligned(args, out: Path) -> dict:
    """{cell: flags} to start from an emulator that is aligned already: no rate changes that of round 1,
    so a search needs it once a cell. Of a run whose clients learn nothing, with the first seed."""
    jobs = {}
    for cell in cells(args):
        if cell[0] not in ONE_SHAPE:
            folder = out / f"aligned-{cell[0]}-b{cell[1]}-s{cell[2]}"
            extra = ["--rounds", "1", "--local-steps", "1", "--eval-limit", "1"]
            jobs[cell] = folder, command(args, folder, cell, args.seeds[0], 0.0, extra)
    run_all(jobs, args, "alignment")
    return {cell: ["--init-lora", str(folder), "--align-init", "0"] for cell, (folder, _) in jobs.items()}


def search(args, out: Path) -> dict:
    """The best learning rate of every cell on held-out training rows: from START on towards the better, until
    both neighbours of the best are tried."""
    if args.lr:
        return dict.fromkeys(cells(args), args.lr)
    starts, tried, best = aligned(args, out), {}, {}
    wanted = {cell: START.get(cell[0], (2, 3)) for cell in cells(args)}
    while any(wanted.values()):
        jobs = {}
        for cell, i in ((cell, i) for cell in wanted for i in wanted[cell]):
            folder = out / f"search-{cell[0]}-b{cell[1]}-s{cell[2]}-lr{RATES[i]:g}"
            extra = ["--validate", str(args.validate), *starts.get(cell, [])]
            jobs[cell, i] = folder, command(args, folder, cell, args.seeds[0], RATES[i], extra)
        tried |= run_all(jobs, args, "learning rates")
        best = {cell: max((i for c, i in tried if c == cell), key=lambda i: final(tried[cell, i])["accuracy"])
                for cell in cells(args)}
        wanted = {cell: [i for i in (best[cell] - 1, best[cell] + 1)
                         if (cell, i) not in tried and i in range(len(RATES))] for cell in best}
    lines = [[*map(str, cell), f"{RATES[i]:g}", f"{100 * final(tried[cell, i])['accuracy']:.1f}",
              "chosen" if best[cell] == i else ""] for cell, i in sorted(tried)]
    (out / "search.md").write_text(markdown(["method", "β", "s", "lr", "held-out %", ""], lines))
    return {cell: RATES[i] for cell, i in best.items()}


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
    emu, fu = ([[float(x) for x in (r[i] + " ± 0").split(" ± ")[:2]] if r[i] != "–" else [0, 0] for r in rows] for i in (5, 6))
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
    rates = search(args, out)
    jobs = {}
    for cell, seed in itertools.product(cells(args), args.seeds):
        folder = out / f"{cell[0]}-b{cell[1]}-s{cell[2]}-seed{seed}"
        jobs[cell, seed] = folder, command(args, folder, cell, seed, rates[cell], [])
    found = run_all(jobs, args, "grid")
    rows = []
    for cell in tqdm(cells(args), "clients' memory"):
        argv = command(args, out, cell, 0, None, [])[2:]
        plan = json.loads(subprocess.run([sys.executable, str(ROOT / "train.py"), *argv, "--plan", "--json"],
                                         capture_output=True, text=True, check=True).stdout)
        memory = client_memory([a for a in argv if a != "--resume"])
        rows.append(row_of(cell, rates[cell], [found[cell, s] for s in args.seeds], plan, memory))
    (out / "table.md").write_text(markdown(HEAD, rows))
    draw(rows, out)
    print((out / "table.md").read_text())


def ablate(args, out: Path):
    cell, jobs = ("fedbiot", args.dropouts[0], args.adapters[0]), {}
    args.methods, args.dropouts, args.adapters = [cell[0]], [cell[1]], [cell[2]]
    rate = search(args, out)[cell]                      # of the default; every ablation has it
    for (name, extra), seed in itertools.product(ABLATIONS.items(), args.seeds):
        folder = out / f"ablation-b{cell[1]}-s{cell[2]}-{name.replace(' ', '')}-seed{seed}"
        jobs[name, seed] = folder, command(args, folder, cell, seed, rate, extra)
    found = run_all(jobs, args, "ablations")
    rows = []
    for name, extra in ABLATIONS.items():
        metrics = [found[name, seed]["metrics"] for seed in args.seeds]
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
