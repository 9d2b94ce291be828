"""The command line: federated fine-tuning of a LLaMA that its owner keeps.

    python train.py --task gsm8k --dropout 0.2 --adapter 2
    python train.py --task gsm8k --dropout 0.2 --adapter 2 --ckpt llama-2-7b --data-dir data
    python train.py --method fedtt --help
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C is one line also while the rest is imported
    line = b"stopped by Ctrl-C\n" if os.environ.get("RANK", "0") == "0" else b""
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, line), os._exit(130)))

import contextlib
import fcntl
import itertools
import json
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import torch

from data import TASKS, digest_of, make_public, make_shards
from eval import (BUNDLED, BUNDLED_CKPT, BUNDLED_DATA, EvalConfig, Parser, checked, flag,
                  main_guard, pick_device, pick_dtype, restore)
from fedbiot import Config, Wire, federate, option, payload_bytes
from model import (ModelConfig, UserError, expecting, fingerprint, load_tokenizer, load_weights,
                   read_json, read_saved, room, write_file, write_json)

METHODS = {"fedbiot": "fedbiot", "offsite": "baselines.offsite", "fedot": "baselines.offsite",
           "fedavg": "baselines.fedavg", "fedkseed": "baselines.fedkseed",
           "fedkseed-pro": "baselines.fedkseed", "fedtt": "baselines.fedtt",
           "fedtt+": "baselines.fedtt", "fedpt": "baselines.fedpt"}

# DIFFERS: the authors' code from the paper, in these four.
PRESETS = {"paper": {}, "official-code": {"align_tokens": "all", "prox": 0.0, "align_renew": True,
                                          "uniform_weights": True}}

# ---- flags --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunConfig(EvalConfig, Config):
    """Config, EvalConfig, and what else a run is. None: depends, see `resolve`."""
    task: str = option("gsm8k", "what the clients' data teaches", choices=tuple(TASKS))
    method: str = option("fedbiot", "federated method", choices=tuple(METHODS))
    preset: str = option("paper", "the paper's settings, or its authors'", choices=tuple(PRESETS))
    clients: int = option(3, "number of clients; rosetta 9, dolly 8", least=1, most=10**6)
    own_data: bool = option(False, "torchrun: every client rank has its own --data-dir")
    max_len: int = option(512, "longest training sequence; other tasks 1024, bundled 256", least=2)
    strip_annotations: bool = option(False, "take GSM8K's <<48/2=24>> out of training answers")
    eval_every: int = option(0, "rounds between evaluations (0: at the end)")
    out: str | None = option(None, "run folder; default runs/<task>-<method>-…")
    init_lora: str | None = option(None, "LoRA to start from: PEFT's folder, a run's, a lora.pt")
    resume: bool = option(False, "go on from the last finished round of --out")
    plan: bool = option(False, "print layers and costs, and exit")
    json: bool = option(False, "--plan as one JSON object")

def method_of(name: str):
    """The module with a method's Server and Client."""
    return room(METHODS[name])

def config_of(*methods: str) -> type:
    """RunConfig with the methods' own flags."""
    own = {f.name: (f.name, f.type, f) for m in methods for f in fields(method_of(m).Server.Flags)}
    return make_dataclass("MethodConfig", own.values(), bases=(RunConfig,), frozen=True)

def parse(argv=None) -> RunConfig:
    """The flags of the method that `argv` names; another method's get a note."""
    first, left = Parser("", RunConfig, add_help=False).parse_known_args(argv)
    method = vars(first).get("method", "fedbiot")
    given, left = Parser(__doc__, config_of(method)).parse_known_args(argv)
    others = [name for name in METHODS if find_spec(METHODS[name].partition(".")[0])]
    idle = vars(Parser("", config_of(*others)).parse_args(left)) if left else {}
    cfg = resolve(vars(given))
    idle |= {name: given for name in vars(given) if name in method_of(method).Server.no_use}
    if idle:
        print(f"note: {method} has no use for {', '.join(map(flag, idle))}", file=sys.stderr)
    return cfg

def resolve(given: dict) -> RunConfig:
    """What the checkpoint suggests, then the preset's values, then the flags given."""
    bundled, task = given.get("ckpt") is None, TASKS[given.get("task", "gsm8k")]
    method, world = given.get("method", "fedbiot"), int(os.environ.get("WORLD_SIZE") or 1)
    values = {"ckpt": str(BUNDLED_CKPT), "data_dir": str(BUNDLED_DATA),
              "max_len": task.max_len, "clients": task.clients}
    values |= (BUNDLED if bundled else {}) | method_of(method).Server.defaults(method, bundled)
    values |= {"clients": world - 1} if world > 1 and given.get("own_data") else {}
    values |= PRESETS[given.get("preset", "paper")] | given
    cores, processes = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    values["threads"] = values.get("threads") or max(cores // processes, 1)
    cfg = checked(config_of(method), values)
    if cfg.clients_per_round > cfg.clients:
        raise UserError(f"--clients-per-round {cfg.clients_per_round}: expected at most --clients "
                        f"{cfg.clients}")
    if cfg.validate and (cfg.task != "gsm8k" or cfg.own_data):
        raise UserError(f"--validate {cfg.validate}: is for gsm8k, without --own-data")
    if method == "offsite" and cfg.clients != 1:
        raise UserError(f"--clients {cfg.clients}: offsite has one client; fedot has several")
    if cfg.own_data and cfg.clients != world - 1:
        raise UserError(f"--own-data: needs torchrun, a process for each of {cfg.clients} "
                        f"clients beside the server's, found {world - 1}")
    return cfg

def as_json(cfg) -> dict:
    """Settings; what a run reads has absolute paths."""
    return {name: os.path.abspath(value) if value and name.endswith(("ckpt", "dir")) else value
            for name, value in asdict(cfg).items() if name not in ("resume", "plan", "json")}

# ---- plan ---------------------------------------------------------------------------------------
def plan(config: ModelConfig, cfg: RunConfig) -> dict:
    """Layers and costs (Table 5; MB a client a round, down + up), counted on "meta"."""
    config = config if config.vocab_size > 0 else replace(config, vocab_size=32000)  # LLaMA's
    full = load_weights(cfg.ckpt, config, device="meta")
    method = method_of(cfg.method)
    server = method.Server(full, None, replace(cfg, align_init=0, align_steps=0))
    client = method.Client(server.bootstrap(), cfg, "meta")
    sent = fmean(payload_bytes(server.broadcast(t)) + payload_bytes(server.expected(t))
                 for t in range(server.period))
    left = server.kept and sorted({*range(config.n_layers)} - {*server.kept, *server.adapter})
    return {"kept_layers": server.kept, "adapter_layers": server.adapter, "dropped_layers": left,
            "trainable_params": sum(p.numel() for p in client.tuned.values()),
            "comm_mb_per_round": sent / 1e6, "gmac_per_token": client.macs_per_token() / 1e9}

def print_plan(p: dict, c: ModelConfig, cfg: RunConfig, more: dict[str, str]):
    def row(name, text):
        print(f"{name:16}  {text}", flush=True)
    ckpt = min(cfg.ckpt, os.path.relpath(cfg.ckpt), key=len)
    row("method", f"{cfg.method}, {cfg.task}, clients: {cfg.clients}, rounds: {cfg.rounds}")
    row("model", f"{c.n_layers} layers x {c.dim}, {ckpt}")
    for name in ("kept (emulator)", "dropped", "adapter"):
        if layers := p[f"{name.split()[0]}_layers"]:
            name = name if p["kept_layers"] else "tuned layers"
            row(name, f"{len(layers):3d}   {' '.join(map(str, layers))}")
    row("trainable", f"{p['trainable_params']:,} parameters")
    row("communication", f"{megabytes(p['comm_mb_per_round'] * 1e6)} a client a round, down + up")
    row("compute", f"{p['gmac_per_token']:.4g} GMAC a token at a client")
    for name, text in more.items():
        row(name, text)

# ---- run folder ---------------------------------------------------------------------------------
COLUMNS = ("round", "client_loss", "align_l2", "align_kl", "bytes_down", "bytes_up", "seconds")
FREE = {"out", "device", "client_timeout", "ckpt", "proxy_ckpt", "data_dir", "init_lora",
        "save_predictions"}  # a resumed run may change these

def made(folder: Path) -> bool:
    """Makes a run's folder; False: it exists. Of two runs that want it one gets it."""
    try:
        folder.mkdir(parents=True)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror})") from None

def choose_folder(cfg: RunConfig, restarted: bool) -> Path:
    """--out, which needs --resume if it exists; or a default name, then -2, -3, …; --resume takes
    the last before a free one. A restart by torchrun resumes what is not finished."""
    if cfg.out:
        if not made(Path(cfg.out)) and not (cfg.resume or restarted):
            raise UserError(f"--out {cfg.out}: exists already; add --resume to go on with it, "
                            f"or choose another name")
        return Path(cfg.out)
    name = f"{cfg.task}-{cfg.method}-b{cfg.dropout:g}-s{cfg.adapter}-seed{cfg.seed}"
    last, folder = None, Path("runs") / name
    for number in itertools.count(2):
        if made(folder):
            break
        last, folder = folder, folder.with_name(f"{name}-{number}")
    unfinished = last and not (last / "summary.json").is_file()
    if last and cfg.resume or restarted and unfinished:
        folder.rmdir()
        return last
    return folder

@contextlib.contextmanager
def locked(folder: Path):
    """A lock that ends with the process; removes what a killed one left half-written."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"--out {folder}: not a folder, or a run is at work in it (wait for it, "
                        f"or choose another name): {error.strerror}") from None
    for part in folder.glob(".part-*"):
        shutil.rmtree(part, ignore_errors=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing was written
        os.close(lock)

def checkpoints(cfg: RunConfig) -> dict[str, str]:
    """Fingerprints of the files of --ckpt and --proxy-ckpt."""
    return {f"{flag(name)} {path.name}": fingerprint(path)
            for name, folder in asdict(cfg).items() if name.endswith("ckpt") and folder
            for path in sorted(Path(folder).glob("[!.]*"))
            if path.suffix in (".json", ".pth", ".bin", ".safetensors", ".model")}

def made_of(folder: Path) -> dict[str, str]:
    """Fingerprints of a run's configuration and of what it learnt."""
    files = (folder / name for name in ("config.json", "lora.pt", "emulator.pt"))
    return {path.name: fingerprint(path) for path in files if os.path.isfile(path)}

def read_run(folder: Path, ckpt: str | None = None) -> RunConfig:
    """A finished run's configuration; its files are as the run wrote them."""
    if not os.path.isfile(folder / "summary.json"):
        raise UserError(f"--run {folder}: expected the folder of a finished run; another goes "
                        f"on with train.py --resume --out")
    with expecting("its files as the run wrote them, and its checkpoint", folder):
        values = read_json(folder / "config.json")
        values["ckpt"] = ckpt or values["ckpt"]
        cfg = checked(config_of(values["method"]), values)
        then = read_json(folder / "summary.json")["made_of"]
        now = made_of(folder) | checkpoints(cfg)
        for name in then | now:
            if then.get(name) != now.get(name):
                raise ValueError(f"{'another' if name in now else 'no'} {name}; restore it (a "
                                 f"checkpoint that is elsewhere: --ckpt), or train again")
        return cfg

def load_state(folder: Path, now: dict[str, str]) -> dict | None:
    """What the last finished round left, or None. `now`: what the run depends on, by name; a
    state of others is refused."""
    path = folder / "state.pt"
    if not os.path.lexists(path):
        return None
    state = read_saved(path)
    with expecting("a state that can be resumed; move it away to start anew", path):
        then, rows, _ = state["depends_on"] | {}, state["rows"], state["server"]["learnt"]
        if [row["round"] for row in rows] != [*range(1, len(rows) + 1)]:
            raise ValueError("rows that are not rounds 1, 2, …")
        [row[name] + 0.0 for row in rows for name in ("client_loss", *COLUMNS[4:])]
        state["seconds"] + sum(m["accuracy"] for m in state["metrics"].values())
        if "emulator.pt" in then:
            now = now | {"emulator.pt": fingerprint(folder / "emulator.pt")}
    for name in (*now, *(name for name in then if "ckpt " in name)):
        if now.get(name) != then.get(name):
            raise UserError(f"{path}: was made with {name} {then.get(name)}, now it is "
                            f"{now.get(name)}; resume with the same, or choose another --out")
    return state

def depends_on(cfg: RunConfig) -> dict[str, str]:
    """Flags, and fingerprints of test files and checkpoint."""
    tests = {path.name: fingerprint(path) for path in room(TASKS[cfg.task].module).prepare(cfg)}
    flags = {flag(name): value for name, value in as_json(cfg).items() if name not in FREE}
    return flags | tests | checkpoints(cfg)

def round_line(r: dict, rounds: int, accuracies) -> str:
    """An aligned line, with all that the method has measured."""
    measured = [name for name in r if name not in (*COLUMNS[:2], *COLUMNS[4:], *accuracies)]
    return " | ".join([
        f"round {r['round']:{len(str(rounds))}d}",
        f"client {r['client_loss']:.3f}",
        *(f"{name.replace('_', ' ')} {r[name]:.3f}" for name in measured),
        f"down {megabytes(r['bytes_down'])} up {megabytes(r['bytes_up'])}",
        f"{r['seconds']:.0f} s",
        *(f"{n} {r[n]:.1%}" for n in accuracies if n in r)])

def megabytes(n: float) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e4 else f"{n:.0f} B"

def print_summary(summary: dict):
    print(f"\n{'model':10} {'accuracy':>9}   correct")
    for name, m in summary["metrics"].items():
        print(f"{name:10} {m['accuracy']:9.1%}   {m['correct']} of {m['total']}")
    print(f"\na client, a round: {megabytes(summary['bytes_down_per_client_round'])} down, "
          f"{megabytes(summary['bytes_up_per_client_round'])} up; "
          f"before round 1: {megabytes(summary['bootstrap_bytes'])}; "
          f"{summary['trainable_params']:,} trainable parameters; {summary['seconds']:.0f} s")

# ---- main ---------------------------------------------------------------------------------------
class Run:
    """Logs, saves and evaluates, round by round."""
    def __init__(self, folder: Path, cfg: RunConfig, server, tokenizer, state: dict, start: float):
        self.folder, self.cfg, self.server, self.tokenizer = folder, cfg, server, tokenizer
        self.state, self.rows = state, state["rows"]
        self.start = start - state["seconds"]
        write_json(folder / "config.json", as_json(cfg))
        if server.emulator and not self.rows:
            stored = {name: p.to(server.full.stored or p.dtype).cpu()
                      for name, p in server.emulator.items()}
            write_file(folder / "emulator.pt", lambda file: torch.save(stored, file))
            state["depends_on"]["emulator.pt"] = fingerprint(folder / "emulator.pt")
        if self.rows:
            self.evaluate_if_due()
            self.save()

    def save(self):
        """state.pt is in place before the log has the round."""
        seconds = time.perf_counter() - self.start
        self.state |= {"server": self.server.state_dict(), "seconds": seconds}
        write_file(self.folder / "state.pt", lambda file: torch.save(self.state, file))
        columns = list(dict.fromkeys([*COLUMNS, *(k for row in self.rows for k in row)]))
        table = [columns] + [[str(row.get(c, "")) for c in columns] for row in self.rows]
        text = "".join(",".join(line) + "\n" for line in table)
        write_file(self.folder / "log.csv", lambda file: file.write(text.encode()))

    def finish_round(self, record: dict):
        self.rows.append(record)
        self.save()
        self.evaluate_if_due()
        print(round_line(record, self.cfg.rounds, self.state["metrics"]), flush=True)

    def evaluate_if_due(self):
        """The last row's accuracies; the base model is scored once."""
        row, cfg, metrics = self.rows[-1], self.cfg, self.state["metrics"]
        due = cfg.eval_every and row["round"] % cfg.eval_every == 0 or row["round"] == cfg.rounds
        if "base" in row or not due:
            return
        for name, lm in self.server.models().items():
            if name != "base" or "base" not in metrics:
                score = room(TASKS[cfg.task].module).score
                metrics[name] = score(lm, self.tokenizer, cfg, f"evaluate {name}")
            row[name] = metrics[name]["accuracy"]
        self.save()

    def finish(self, bootstrap_bytes: int, trainable: int, device) -> dict:
        """lora.pt and summary.json, for other tools."""
        learnt, cfg = self.server.state_dict()["learnt"], self.cfg
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        on_gpu = device.type == "cuda" and torch.cuda.max_memory_allocated(device)
        write_file(self.folder / "lora.pt", lambda file: torch.save(learnt, file))
        summary = {
            "task": cfg.task, "method": cfg.method, "seed": cfg.seed, "rounds": cfg.rounds,
            "metrics": self.state["metrics"],
            "bytes_down_per_client_round": fmean(row["bytes_down"] for row in self.rows),
            "bytes_up_per_client_round": fmean(row["bytes_up"] for row in self.rows),
            "bootstrap_bytes": bootstrap_bytes,
            "trainable_params": trainable,
            "peak_memory_bytes": on_gpu or resident,
            "seconds": self.state["seconds"],
            "made_of": made_of(self.folder) | {  # the checkpoint as at the start
                name: found for name, found in self.state["depends_on"].items()
                if "ckpt " in name}}
        write_json(self.folder / "summary.json", summary)
        return summary

def serve(cfg: RunConfig, config: ModelConfig, folder: Path, costs: dict, device, processes):
    """The server's side, in one process the clients' too."""
    start, method = time.perf_counter(), method_of(cfg.method)
    tokenizer, known = load_tokenizer(cfg.ckpt, config), depends_on(cfg)
    public = make_public(cfg.data_dir, tokenizer, cfg.max_len)
    known["public data"] = digest_of(public.examples)
    if processes:  # the clients have the data: whose rank, None for any
        shards = [m + 1 if cfg.own_data else None for m in range(cfg.clients)]
    else:
        shards = make_shards(cfg.task, cfg.data_dir, tokenizer, cfg.clients, cfg.max_len,
                             cfg.seed, cfg.validate, cfg.strip_annotations)
        known["training data"] = digest_of(shards[0].examples)
    state = load_state(folder, known)
    if (folder / "summary.json").is_file():
        print(f"{folder}: this run is finished", file=sys.stderr)
        return
    full = load_weights(cfg.ckpt, replace(config, vocab_size=tokenizer.vocab_size),
                        dtype=pick_dtype(cfg.dtype, device), device=device)
    since = f", from round {len(state['rows']) + 1} on" if state else ""
    print_plan(costs, config, cfg, {"run": f"{folder}{since}\n"})
    server = method.Server(full, public, cfg)
    if state:
        restore(server, state["server"], folder)
    elif cfg.init_lora and "init_lora" not in server.no_use:
        room("extras.peft").start_from(Path(cfg.init_lora), server, config, cfg.alpha / cfg.rank)
    bootstrap = server.bootstrap()
    state = state or {"depends_on": known, "rows": [], "seconds": 0.0, "metrics": {}}
    if processes:
        client, wire = None, processes.start_clients(cfg, device, bootstrap, state["depends_on"])
    else:
        client, wire = method.Client(bootstrap, cfg, device), Wire()
    log = Run(folder, cfg, server, tokenizer, state, start)
    for record in federate(server, client, shards, cfg, wire, first_round=len(log.rows)):
        log.finish_round(record)
    print_summary(log.finish(payload_bytes(bootstrap), costs["trainable_params"], device))

def run(argv=None, processes=None) -> int:
    cfg = parse(argv)
    torch.set_num_threads(cfg.threads)
    config = ModelConfig.read(cfg.ckpt)
    costs = plan(config, cfg)
    if cfg.plan:
        more = {"memory": "needs extras/memory.py"}
        if find_spec("extras"):
            more = room("extras.memory").add_to(costs, config, cfg, method_of(cfg.method))
        print(json.dumps(costs)) if cfg.json else print_plan(costs, config, cfg, more)
        return 0
    device = pick_device(cfg.device)
    if processes and processes.rank:
        processes.serve(cfg, device)  # a client's process, until the end
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    folder = choose_folder(cfg, restarted=restarts > 0)
    with locked(folder):
        serve(cfg, config, folder, costs, device, processes)
    return 0

def main(argv=None) -> int:
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # torchrun's
        return room("extras.torchrun").main(run, argv)
    return run(argv)

if __name__ == "__main__":
    main_guard(main)
