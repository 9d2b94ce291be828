"""The command line: federated fine-tuning of a LLaMA that its owner keeps (FedBiOT), and the methods beside it.

In order: RunConfig (every flag, with its help and default); plan (what a run costs, from params.json
alone); the run folder (config.json, log.csv, state.pt, lora.pt, summary.json); what is printed; main.

    python train.py --task gsm8k --dropout 0.2 --adapter 2
    python train.py --task gsm8k --dropout 0.2 --adapter 2 --ckpt llama-2-7b --data-dir data
"""
import argparse
import csv
import json
import os
import resource
import sys
import time
from dataclasses import MISSING, asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path

import torch

import baselines
from data import CLIENTS, MAX_LEN, make_public, make_shards
from eval import (BUNDLED_CKPT, BUNDLED_DATA, TASKS, Parser, evaluate, main_guard, models_of_run, pick_device,
                  pick_dtype)
from fedbiot import Config, Wire, federate, layer_extract, option, payload_bytes
from model import ModelConfig, UserError, load

# What the bundled model is run with (tiny/README.md says how it was found); a real one gets the paper's.
BUNDLED = {"rounds": 8, "local_steps": 30, "lr": 3e-3, "server_lr": 2e-3, "max_len": 256, "shots": 0}
PAPER = {"rounds": 500, "local_steps": 30, "lr": 1e-4, "server_lr": 1e-4, "shots": 8}
PRESETS = {"paper": {}, "official-code": {"align_tokens": "all", "prox": 0.0, "uniform_weights": True,
                                          "align_renew": True}}


# ---- flags --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RunConfig(Config):
    """Config, and what a run is beside its algorithm. None: depends, see `resolve`."""
    rounds: int | None = option(None, "communication rounds (R); bundled model 8, else 500")
    local_steps: int | None = option(None, "steps of a client in a round (K); 30")
    lr: float | None = option(None, "learning rate of the clients (eta); bundled model 3e-3, else 1e-4")
    server_lr: float | None = option(None, "learning rate of the alignment; bundled model 2e-3, else 1e-4")
    task: str = option("gsm8k", "what the clients' data teaches", choices=TASKS)
    method: str = option("fedbiot", "federated method", choices=tuple(baselines.MODULES))
    ckpt: str | None = option(None, "checkpoint folder, Meta's or Hugging Face's; default the bundled model")
    data_dir: str | None = option(None, "folder of the official data files; default the bundled data")
    preset: str = option("paper", "paper, or what the authors' code computes", choices=tuple(PRESETS))
    clients: int | None = option(None, "number of clients; default the task's (gsm8k 3, rosetta 9, dolly 8)")
    max_len: int | None = option(None, "longest training sequence in tokens; default the task's")
    shots: int | None = option(None, "worked examples in the evaluation's prompt; bundled model 0, else 8")
    eval_every: int = option(0, "rounds between evaluations (0: only at the end)")
    eval_limit: int = option(0, "first N test examples (0: all)")
    validate: int = option(0, "hold out the last N training rows and score those, not the test set (gsm8k)")
    eval_batch: int = option(64, "sequences generated at a time")
    device: str = option("auto", "cpu, cuda, cuda:1, …; auto: a GPU where there is one")
    dtype: str = option("auto", "of the frozen weights; auto: bf16 on CUDA, else fp32",
                        choices=("auto", "fp32", "bf16", "fp16"))
    threads: int = option(0, "CPU threads of every process (0: the host's cores / its processes)")
    out: str | None = option(None, "run folder; default runs/<task>-<method>-…")


def make_parser() -> Parser:
    """One flag a field of RunConfig; a flag that was not given is absent, so presets can tell."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(RunConfig):
        flag, default = "--" + f.name.replace("_", "-"), f.default
        text = f.metadata["help"] + ("" if default is None else f" (default {default})")
        text = text.replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = {"dropout": Fraction}.get(f.name) or next(k for k in (int, float, str) if k.__name__ in str(f.type))
            parser.add_argument(flag, type=kind, help=text, choices=f.metadata.get("choices"),
                                metavar=None if "choices" in f.metadata else f.name.upper())
    parser.add_argument("--resume", action="store_true", default=False, help="go on from the last finished round of --out")
    parser.add_argument("--plan", action="store_true", default=False, help="print layers and costs, and exit")
    parser.add_argument("--json", action="store_true", default=False, help="--plan as one JSON object")
    return parser


def resolve(given: dict) -> RunConfig:
    """The whole configuration from the flags that were given: preset, then what the checkpoint suggests."""
    bundled = given.get("ckpt") is None
    task = given.get("task", "gsm8k")
    values = {"max_len": MAX_LEN.get(task), "clients": 1 if given.get("method") == "offsite" else CLIENTS[task]}
    values |= PAPER | (BUNDLED if bundled else {}) | PRESETS[given.get("preset", "paper")] | given
    values["ckpt"] = str(given.get("ckpt") or BUNDLED_CKPT)
    values["data_dir"] = str(given.get("data_dir") or BUNDLED_DATA)
    values["threads"] = values.get("threads") or max(len(os.sched_getaffinity(0)) // local_processes(), 1)
    cfg = RunConfig(**values)
    check(cfg)
    return cfg


def local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check(cfg: RunConfig):
    """Ranges, before anything is read."""
    for name, least in (("rounds", 1), ("local_steps", 1), ("batch_size", 1), ("rank", 1), ("clients", 1),
                        ("threads", 1), ("eval_batch", 1), ("align_init", 0), ("align_steps", 0), ("eval_every", 0),
                        ("eval_limit", 0), ("validate", 0), ("clients_per_round", 0), ("seed", 0), ("shots", 0), ("max_len", 2)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected {least} or more")
    for name in ("lr", "server_lr", "kl_weight", "prox", "alpha"):
        if not 0 <= getattr(cfg, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected a finite number, 0 or more")
    if cfg.clients_per_round > cfg.clients:
        raise UserError(f"--clients-per-round {cfg.clients_per_round}: there are {cfg.clients} clients")
    if cfg.validate and cfg.task != "gsm8k":
        raise UserError(f"--validate {cfg.validate}: only gsm8k trains and tests on rows of one kind; leave it out")
    if cfg.method == "offsite" and cfg.clients != 1:
        raise UserError(f"--method offsite --clients {cfg.clients}: Offsite-Tuning has one client; fedot has several")


# ---- plan ---------------------------------------------------------------------------------------

def plan(c: ModelConfig, cfg) -> dict:
    """Table 5 by its closed forms: layers, trainable parameters, MB a client a round (fp32, down + up), GMAC a token.

    GMAC: (L + L_bp - 1) P, with P = a layer's matrices and LoRA, L = layers at the client, L_bp = layers
    that the backward pass crosses. Norms, head and attention scores are not counted.
    """
    kv = c.n_kv_heads * c.head_dim
    lora = cfg.rank * (2 * c.dim + c.dim + kv)                          # wq and wv, A and B
    layer = 2 * c.dim * c.dim + 2 * c.dim * kv + 3 * c.dim * c.hidden_dim + lora
    emulator, adapter = layer_extract(c.n_layers, cfg.adapter, cfg.dropout)
    held = len(emulator) + len(adapter)
    return {"kept_layers": emulator, "adapter_layers": adapter,
            "dropped_layers": sorted(set(range(c.n_layers)) - set(emulator) - set(adapter)),
            "trainable_params": lora * len(adapter), "comm_mb_per_round": 4 * lora * (held + len(adapter)) / 1e6,
            "gmac_per_token": (held + len(adapter) - 1) * layer / 1e9}


def print_plan(p: dict, c: ModelConfig, cfg, file=sys.stdout):
    def layers(name):
        return f"{len(p[name]):3d}   " + " ".join(map(str, p[name]))
    for name, text in (("method", f"{cfg.method}, {cfg.task}, {cfg.clients} clients, {cfg.rounds} rounds"),
                       ("model", f"{c.n_layers} layers x {c.dim}, {cfg.ckpt}"), ("kept (emulator)", layers("kept_layers")),
                       ("dropped", layers("dropped_layers")), ("adapter", layers("adapter_layers")),
                       ("trainable", f"{p['trainable_params']:,} parameters"),
                       ("communication", f"{p['comm_mb_per_round']:.2f} MB a client a round, down + up"),
                       ("compute", f"{p['gmac_per_token']:.4g} GMAC a token at a client")):
        print(f"{name:16}  {text}", file=file)


# ---- run folder ---------------------------------------------------------------------------------

COLUMNS = ("round", "client_loss", "align_l2", "align_kl", "bytes_down", "bytes_up", "seconds")


def write(path: Path, fill):
    """`fill(file)` into a temporary name, synced, renamed: the old file stays until the new one is whole."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); what was there before is unchanged") from None


def write_json(path: Path, content: dict):
    write(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def write_log(folder: Path, rows: list[dict]):
    columns = list(COLUMNS) + [k for k in dict.fromkeys(k for row in rows for k in row) if k not in COLUMNS]
    lines = [",".join(columns)] + [",".join(str(row.get(c, "")) for c in columns) for row in rows]
    write(folder / "log.csv", lambda file: file.write(("\n".join(lines) + "\n").encode()))


def as_json(cfg: RunConfig) -> dict:
    return {k: str(v) if isinstance(v, Fraction) else v for k, v in asdict(cfg).items()}


def run_folder(cfg: RunConfig, resume: bool) -> Path:
    """Where the run goes. An explicit --out that exists needs --resume; a default name takes -2, -3, …"""
    if cfg.out:
        folder = Path(cfg.out)
        if folder.exists() and not resume:
            raise UserError(f"--out {folder}: exists already; add --resume to go on with it, or choose another name")
        return folder
    name = f"{cfg.task}-{cfg.method}-b{float(cfg.dropout):g}-s{cfg.adapter}-seed{cfg.seed}"
    folder, number = Path("runs") / name, 1
    while folder.exists() and not resume:
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def load_state(folder: Path, cfg: RunConfig) -> dict | None:
    """What the last finished round left, or None. A state of another configuration is refused."""
    path = folder / "state.pt"
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        then, now = state["config"], as_json(cfg)
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: not a state that can be resumed ({str(error)[:100]}); move it away to start anew") from None
    for key in now:
        if key not in ("out", "device") and then.get(key) != now[key]:
            raise UserError(f"{path}: was made with --{key.replace('_', '-')} {then.get(key)}, now it is {now[key]}; "
                            f"resume with the same flags, or choose another --out")
    return state


# ---- what is printed ----------------------------------------------------------------------------

def round_line(r: dict, rounds: int) -> str:
    parts = [f"round {r['round']:{len(str(rounds))}d}", f"client {r['client_loss']:.3f}"]
    if "align_l2" in r:
        parts.append(f"align l2 {r['align_l2']:.3f} kl {r['align_kl']:.3f}")
    parts.append(f"down {megabytes(r['bytes_down'])} up {megabytes(r['bytes_up'])}")
    parts.append(f"{r['seconds']:.0f} s")
    parts += [f"{name} {r[name]:.1%}" for name in r if name not in COLUMNS]
    return " | ".join(parts)


def megabytes(n: float) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e4 else f"{n:.0f} B"


def print_summary(summary: dict):
    print(f"\n{'model':10} {'accuracy':>9}   correct")
    for name, m in summary["metrics"].items():
        print(f"{name:10} {m['accuracy']:9.1%}   {m['correct']} of {m['total']}")
    print(f"\na client, a round: {megabytes(summary['bytes_down_per_client_round'])} down, "
          f"{megabytes(summary['bytes_up_per_client_round'])} up; once: {megabytes(summary['bootstrap_bytes'])}; "
          f"{summary['trainable_params']:,} trainable parameters; {summary['seconds']:.0f} s")


# ---- main ---------------------------------------------------------------------------------------

class Run:
    """A run folder and what has been learnt so far: logs, saves and evaluates, round by round."""

    def __init__(self, folder: Path, cfg: RunConfig, server, tokenizer, state: dict | None):
        self.folder, self.cfg, self.server, self.tokenizer = folder, cfg, server, tokenizer
        self.state = state or {"config": as_json(cfg), "rows": [], "seconds": 0.0, "metrics": {}}
        self.rows = self.state["rows"]
        self.start = time.perf_counter() - self.state["seconds"]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", as_json(cfg))
        if self.rows:
            self.evaluate_if_due()
            write_log(folder, self.rows)

    def save(self):
        """state.pt is in place before the round's row is in the log."""
        self.state |= {"server": self.server.state_dict(), "seconds": time.perf_counter() - self.start}
        write(self.folder / "state.pt", lambda file: torch.save(self.state, file))
        write_log(self.folder, self.rows)

    def finish_round(self, record: dict):
        self.rows.append(record)
        self.save()
        self.evaluate_if_due()
        print(round_line(self.rows[-1], self.cfg.rounds), flush=True)

    def evaluate_if_due(self):
        """The last row's accuracies; the base model never changes and is scored once."""
        row, cfg = self.rows[-1], self.cfg
        last = row["round"] == cfg.rounds
        if "base" in row or not (last or cfg.eval_every and row["round"] % cfg.eval_every == 0):
            return
        opts = argparse.Namespace(data_dir=cfg.data_dir, limit=cfg.eval_limit, shots=cfg.shots,
                                  batch_size=cfg.eval_batch, max_new_tokens=0, validate=cfg.validate)
        for name, lm in self.server.models().items():
            if name != "base" or "base" not in self.state["metrics"]:
                self.state["metrics"][name] = evaluate(lm, self.tokenizer, cfg.task, opts, f"evaluate {name}")
            row[name] = self.state["metrics"][name]["accuracy"]
        self.save()

    def finish(self, bootstrap_bytes: int, trainable: int) -> dict:
        """lora.pt and summary.json: what other tools read."""
        learnt = self.server.state_dict()["learnt"]
        write(self.folder / "lora.pt", lambda file: torch.save(learnt, file))

        def mean(column):
            return sum(row[column] for row in self.rows) / len(self.rows)
        summary = {"task": self.cfg.task, "method": self.cfg.method, "seed": self.cfg.seed, "rounds": self.cfg.rounds,
                   "metrics": self.state["metrics"], "bytes_down_per_client_round": mean("bytes_down"),
                   "bytes_up_per_client_round": mean("bytes_up"), "bootstrap_bytes": bootstrap_bytes,
                   "trainable_params": trainable, "peak_memory_bytes": peak_memory(),
                   "seconds": self.state["seconds"]}
        write_json(self.folder / "summary.json", summary)
        return summary


def peak_memory() -> int:
    """Of this process: on a GPU what PyTorch allocated there, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv=None) -> int:
    args = vars(make_parser().parse_args(argv))
    resume, only_plan, as_json_object = args.pop("resume"), args.pop("plan"), args.pop("json")
    cfg = resolve(args)
    model_config = ModelConfig.read(cfg.ckpt)
    costs = plan(model_config, cfg)
    if only_plan:
        print(json.dumps(costs)) if as_json_object else print_plan(costs, model_config, cfg)
        return 0
    folder = run_folder(cfg, resume)
    if resume and (folder / "summary.json").is_file():
        print(f"{folder}: this run is finished", file=sys.stderr)
        return 0
    torch.set_num_threads(cfg.threads)
    state = load_state(folder, cfg)
    device = pick_device(cfg.device)
    full, tokenizer = load(cfg.ckpt, dtype=pick_dtype(cfg.dtype, device), device=device)
    shards = make_shards(cfg.task, cfg.data_dir, tokenizer, cfg.clients, cfg.max_len, cfg.seed, cfg.validate)
    public = make_public(cfg.data_dir, tokenizer, cfg.max_len)
    print_plan(costs, model_config, cfg)
    print(f"{'run':16}  {folder}\n", flush=True)
    method = baselines.module_of(cfg.method)
    server = method.Server(full, public, cfg)
    if state:
        server.load_state_dict(state["server"])
    bootstrap = server.bootstrap()
    client = method.Client(bootstrap, cfg, device)
    run = Run(folder, cfg, server, tokenizer, state)
    for record in federate(server, client, shards, cfg, Wire(), first_round=len(run.rows)):
        run.finish_round(record)
    print_summary(run.finish(payload_bytes(bootstrap), costs["trainable_params"]))
    return 0


if __name__ == "__main__":
    main_guard(main)
