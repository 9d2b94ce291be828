"""The command line: federated fine-tuning of a LLaMA that its owner keeps (FedBiOT), and the methods beside it.

In order: RunConfig (every flag, with its help and default); plan (what a run costs, from params.json
alone); the run folder (config.json, log.csv, state.pt, lora.pt, summary.json); Processes (the wire that
torchrun needs); what is printed; main.

    python train.py --task gsm8k --dropout 0.2 --adapter 2
    python train.py --task gsm8k --dropout 0.2 --adapter 2 --ckpt llama-2-7b --data-dir data
"""
import argparse
import contextlib
import importlib.util
import io
import json
import os
import resource
import secrets
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import baselines
from data import CLIENTS, MAX_LEN, make_public, make_shards, read_gsm8k
from eval import BUNDLED_CKPT, BUNDLED_DATA, TASKS, Parser, evaluate, gsm8k_shots, main_guard, pick_device, pick_dtype
from fedbiot import Config, Payload, Wire, federate, misfit, option, payload_bytes
from lora import start_from
from model import ModelConfig, UserError, load, load_tokenizer, read_saved
from tasks.sandbox import make_box

# What the bundled model is run with (tiny/README.md says how it was found); a real one gets the paper's.
BUNDLED = {"rounds": 5, "local_steps": 30, "lr": 3e-3, "server_lr": 2e-3, "max_len": 256, "shots": 0, "samples": 1}
PAPER = {"rounds": 500, "local_steps": 30, "lr": 1e-4, "server_lr": 1e-4, "shots": 8, "samples": 20}
PRESETS = {"paper": {}, "official-code": {"align_tokens": "all", "prox": 0.0, "uniform_weights": True,
                                          "align_renew": True}}
METHOD = {"fedkseed": {"local_steps": 200, "lr": 3e-7}, "fedkseed-pro": {"local_steps": 200, "lr": 3e-7}}
METHOD_BUNDLED = {"fedkseed": {"lr": 1e-3}, "fedkseed-pro": {"lr": 1e-3}}

ONCE = {"prox", "align_steps", "align_renew"}           # what alignment before the first round leaves idle
EMULATOR = ONCE | {"dropout", "adapter", "kl_weight", "align_init", "align_norm", "align_tokens"}
NO_USE = {"fedbiot": set(), "offsite": ONCE, "fedot": ONCE, "fedavg": EMULATOR | {"server_lr"},
          "fedpt": EMULATOR | {"init_lora"}, **{name: EMULATOR | {"server_lr", "rank", "alpha", "init_lora"}
                                                for name in ("fedkseed", "fedkseed-pro", "fedtt", "fedtt+")}}
OWN = {"kseed_": "fedkseed", "tt_": "fedtt", "proxy_": "fedpt"}         # whose flags these are


# ---- flags --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RunConfig(Config):
    """Config, and what a run is beside its algorithm. None: depends, see `resolve`."""
    rounds: int | None = option(None, "communication rounds (R); bundled model 5, else 500")
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
    samples: int | None = option(None, "programs a problem in rosetta's evaluation; bundled model 1 (greedy), else 20")
    run_code: bool = option(False, "rosetta's evaluation runs those programs, sandboxed; else it compares their text")
    eval_every: int = option(0, "rounds between evaluations (0: only at the end)")
    eval_limit: int = option(0, "first N test examples (0: all)")
    validate: int = option(0, "hold out the last N training rows and score those, not the test set (gsm8k)")
    strip_annotations: bool = option(False, "take GSM8K's <<48/2=24>> out of the training answers")
    eval_batch: int = option(64, "sequences generated at a time")
    device: str = option("auto", "cpu, cuda, cuda:1, …; auto: a GPU where there is one")
    dtype: str = option("auto", "of the frozen weights; auto: bf16 on CUDA, else fp32",
                        choices=("auto", "fp32", "bf16", "fp16"))
    threads: int = option(0, "CPU threads of every process (0: the host's cores / its processes)")
    out: str | None = option(None, "run folder; default runs/<task>-<method>-…")
    init_lora: str | None = option(None, "start from this LoRA: a PEFT adapter's folder, a run's folder or its lora.pt")
    tensorboard: bool = option(False, "the log for TensorBoard too, in <run folder>/tensorboard")
    kseed_candidates: int = option(0, "FedKSeed: candidate seeds (K); 0: 4096, for Pro 1024")
    kseed_eps: float = option(5e-4, "FedKSeed: step of the two-point gradient (epsilon)")
    tt_rank: int = option(5, "FedTT: rank of the tensor trains")
    tt_bottleneck: int = option(64, "FedTT: width inside an adapter")
    tt_bias: bool = option(False, "FedTT: biases in the adapters")
    proxy_ckpt: str | None = option(None, "FedPT: folder of the small model, same tokenizer; default the bundled one")
    proxy_alpha: float = option(1.0, "FedPT: weight of the small model's change in the proxy (alpha)")
    proxy_steps: int = option(10, "FedPT: distillation steps after a round")


def share(text: str) -> Fraction:
    """What was typed, exactly: 0.2 is 1/5."""
    try:
        value = Fraction(text)
        float(value)
    except (ZeroDivisionError, OverflowError):
        raise ValueError(text) from None                    # argparse makes one line of it
    return value


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
            kind = {"dropout": share}.get(f.name) or next(k for k in (int, float, str) if k.__name__ in str(f.type))
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
    method = given.get("method", "fedbiot")
    values |= PAPER | (BUNDLED if bundled else {}) | METHOD.get(method, {})
    values |= (METHOD_BUNDLED.get(method, {}) if bundled else {}) | PRESETS[given.get("preset", "paper")] | given
    values["ckpt"] = str(given.get("ckpt") or BUNDLED_CKPT)
    values["data_dir"] = str(given.get("data_dir") or BUNDLED_DATA)
    values["threads"] = values.get("threads") or max(len(os.sched_getaffinity(0)) // local_processes(), 1)
    cfg = RunConfig(**values)
    check(cfg)
    if idle := idle_flags(given, cfg.method):
        print(f"note: {cfg.method} has no use for {', '.join(idle)}", file=sys.stderr)
    return cfg


def idle_flags(given: dict, method: str) -> list[str]:
    """Flags that were given and change nothing for this method."""
    idle = [f for f in given if f in NO_USE[method]
            or any(f.startswith(own) and not method.startswith(its) for own, its in OWN.items())]
    return ["--" + f.replace("_", "-") for f in idle]


def local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check(cfg: RunConfig):
    """Ranges, before anything is read."""
    for name, least in (("rounds", 1), ("local_steps", 1), ("batch_size", 1), ("rank", 1), ("clients", 1),
                        ("threads", 1), ("eval_batch", 1), ("align_init", 0), ("align_steps", 0), ("eval_every", 0),
                        ("eval_limit", 0), ("validate", 0), ("clients_per_round", 0), ("seed", 0), ("shots", 0), ("max_len", 2),
                        ("samples", 1), ("kseed_candidates", 0), ("tt_rank", 1), ("tt_bottleneck", 1), ("proxy_steps", 0)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected {least} or more")
    for name in ("lr", "server_lr", "kl_weight", "prox", "alpha", "proxy_alpha", "max_update_norm", "client_timeout"):
        if not 0 <= getattr(cfg, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected a finite number, 0 or more")
    if not 0 < cfg.kseed_eps < float("inf"):
        raise UserError(f"--kseed-eps {cfg.kseed_eps}: expected a finite number above 0, for example 5e-4")
    if cfg.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard: not installed; pip install tensorboard, or leave it: log.csv has the same numbers")
    if cfg.clients_per_round > cfg.clients:
        raise UserError(f"--clients-per-round {cfg.clients_per_round}: there are {cfg.clients} clients")
    if cfg.task == "gsm8k":
        gsm8k_shots(cfg.shots)                              # refused now, not after the last round
    if cfg.task == "rosetta" and cfg.run_code:
        make_box()                                          # likewise
    if cfg.validate and cfg.task != "gsm8k":
        raise UserError(f"--validate {cfg.validate}: only gsm8k trains and tests on rows of one kind; leave it out")
    if cfg.method == "offsite" and cfg.clients != 1:
        raise UserError(f"--method offsite --clients {cfg.clients}: Offsite-Tuning has one client; fedot has several")


# ---- plan ---------------------------------------------------------------------------------------

def plan(c: ModelConfig, cfg) -> dict:
    """Table 5 by its closed forms: layers, trainable parameters, MB a client a round (down + up), GMAC a token.

    GMAC: (L + L_bp - 1) P, with P = a layer's matrices and what is tuned in it, L = layers at the client,
    L_bp = layers that the backward pass crosses. Norms, head and attention scores are not counted.
    """
    n, everything = c.n_layers, list(range(c.n_layers))
    matrices, lora = layer_sizes(c, cfg.rank)
    emulator, adapter, layer = [], everything, matrices + lora
    if cfg.method in ("fedbiot", "offsite", "fedot"):
        emulator, adapter = baselines.module_of(cfg.method).Server.split(n, cfg)
        held, tuned = len(emulator) + len(adapter), len(adapter)
        trained, sent = lora * tuned, 4 * lora * ((held if cfg.method == "fedbiot" else tuned) + tuned)
        crossed = held + (tuned if cfg.method == "fedbiot" else held) - 1
    elif cfg.method == "fedavg":
        trained, sent, crossed = lora * n, 8 * lora * n, 2 * n - 1
    elif cfg.method in ("fedkseed", "fedkseed-pro"):                    # two forwards, no backward
        pro = cfg.method == "fedkseed-pro"
        K = cfg.kseed_candidates or (1024 if pro else 4096)
        trained, layer, crossed = whole_size(c), matrices, 2 * n
        sent = 4 + 4 * K * (1 + pro) + 8 * cfg.local_steps
    elif cfg.method in ("fedtt", "fedtt+"):                             # FedTT+: mean of a cycle over the cores
        cores, biases = baselines.module_of(cfg.method).sizes(c.dim, cfg)
        trained, layer, crossed = n * (cores + biases), matrices + cores + biases, 2 * n - 1
        some_absent = cfg.clients_per_round or cfg.client_timeout
        sent = 8 * n * (cores / (6 if cfg.method == "fedtt+" and not some_absent else 1) + biases)
    else:                                                               # FedPT: FedAvg, on the small model
        _, small = baselines.module_of(cfg.method).small_config(cfg, c.vocab_size)
        matrices, lora = layer_sizes(small, cfg.rank)
        adapter, layer, crossed = [], matrices + lora, 2 * small.n_layers - 1
        trained, sent = lora * small.n_layers, 8 * lora * small.n_layers
    dropped = sorted(set(everything) - set(emulator) - set(adapter))
    return {"kept_layers": emulator, "adapter_layers": adapter, "dropped_layers": dropped,
            "trainable_params": trained, "comm_mb_per_round": sent / 1e6, "gmac_per_token": crossed * layer / 1e9}


def layer_sizes(c: ModelConfig, rank: int) -> tuple[int, int]:
    """Parameters of a layer's matrices, and of its LoRA on wq and wv."""
    kv = c.n_kv_heads * c.head_dim
    return 2 * c.dim * c.dim + 2 * c.dim * kv + 3 * c.dim * c.hidden_dim, rank * (2 * c.dim + c.dim + kv)


def whole_size(c: ModelConfig) -> int:
    """Parameters of the model. LLaMA's old params.json leave the vocabulary to the tokenizer: 32,000 pieces."""
    vocab = 32000 if c.vocab_size == -1 else c.vocab_size
    return c.n_layers * (layer_sizes(c, 0)[0] + 2 * c.dim) + c.dim + vocab * c.dim * (1 if c.tied else 2)


def print_plan(p: dict, c: ModelConfig, cfg):
    def layers(name):
        return f"{len(p[name]):3d}   " + " ".join(map(str, p[name]))
    for name, text in (("method", f"{cfg.method}, {cfg.task}, {cfg.clients} clients, {cfg.rounds} rounds"),
                       ("model", f"{c.n_layers} layers x {c.dim}, {cfg.ckpt}"), ("kept (emulator)", layers("kept_layers")),
                       ("dropped", layers("dropped_layers")), ("adapter", layers("adapter_layers")),
                       ("trainable", f"{p['trainable_params']:,} parameters"),
                       ("communication", f"{megabytes(p['comm_mb_per_round'] * 1e6)} a client a round, down + up"),
                       ("compute", f"{p['gmac_per_token']:.4g} GMAC a token at a client")):
        print(f"{name:16}  {text}")


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
        folder = os.open(path.parent, os.O_RDONLY)              # the new name too must outlive a power cut
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:                    # RuntimeError: torch.save, whose file could not grow
        raise UserError(f"{path}: cannot be written ({error}); what was there before is unchanged") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: dict):
    write(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def write_log(folder: Path, rows: list[dict]):
    columns = list(COLUMNS) + [k for k in dict.fromkeys(k for row in rows for k in row) if k not in COLUMNS]
    lines = [",".join(columns)] + [",".join(str(row.get(c, "")) for c in columns) for row in rows]
    write(folder / "log.csv", lambda file: file.write(("\n".join(lines) + "\n").encode()))


def as_json(cfg: RunConfig) -> dict:
    return {k: str(v) if isinstance(v, Fraction) else v for k, v in asdict(cfg).items()}


def run_folder(cfg: RunConfig, resume: bool, restarted: bool = False) -> Path:
    """Where the run goes. An explicit --out that exists needs --resume; a default name takes -2, -3, …, and is
    resumed at the last of them. What torchrun restarts goes on, but not with a finished run."""
    if cfg.out:
        folder = Path(cfg.out)
        if folder.exists() and not (resume or restarted):
            raise UserError(f"--out {folder}: exists already; add --resume to go on with it, or choose another name")
        return folder
    name = f"{cfg.task}-{cfg.method}-b{float(cfg.dropout):g}-s{cfg.adapter}-seed{cfg.seed}"
    last, folder, number = None, Path("runs") / name, 1
    while folder.exists():
        number += 1
        last, folder = folder, Path("runs") / f"{name}-{number}"
    return last if last and (resume or restarted and not (last / "summary.json").exists()) else folder


def load_state(folder: Path, cfg: RunConfig) -> dict | None:
    """What the last finished round left, or None. A state of another configuration is refused."""
    path = folder / "state.pt"
    if not path.is_file():
        return None
    try:
        state = read_saved(path)
        then, now = state["config"] | {}, as_json(cfg)
        if [row["round"] for row in state["rows"]] != list(range(1, len(state["rows"]) + 1)):
            raise ValueError("its rounds are not 1, 2, …")
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: not a state that can be resumed ({str(error)[:100]}); move it away to start anew") from None
    if flag := difference(then, now, ("out", "device", "client_timeout", "tensorboard")):
        raise UserError(f"{path}: was made with --{flag.replace('_', '-')} {then.get(flag)}, now it is {now[flag]}; "
                        f"resume with the same flags, or choose another --out")
    return state


def go_on_from(state: dict, server, folder: Path):
    try:
        server.load_state_dict(state)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(f"{folder / 'state.pt'}: not this method's and this model's state ({str(error)[:100]}); "
                        f"move it away to start anew") from None


def difference(then: dict, now: dict, free: tuple[str, ...]) -> str | None:
    """The first flag in which two configurations differ, but for those that are free to."""
    return next((key for key in now if key not in free and then.get(key) != now[key]), None)


# ---- processes ----------------------------------------------------------------------------------
# Short JSON messages go through torch.distributed's key-value store, tensors through its process group,
# and only once the other side has asked for them. So nobody hangs in a receive: a slow client can be
# left out of a round, and a rank that fails is heard by all who wait.

DTYPES = {str(d): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8,
                              torch.bool)}


def header_of(payload: Payload) -> list:
    return [[name, str(t.dtype), list(t.shape)] for name, t in payload.items()]


def described(header) -> Payload:
    """What a header claims, as tensors without memory; {} where it is no header."""
    try:
        return {str(name): torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, dtype, shape in header}
    except (ValueError, KeyError, TypeError, RuntimeError):
        return {}


def met(store, rank: int, world: int) -> str:
    """A word that this start's ranks share. torchrun may keep the store when it restarts them, so what the
    dead have left in it must not count: rank 0 answers each greeting, and only the living answer back."""
    me, missing = secrets.token_hex(8), set(range(1, world))
    if rank:
        store.set(f"hello {rank}", me)
        word = store.get(f"welcome {me}").decode()                      # waits
        store.set(f"here {word} {rank}", me)
        return word
    while missing:
        for r in [r for r in missing if store.check([f"hello {r}"])]:
            store.set(f"welcome {store.get(f'hello {r}').decode()}", me)
            if store.check([f"here {me} {r}"]):
                missing.remove(r)
        time.sleep(0.01)
    return me


class Processes:
    """The wire between processes: rank 0 is the server, every other rank serves some of the clients.

    Only the order of the clients counts in what is summed, so any number of ranks gives the same bits.
    """
    def __init__(self):
        try:
            store, self.rank, self.world = next(dist.rendezvous("env://"))
            self.store = dist.PrefixStore(met(store, self.rank, self.world), store)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"torchrun: the other processes cannot be reached: {str(error)[:120]}") from None
        self.late = set()               # ranks that are still at work on what was given up

    def connect(self, cfg: RunConfig, device):
        """The process group. Its own timeout is long: a server may align or evaluate for hours."""
        self.cfg, self.device, mine = cfg, device, as_json(cfg)
        if self.rank == 0:              # nccl has one GPU a rank; where ranks share one, tensors go by way of the CPU
            own_gpu = device.type == "cuda" and torch.cuda.device_count() >= local_processes()
            backend = "nccl" if own_gpu else "gloo"
            for rank in range(1, self.world):
                self.post(f"to {rank}", [mine, backend])
            for rank in range(1, self.world):
                self.wait(f"from {rank}")
            for rank in range(1, self.world):                           # nobody connects before all are well
                self.post(f"to {rank}", "connect")
        else:
            theirs, backend = self.wait(f"to {self.rank}")
            free = ("out", "device", "threads", "ckpt", "proxy_ckpt", "data_dir", "init_lora", "tensorboard")
            if flag := difference(theirs, mine, free):
                raise UserError(f"rank {self.rank}: was started with --{flag.replace('_', '-')} {mine[flag]}, rank 0 "
                                f"with {theirs.get(flag)}; give all hosts the same flags")
            self.post(f"from {self.rank}", "ready")
            self.wait(f"to {self.rank}")
        self.place = device if backend == "nccl" else torch.device("cpu")
        if self.place.type == "cuda":
            torch.cuda.set_device(device)
        with self.reaching("the others"):
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world,
                                    timeout=timedelta(hours=24))

    @contextlib.contextmanager
    def reaching(self, whom):
        try:
            yield
        except RuntimeError as error:
            raise UserError(f"rank {self.rank} cannot reach {whom}: {str(error).splitlines()[0][:120]}") from None

    def post(self, key: str, message):
        with self.reaching("the store"):
            self.store.set(key, json.dumps(message))

    def look(self, key: str):
        """Takes the message under a key; None: not there yet. Ends this process where the run has ended."""
        with self.reaching("the store"):
            if self.store.check(["end"]):
                sys.exit(int(self.store.get("end").split()[0]))
            if not self.store.check([key]):
                return None
            message = self.store.get(key)
            self.store.delete_key(key)
        return json.loads(message)

    def wait(self, key: str):
        while (message := self.look(key)) is None:
            time.sleep(0.01)
        return message

    def send(self, payload: Payload, rank: int):
        """Every tensor as its bytes: gloo does not know all dtypes."""
        with self.reaching(f"rank {rank}"):
            for t in payload.values():
                dist.send(t.detach().to(self.place).contiguous().view(-1).view(torch.uint8), rank)

    def receive(self, like: Payload, rank: int) -> Payload:
        payload = {name: torch.empty_like(t, device=self.place) for name, t in like.items()}
        with self.reaching(f"rank {rank}"):
            for t in payload.values():
                dist.recv(t.view(-1).view(torch.uint8), rank)
        return {name: t.to(self.device) for name, t in payload.items()}

    def start_clients(self, bootstrap: Payload):
        for rank in range(1, self.world):
            self.post(f"to {rank}", header_of(bootstrap))
            self.send(bootstrap, rank)

    def serve(self, make_client, shards):
        """A client rank's life, until the run ends: builds itself from what it is sent, then obeys orders."""
        client, upload = make_client(self.receive(described(self.wait(f"to {self.rank}")), 0)), {}
        while True:
            order = self.wait(f"to {self.rank}")
            if order == "send":
                self.send(upload, 0)
                continue
            t, m, header = order
            upload, metrics = client.update(t, self.receive(described(header), 0), shards[m], m)
            self.post(f"from {self.rank}", [header_of(upload), metrics])

    def round(self, t: int, payload: Payload, client, shards, chosen, expected) -> dict[int, tuple[Payload, dict]]:
        """As Wire.round; clients that are silent for --client-timeout are left out."""
        self.down, self.up, results, busy = [], [], {}, {}
        ranks = [r for r in range(1, self.world) if r not in self.late or self.look(f"from {r}")]
        self.late = set(range(1, self.world)) - set(ranks)
        queues = {r: list(chosen[i::len(ranks)]) for i, r in enumerate(ranks)}
        bar = tqdm(total=len(chosen), desc=f"round {t + 1}", leave=False, disable=None)
        while busy or any(queues.values()):
            for rank in queues:
                if rank in busy and (answer := self.look(f"from {rank}")) is not None:
                    results[busy.pop(rank)[0]] = self.collect(rank, answer, expected)
                    bar.update()
                if rank not in busy and queues[rank]:
                    m = queues[rank].pop(0)
                    self.post(f"to {rank}", [t, m, header_of(payload)])
                    self.send(payload, rank)
                    self.down.append(payload_bytes(payload))
                    busy[rank] = m, time.monotonic()
            for rank in [r for r, (_, since) in busy.items() if 0 < self.cfg.client_timeout < time.monotonic() - since]:
                del busy[rank]
                self.late.add(rank)
                rest = queues.pop(rank)
                if queues:                                              # others take over what it had not begun
                    min(queues.values(), key=len).extend(rest)
            time.sleep(0.01)
        bar.close()
        for m in chosen:
            if m not in results:
                print(f"round {t + 1}, client {m}: left out, no upload within --client-timeout "
                      f"{self.cfg.client_timeout:g} s", file=sys.stderr)
        return {m: results[m] for m in chosen if m in results}

    def collect(self, rank: int, answer, expected: Payload) -> tuple[Payload, dict]:
        """An upload, asked for only if its header fits: else what it claims, which `accepted` will reject."""
        try:
            upload, metrics = described(answer[0]), {"loss": float(answer[1]["loss"])}
        except (TypeError, ValueError, LookupError):
            upload, metrics = {}, {}
        if not misfit(upload, expected):
            self.post(f"to {rank}", "send")
            upload = self.receive(upload, rank)
            self.up.append(payload_bytes(upload))
        return upload, metrics

    def end(self, status: int) -> bool:
        """All ranks stop. True for the first to say so: its line is the one to print."""
        mine = f"{status} {self.rank}"
        try:
            first = self.store.compare_set("end", "", mine).decode() == mine
            self.store.add("gone", 1)
            waits, until = first or self.rank == 0, time.monotonic() + 3
            while waits and self.store.add("gone", 0) < self.world and time.monotonic() < until:
                time.sleep(0.01)                        # rank 0 may be the store's host
        except RuntimeError:
            return True
        return first


# ---- what is printed ----------------------------------------------------------------------------

def round_line(r: dict, rounds: int) -> str:
    parts = [f"round {r['round']:{len(str(rounds))}d}", f"client {r['client_loss']:.3f}"]
    if "align_l2" in r:
        parts.append(f"align l2 {r['align_l2']:.3f} kl {r['align_kl']:.3f}")
    parts.append(f"down {megabytes(r['bytes_down'])} up {megabytes(r['bytes_up'])}")
    parts.append(f"{r['seconds']:.0f} s")
    if "distill_kl" in r:
        parts.insert(2, f"distil kl {r['distill_kl']:.3f} drift {r['drift']:.2f}")
    parts += [f"{name} {r[name]:.1%}" for name in r if name not in COLUMNS + ("distill_kl", "drift")]
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: no folder can be made there ({error})") from None
        write_json(folder / "config.json", as_json(cfg))
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(folder / "tensorboard", purge_step=len(self.rows) + 1)
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
        if self.cfg.tensorboard:
            for name, value in record.items():
                self.board.add_scalar(name, value, record["round"])
            self.board.flush()
        print(round_line(self.rows[-1], self.cfg.rounds), flush=True)

    def evaluate_if_due(self):
        """The last row's accuracies; the base model never changes and is scored once."""
        row, cfg = self.rows[-1], self.cfg
        last = row["round"] == cfg.rounds
        if "base" in row or not (last or cfg.eval_every and row["round"] % cfg.eval_every == 0):
            return
        opts = argparse.Namespace(data_dir=cfg.data_dir, limit=cfg.eval_limit, shots=cfg.shots,
                                  batch_size=cfg.eval_batch, max_new_tokens=0, validate=cfg.validate, samples=cfg.samples,
                                  temperature=None, top_k=40, top_p=0.75, k=0, seed=cfg.seed, run_code=cfg.run_code,
                                  unsafe_no_sandbox=False, save_predictions=None)
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


def notes(processes: Processes | None):
    """Where notes may be printed: by one process, or by rank 0 of several."""
    return contextlib.redirect_stderr(io.StringIO()) if processes and processes.rank else contextlib.nullcontext()


def device_of(cfg: RunConfig) -> torch.device:
    """--device; under torchrun each process takes the host's next GPU."""
    device = pick_device(cfg.device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return device


def shards_of(cfg: RunConfig, tokenizer) -> list:
    return make_shards(cfg.task, cfg.data_dir, tokenizer, cfg.clients, cfg.max_len, cfg.seed, cfg.validate,
                       cfg.strip_annotations)


def serve_clients(cfg: RunConfig, processes: Processes) -> int:
    """A rank above 0. Tokenizer and data are read here; of the model there is only what the server sends."""
    torch.set_num_threads(cfg.threads)
    with notes(processes):
        tokenizer = load_tokenizer(cfg.ckpt, ModelConfig.read(cfg.ckpt))
        shards = shards_of(cfg, tokenizer)
    device = device_of(cfg)
    processes.connect(cfg, device)
    processes.serve(lambda bootstrap: baselines.module_of(cfg.method).Client(bootstrap, cfg, device), shards)
    return 0


def main(argv=None) -> int:
    """One process, or one rank of those that torchrun started: an error of any ends all, in one line."""
    if "RANK" not in os.environ:
        return run(argv)
    processes = Processes()
    try:
        status = run(argv, processes)
    except SystemExit as ended:
        processes.end(ended.code)
        raise
    except BaseException as error:
        status = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)     # 1: a bug, with its traceback
        if processes.end(status) or status == 1:
            raise
        sys.exit(status)                                        # another rank has said why
    processes.end(status)
    return status


def run(argv=None, processes: Processes | None = None) -> int:
    args = vars(make_parser().parse_args(argv))
    resume, only_plan, as_json_object = args.pop("resume"), args.pop("plan"), args.pop("json")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    with notes(processes):
        cfg = resolve(args)
    if processes and processes.rank and not only_plan:
        return serve_clients(cfg, processes)
    model_config = ModelConfig.read(cfg.ckpt)
    costs = plan(model_config, cfg)
    if only_plan:
        if not (processes and processes.rank):
            print(json.dumps(costs)) if as_json_object else print_plan(costs, model_config, cfg)
        return 0
    folder = run_folder(cfg, resume, restarted)
    resume = resume or restarted
    if resume and (folder / "summary.json").is_file():
        print(f"{folder}: this run is finished", file=sys.stderr)
        return 0
    if cfg.method == "fedpt":
        baselines.module_of(cfg.method).check_pieces(cfg)
    torch.set_num_threads(cfg.threads)
    state = load_state(folder, cfg)
    device, wire = device_of(cfg), Wire()
    if processes and processes.world > 1:
        wire = processes
        wire.connect(cfg, device)
    full, tokenizer = load(cfg.ckpt, dtype=pick_dtype(cfg.dtype, device), device=device)
    shards = shards_of(cfg, tokenizer)
    public = make_public(cfg.data_dir, tokenizer, cfg.max_len)
    if cfg.task == "gsm8k":
        read_gsm8k(cfg.data_dir, "test")                            # a bad file is refused now, not after training
    print_plan(costs, model_config, cfg)
    print(f"{'run':16}  {folder}\n", flush=True)
    method = baselines.module_of(cfg.method)
    server = method.Server(full, public, cfg)
    if state:
        go_on_from(state["server"], server, folder)
    elif cfg.init_lora and "init_lora" not in NO_USE[cfg.method]:
        start_from(Path(cfg.init_lora), server, model_config, cfg.alpha / cfg.rank)
    bootstrap, client = server.bootstrap(), None
    if processes is wire:
        wire.start_clients(bootstrap)
    else:
        client = method.Client(bootstrap, cfg, device)
    log = Run(folder, cfg, server, tokenizer, state)
    for record in federate(server, client, shards, cfg, wire, first_round=len(log.rows)):
        log.finish_round(record)
    print_summary(log.finish(payload_bytes(bootstrap), costs["trainable_params"]))
    return 0


if __name__ == "__main__":
    main_guard(main)
