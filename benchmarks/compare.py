"""Methods x dropout x adapter x seeds on one model, one data set, one budget: the paper's Table 2.

Every cell is one run of train.py in its own folder; a finished run is not repeated and a killed one
goes on, so the command can be stopped and given again; --table shows what has finished. Rates come
first: every cell tries two neighbours of RATES, and then the next beyond the best, until that is
worse, at the first seed with --validate, which holds out training rows; with --ckpt it tries all of
the paper's. The test set takes no part in the choice, and of two rates that score the same the
lower is taken. All methods get the same rounds, steps and batch; flags after `--` go to train.py.

    python benchmarks/compare.py --dropouts 0.5 0.2 --adapters 2 4 --seeds 0 1 2
    python benchmarks/compare.py --ablations --seeds 0 1 2
    python benchmarks/compare.py --methods fedbiot fedot -- --ckpt llama-2-7b --data-dir data

What comes first: the searches and the first seed of the first dropout, cell by cell, its other
seeds, the next dropout, at last the methods without a dropout.
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from queue import PriorityQueue
from threading import Lock, Thread

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from eval import BUNDLED_CKPT  # noqa: E402

SERVERS = {method: train.method_of(method).Server for method in train.METHODS}
ONE_SHAPE = {m for m, server in SERVERS.items() if "dropout" in server.no_use}      # no adapter
PROXIES = {m for m, server in SERVERS.items() if "proxy_ckpt" in vars(server.Flags)}
HOLDS_FULL = ONE_SHAPE - PROXIES
TWO_PLUS_TWO = {"fedot", "offsite"}                 # --adapter 2: the first and the last two layers
STEPS = 30                          # of a client in a round, for all: FedKSeed's own default is 200
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]                      # of the bundled model
FIRST = {"fedkseed": (2, 3), "fedkseed-pro": (2, 3), "fedot": (2, 3), "offsite": (2, 3),
         "fedavg": (2, 3), "fedpt": (1, 2), "fedtt": (4, 5), "fedtt+": (4, 5)}      # else 3, 4
PAPERS_RATES = [1e-5, 3e-5, 5e-5, 8e-5, 1e-4]                           # with --ckpt
EPSILONS = [0, 0.001, 0.01, 0.1]                                        # --search-prox
LAMBDAS = [0, 0.1, 1, 10]                                               # --search-kl
ABLATIONS = {
    "default": [], "lora alignment": ["--align-init-on", "lora"], "epsilon = 0": ["--prox", "0"],
    "lambda = 0": ["--kl-weight", "0"], "no re-alignment": ["--align-steps", "0"],
    "alignment on all tokens": ["--align-tokens", "all"],
    "official-code preset": ["--preset", "official-code"],
    "epsilon = 0.001": ["--prox", "0.001"], "epsilon = 0.1": ["--prox", "0.1"],
    "epsilon = 1": ["--prox", "1"], "lambda = 0.1": ["--kl-weight", "0.1"],
    "lambda = 10": ["--kl-weight", "10"], "lambda = 100": ["--kl-weight", "100"]}
AFTER_ALIGNMENT = {"--prox", "--align-steps"}           # ablations that begin after the first 500


class Failed(Exception):
    """A run that ended with a status other than 0."""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=["fedbiot", "fedot", "offsite", "fedavg"])
    add("--dropouts", nargs="+", help="default 0.2 0.5; with --ablations 0.5")
    add("--adapters", nargs="+", type=int, default=[2, 4])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--lr", type=float, help="for all of them, instead of the search")
    add("--short-search", action="store_true", help="the first two rates only")
    add("--search-prox", action="store_true", help="epsilon too, at the best rate")
    add("--search-kl", action="store_true", help="lambda too, at the best rate")
    add("--validate", type=int, default=200, help="training rows held out for the search")
    add("--ablations", action="store_true",
        help="FedBiOT's ablations (first dropout and adapter) instead of the grid")
    add("--only", nargs="+", choices=ABLATIONS, default=[*ABLATIONS], help="of the ablations")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, one thread")
    add("--table", action="store_true", help="start nothing: the table of what has finished")
    add("--out", default="runs/compare", help="folder of the runs, table.md and the pictures")
    add("--client-memory", help=argparse.SUPPRESS)
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        ours, theirs = ours[:ours.index("--")], ours[ours.index("--") + 1:]
    args = parser.parse_args(ours)
    args.flags, cfg = theirs, train.parse(theirs)
    args.dropouts = args.dropouts or (["0.5"] if args.ablations else ["0.2", "0.5"])
    args.bundled = cfg.ckpt == str(BUNDLED_CKPT)
    args.aligns_weights = cfg.align_init_on == "weights"
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


def name_of(cell) -> str:
    return cell[0] if cell[0] in ONE_SHAPE else f"{cell[0]}-b{cell[1]}-s{cell[2]}"


def command(args, cell, seed: int, lr: float, *extra: str) -> list[str]:
    """train.py's flags; the last of two that are the same counts."""
    method, dropout, adapter = cell
    return ["--method", method, "--dropout", dropout, "--adapter", str(adapter), "--seed",
            str(seed), "--threads", "1", "--local-steps", str(STEPS), "--lr", f"{lr:g}",
            *args.flags, *extra]


def run(folder: Path, flags: list[str]) -> dict:
    """The summary of the run in `folder`, which is made or finished first. Its CPU seconds are
    beside it, since other work may share the cores."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "summary.json").is_file():
        argv = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(folder), "--resume"]
        with open(f"{folder}.out", "a") as log:
            job = subprocess.Popen(argv, stdout=log, stderr=log)
            _, status, used = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(status)
        if job.returncode:
            *_, last = ["", *Path(f"{folder}.out").read_text().splitlines()]
            raise Failed(f"{' '.join(argv)}\nended with status {job.returncode}: {last}")
        Path(f"{folder}.cpu").write_text(f"{used.ru_utime + used.ru_stime:.1f}\n")
    return json.loads((folder / "summary.json").read_text())


class Runs:
    """Runs of train.py in folders of `out`, args.jobs at a time, those of the lowest place first.
    """

    def __init__(self, args, out: Path, expected: int):
        self.args, self.out, self.started, self.lock = args, out, {}, Lock()
        self.queue, self.number, self.over = PriorityQueue(), itertools.count(), False
        self.bar = tqdm(total=expected, desc="runs")
        for _ in range(args.jobs):
            Thread(target=self.serve, daemon=True).start()

    def serve(self):
        time.sleep(2)                                   # until every cell has put its first runs in
        while True:
            *_, future, folder, flags = self.queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(run(folder, flags))
            except Exception as error:                  # it belongs to whoever waits for the result
                future.set_exception(error)
            self.bar.update()

    def start(self, name: str, cell, seed: int, lr: float, *extra: str) -> Future:
        """What a run will have in its summary.json; the same name is the same run."""
        args, folder = self.args, self.out / name
        place = (cell[0] in ONE_SHAPE, args.dropouts.index(cell[1]), args.seeds.index(seed),
                 cells(args).index(cell) if cell in cells(args) else 0)
        with self.lock:
            if name in self.started:
                return self.started[name]
            future = self.started[name] = Future()
            if self.over:
                future.cancel()
            elif (folder / "summary.json").is_file():       # needs no turn
                future.set_result(run(folder, []))
                self.bar.update()
            else:
                flags = command(args, cell, seed, lr, *extra)
                self.queue.put((place, next(self.number), future, folder, flags))
        return future

    def aligned(self, cell, seed: int, *extra: str) -> list[str]:
        """Flags that begin after the alignment before round 1, which no client's rate changes: the
        one of a run whose only client learns nothing serves every run of the seed.

        With --align-init-on weights the bits are, on the CPU, those of a run that aligns by itself;
        with lora the alignment's optimizer begins anew, so only the search does it.
        """
        method, dropout, _ = cell
        if method in ONE_SHAPE:
            return []
        cell = ("fedot", dropout, 2) if method in TWO_PLUS_TWO else cell
        name = "-".join(["aligned", name_of(cell), f"seed{seed}", *map(tidy, extra)])
        self.start(name, cell, seed, 0.0, *extra, "--clients", "1", "--rounds", "1",
                   "--local-steps", "1", "--eval-limit", "1").result()
        return ["--init-lora", str(self.out / name), "--align-init", "0"]

    def each(self, work, items: list) -> list:
        """work(item) of all items side by side; the first failure ends what has not begun."""
        with ThreadPoolExecutor(len(items)) as side_by_side:
            futures = [side_by_side.submit(work, item) for item in items]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                if not all(future.done() and not future.exception() for future in futures):
                    self.end()
        self.bar.close()
        failures = [failed for future in futures if (failed := future.exception())]
        if failures:
            raise min(failures, key=lambda failed: isinstance(failed, CancelledError))
        return [future.result() for future in futures]

    def end(self):
        with self.lock:
            self.over = True
            for future in self.started.values():
                future.cancel()


def kl_of(flags: list[str]) -> list[str]:
    """Of a choice's flags those that change the alignment."""
    return flags[flags.index("--kl-weight"):][:2] if "--kl-weight" in flags else []


def tidy(text: str) -> str:
    return text.lstrip("-").replace(" ", "")


# ---- the search ---------------------------------------------------------------------------------

def final(summary: dict) -> float:
    """Where a method ends: AdapFu, the full model, or the proxy: the last of its metrics."""
    return list(summary["metrics"].values())[-1]["accuracy"]


def held_out(job: Future) -> float:
    """The accuracy with which a run of the search ended; -1 where it diverged: the rate is too
    high."""
    try:
        return final(job.result())
    except Failed as failed:
        if "try a smaller --lr" not in str(failed):
            raise
        return -1.0


def climb(count: int, first, measure, short: bool) -> tuple[int, dict[int, float]]:
    """(the best of range(count), what was measured): `first`, then, unless it is to be short, the
    neighbours of the best. Of equals the first is the best: the lower rate."""
    tried, wanted = {}, [*first]
    while wanted:
        tried |= measure(wanted)
        best = max(sorted(tried), key=tried.get)
        beside = [] if short else [best - 1, best + 1]
        wanted = [i for i in beside if i not in tried and 0 <= i < count]
    return best, tried


def search(runs: Runs, cell) -> dict:
    """{"lr", "flags", "lines"}: a cell's best rate on held-out training rows, epsilon and lambda
    where they were asked for, and the lines of search.md; kept in choice-<cell>.json."""
    args, seed, method = runs.args, runs.args.seeds[0], cell[0]
    path = runs.out / f"choice-{name_of(cell)}.json"
    if args.lr:
        return {"lr": args.lr, "flags": [], "lines": []}
    if path.is_file() and json.loads(path.read_text())["short"] <= args.short_search:
        return json.loads(path.read_text())
    rates = RATES if args.bundled else PAPERS_RATES
    choice = {"lr": None, "flags": [], "lines": [], "short": args.short_search}

    def measured(flag, values, first):
        def accuracies(wanted):
            jobs = {}
            for i in wanted:
                lr = values[i] if flag == "--lr" else choice["lr"]
                flags = choice["flags"] + ([flag, f"{values[i]:g}"] if flag != "--lr" else [])
                name = "-".join(["search", name_of(cell), f"lr{lr:g}", *map(tidy, flags)])
                jobs[i] = runs.start(name, cell, seed, lr, "--validate", str(args.validate),
                                     *runs.aligned(cell, seed, *kl_of(flags)), *flags)
            return {i: held_out(job) for i, job in jobs.items()}
        best, tried = climb(len(values), first, accuracies, args.short_search)
        choice["lines"] += [[*shown(cell), f"{tidy(flag)} {values[i]:g}",
                             f"{100 * tried[i]:.1f}" if tried[i] >= 0 else "diverged",
                             "chosen" if i == best else ""] for i in sorted(tried)]
        return values[best]
    choice["lr"] = measured("--lr", rates, FIRST.get(method, (3, 4)) if args.bundled else range(5))
    no_use = train.method_of(method).Server.no_use
    for asked, flag, values in ((args.search_prox, "--prox", EPSILONS),
                                (args.search_kl, "--kl-weight", LAMBDAS)):
        if asked and tidy(flag).replace("-", "_") not in no_use:
            choice["flags"] += [flag, f"{measured(flag, values, (1, 2)):g}"]
    path.write_text(json.dumps(choice))
    return choice


def shown(cell) -> list[str]:
    """Method, dropout and adapter for a table."""
    method, dropout, adapter = cell
    if method in ONE_SHAPE:
        return [method, "–", "–"]
    return [method, dropout, "2+2" if method in TWO_PLUS_TWO else str(adapter)]


# ---- what a client costs ------------------------------------------------------------------------

def costs(args, out: Path, cell, choice: dict) -> dict:
    """What --plan says of a cell, and the peak memory of a client's process; cost-<cell>.json."""
    path = out / f"cost-{name_of(cell)}.json"
    if not path.is_file():
        flags = command(args, cell, 0, choice["lr"], *choice["flags"])
        argv = [sys.executable, str(ROOT / "train.py"), *flags, "--plan", "--json"]
        plan = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        path.write_text(json.dumps(json.loads(plan) | {"memory": client_memory(flags)}))
    return json.loads(path.read_text())


def client_memory(flags: list[str]) -> int:
    """Peak bytes of a process that is one client for a few steps, above what its imports take."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("server", "client"):
            argv = [sys.executable, __file__, "--client-memory", f"{part}:{folder}", "--", *flags]
            done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def client_memory_part(spec: str, flags: list[str]):
    """The two processes of client_memory: the server writes its payloads, the client reads them."""
    import resource

    import torch

    from data import make_public, make_shards
    from model import load
    torch.set_num_threads(1)
    part, folder = spec.split(":", 1)
    cfg = replace(train.parse(flags), align_init=2, local_steps=5)
    full, tokenizer = load(cfg.ckpt)
    path, method = Path(folder) / "payloads.pt", train.method_of(cfg.method)
    if part == "server":
        server = method.Server(full, make_public(cfg.data_dir, tokenizer, cfg.max_len), cfg)
        torch.save((server.bootstrap(), server.broadcast(0)), path)
        return
    del full
    shards = make_shards(cfg.task, cfg.data_dir, tokenizer, cfg.clients, cfg.max_len, cfg.seed)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])     # imports PyTorch's compiler
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bootstrap, payload = torch.load(path, weights_only=True)
    method.Client(bootstrap, cfg).update(0, payload, shards[0], 0)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


# ---- the tables ---------------------------------------------------------------------------------

HEAD = ["method", "β", "s", "lr", "seeds", "base %", "AdapEmu %", "AdapFu %", "bytes down",
        "bytes up", "trainable", "MMAC/token", "client MB", "CPU s / run",
        "client holds the full model", "server sees logits only"]


def mean_and_deviation(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def final_name(cell, choice: dict, seed: int) -> str:
    return "-".join([name_of(cell), f"lr{choice['lr']:g}", *map(tidy, choice["flags"]),
                     f"seed{seed}"])


def finished(args, out: Path, cell) -> tuple[dict, dict[int, dict], list[float]]:
    """(a cell's choice, the summaries of its finished runs by seed, their CPU seconds)."""
    path = out / f"choice-{name_of(cell)}.json"
    if not args.lr and not path.is_file():
        return {}, {}, []
    choice = {"lr": args.lr, "flags": [], "lines": []} if args.lr else json.loads(path.read_text())
    folders = {seed: out / final_name(cell, choice, seed) for seed in args.seeds}
    done = {seed: f for seed, f in folders.items() if (f / "summary.json").is_file()}
    spent = [float(Path(f"{f}.cpu").read_text()) for f in done.values()]
    return choice, {s: json.loads((f / "summary.json").read_text()) for s, f in done.items()}, spent


def row_of(args, out: Path, cell) -> list[str]:
    choice, by_seed, spent = finished(args, out, cell)
    if not by_seed:
        return [*shown(cell), "not run", *[""] * (len(HEAD) - 4)]
    cost, summaries = costs(args, out, cell, choice), list(by_seed.values())
    models = [[m["accuracy"] for m in s["metrics"].values()] for s in summaries]
    middle = mean_and_deviation([m[-2] for m in models]) if len(models[0]) > 2 else "–"
    down, up = (statistics.mean(s[f"bytes_{way}_per_client_round"] for s in summaries)
                for way in ("down", "up"))
    return [*shown(cell), " ".join([f"{choice['lr']:g}", *choice["flags"]]),
            " ".join(map(str, by_seed)), mean_and_deviation([m[0] for m in models]), middle,
            mean_and_deviation([m[-1] for m in models]), f"{down:,.0f}", f"{up:,.0f}",
            f"{cost['trainable_params']:,}", f"{1e3 * cost['gmac_per_token']:.2f}",
            f"{cost['memory'] / 1e6:.0f}", f"{statistics.median(spent):.0f}",
            "yes" if cell[0] in HOLDS_FULL else "no", "yes" if cell[0] in PROXIES else "no"]


def raw_row(args, out: Path, cell) -> dict:
    """What pictures.py draws: every seed's accuracies."""
    method, dropout, adapter = shown(cell)
    _, by_seed, _ = finished(args, out, cell)
    models = [[m["accuracy"] for m in s["metrics"].values()] for s in by_seed.values()]
    row = {"method": method, "dropout": dropout, "s": adapter}
    if models:
        sent = [s["bytes_down_per_client_round"] + s["bytes_up_per_client_round"]
                for s in by_seed.values()]
        row |= {"base": [m[0] for m in models], "adapfu": [m[-1] for m in models],
                "adapemu": [m[-2] for m in models if len(m) > 2], "bytes": sum(sent) / len(models)}
    return row


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * 3 + ["--:"] * (len(head) - 3), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(args, out: Path):
    """table.md, table.json, seeds.md, search.md and the pictures, of what has finished."""
    rows = [row_of(args, out, cell) for cell in cells(args)]
    (out / "table.md").write_text(markdown(HEAD, rows))
    by_seed, searched = [], []
    for cell in cells(args):
        choice, summaries, _ = finished(args, out, cell)
        searched += choice.get("lines", [])
        by_seed.append([*shown(cell), *(f"{100 * final(summaries[seed]):.1f}" if seed in summaries
                                        else "not run" for seed in args.seeds)])
    (out / "seeds.md").write_text(markdown(["method", "β", "s", *map(str, args.seeds)], by_seed))
    head = ["method", "β", "s", "value", "held-out %", ""]
    (out / "search.md").write_text(markdown(head, searched))
    (out / "table.json").write_text(json.dumps([raw_row(args, out, cell) for cell in cells(args)]))
    print((out / "table.md").read_text())
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "pictures.py"), str(out)])


def compare(args, out: Path):
    if args.table:
        return report(args, out)
    runs = Runs(args, out, len(cells(args)) * (len(args.seeds) + (0 if args.lr else 5)))

    def start(cell, choice, seed):
        kl = kl_of(choice["flags"])
        shared = runs.aligned(cell, seed, *kl) if args.aligns_weights else []
        name = final_name(cell, choice, seed)
        return runs.start(name, cell, seed, choice["lr"], *choice["flags"], *shared).result()

    def work(cell):
        choice = search(runs, cell)
        with ThreadPoolExecutor(len(args.seeds)) as side_by_side:
            return list(side_by_side.map(lambda seed: start(cell, choice, seed), args.seeds))
    runs.each(work, cells(args))
    report(args, out)


def ablate(args, out: Path):
    cell = ("fedbiot", args.dropouts[0], args.adapters[0])
    runs = None if args.table else Runs(args, out, len(args.only) * len(args.seeds) + 5)

    def folder_of(name, choice, seed):
        if name == "default":
            return final_name(cell, choice, seed)           # the grid's own run
        return f"ablation-{name_of(cell)}-{tidy(name)}-lr{choice['lr']:g}-seed{seed}"

    def start(name, choice, seed):
        extra, flags = ABLATIONS[name], choice["flags"]
        alike = args.aligns_weights and (not extra or extra[0] in AFTER_ALIGNMENT)
        shared = runs.aligned(cell, seed, *kl_of(flags)) if alike else []
        folder = folder_of(name, choice, seed)
        return runs.start(folder, cell, seed, choice["lr"], *flags, *extra, *shared).result()

    def work(cell):
        choice = search(runs, cell)                         # of the default; every ablation has it
        jobs = list(itertools.product(args.only, args.seeds))
        with ThreadPoolExecutor(len(jobs)) as side_by_side:
            list(side_by_side.map(lambda job: start(job[0], choice, job[1]), jobs))
    if runs:
        runs.each(work, [cell])
    rows = []
    for name in args.only:
        choice, _, _ = finished(args, out, cell)
        paths = {s: out / folder_of(name, choice, s) / "summary.json"
                 for s in args.seeds if choice}
        found = {s: json.loads(p.read_text())["metrics"] for s, p in paths.items() if p.is_file()}
        extra = ABLATIONS[name]
        rows.append([name, f"`{' '.join(extra)}`" if extra else "–", f"β={cell[1]} s={cell[2]}",
                     " ".join(map(str, found)) or "not run",
                     *(mean_and_deviation([m[model]["accuracy"] for m in found.values()])
                       if found else "" for model in ("base", "adapemu", "adapfu"))])
    head = ["ablation", "flags", "setting", "seeds", "base %", "AdapEmu %", "AdapFu %"]
    text = markdown(head, rows)
    (out / f"ablations-b{cell[1]}-s{cell[2]}.md").write_text(text)
    print(text)


def main():
    args = parse_args()
    if args.client_memory:
        return client_memory_part(args.client_memory, args.flags)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        ablate(args, out) if args.ablations else compare(args, out)
    except Failed as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
