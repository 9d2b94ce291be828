"""The command line: federated fine-tuning of a LLaMA that its owner keeps, by FedBiOT and others.

In order: RunConfig (every flag, with its help and default); plan (what a run costs, from
params.json alone); the run folder (config.json, log.csv, state.pt, lora.pt, summary.json);
Processes (the wire that torchrun needs); what is printed; main.

    python train.py --task gsm8k --dropout 0.2 --adapter 2
    python train.py --task gsm8k --dropout 0.2 --adapter 2 --ckpt llama-2-7b --data-dir data
"""
import argparse
import contextlib
import importlib.util
import json
import os
import resource
import secrets
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from tqdm import tqdm

import baselines
from data import CLIENTS, MAX_LEN, make_public, make_shards, read_gsm8k
from eval import (BUNDLED_CKPT, BUNDLED_DATA, BUNDLED_SMALL, TASKS, Parser, evaluate, gsm8k_shots,
                  main_guard, pick_device, pick_dtype)
from fedbiot import Config, Payload, Wire, federate, misfit, option, payload_bytes
from extras.peft import start_from
from model import ModelConfig, UserError, load, load_tokenizer, read_saved
from tasks.sandbox import make_box

# What a real model is run with, and what the bundled one is (tiny/README.md says how it was found).
PAPER = {"rounds": 500, "local_steps": 30, "lr": 1e-4, "server_lr": 1e-4, "shots": 8, "samples": 20}
BUNDLED = {"rounds": 5, "lr": 3e-3, "server_lr": 2e-3, "max_len": 256, "shots": 0, "samples": 1}
PRESETS = {"paper": {}, "official-code": {"align_tokens": "all", "prox": 0.0, "align_renew": True,
                                          "uniform_weights": True}}

# Flags that a method has no use for: what alignment before the first round leaves idle, and so on.
ONCE = {"prox", "align_steps", "align_renew"}
EMULATOR = ONCE | {"dropout", "adapter", "kl_weight", "align_init", "align_norm", "align_tokens"}
NO_LORA = EMULATOR | {"server_lr", "rank", "alpha", "init_lora"}
NO_USE = {"fedbiot": set(), "offsite": ONCE, "fedot": ONCE, "fedavg": EMULATOR | {"server_lr"},
          "fedpt": EMULATOR | {"init_lora"}, "fedkseed": NO_LORA, "fedkseed-pro": NO_LORA,
          "fedtt": NO_LORA, "fedtt+": NO_LORA}
OWN = {"kseed_": "fedkseed", "tt_": "fedtt", "proxy_": "fedpt"}         # whose flags these are


# ---- flags --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RunConfig(Config):
    """Config, and what a run is beside its algorithm. None: depends, see `resolve`."""
    rounds: int | None = option(None, "communication rounds (R); bundled model 5, else 500")
    local_steps: int | None = option(None, "steps of a client in a round (K); 30")
    lr: float | None = option(None, "clients' learning rate (eta); bundled model 3e-3, else 1e-4")
    server_lr: float | None = option(None, "that of the alignment; bundled model 2e-3, else 1e-4")
    task: str = option("gsm8k", "what the clients' data teaches", choices=TASKS)
    method: str = option("fedbiot", "federated method", choices=baselines.METHODS)
    ckpt: str | None = option(None, "model's folder, Meta's or Hugging Face's; default the bundled")
    data_dir: str | None = option(None, "folder of the data files; default the bundled data")
    preset: str = option("paper", "paper, or what its authors' code does", choices=tuple(PRESETS))
    clients: int | None = option(None, "clients; default the task's (gsm8k 3, rosetta 9, dolly 8)")
    max_len: int | None = option(None, "longest training sequence in tokens; default the task's")
    shots: int | None = option(None, "worked examples in its prompts; bundled model 0, else 8")
    samples: int | None = option(None, "rosetta: programs a problem; bundled model 1, else 20")
    run_code: bool = option(False, "rosetta: run the programs, sandboxed; else compare texts")
    eval_every: int = option(0, "rounds between evaluations (0: only at the end)")
    eval_limit: int = option(0, "first N test examples (0: all)")
    validate: int = option(0, "hold out the last N training rows and score those (gsm8k)")
    strip_annotations: bool = option(False, "take GSM8K's <<48/2=24>> out of the training answers")
    eval_batch: int = option(64, "sequences generated at a time")
    device: str = option("auto", "cpu, cuda, cuda:1, …; auto: a GPU where there is one")
    dtype: str = option("auto", "of the frozen weights; auto: bf16 on CUDA, else fp32",
                        choices=("auto", "fp32", "bf16", "fp16"))
    threads: int = option(0, "CPU threads of every process (0: the host's cores / its processes)")
    out: str | None = option(None, "run folder; default runs/<task>-<method>-…")
    init_lora: str | None = option(None, "LoRA to start from: PEFT's folder, a run's, or a lora.pt")
    tensorboard: bool = option(False, "the log for TensorBoard too, in <run folder>/tensorboard")
    kseed_candidates: int = option(4096, "FedKSeed: candidate seeds (K); for Pro 1024")
    kseed_eps: float = option(5e-4, "FedKSeed: step of the two-point gradient (epsilon)")
    tt_rank: int = option(5, "FedTT: rank of the tensor trains")
    tt_bottleneck: int = option(64, "FedTT: width inside an adapter")
    tt_bias: bool = option(False, "FedTT: biases in the adapters")
    proxy_ckpt: str | None = option(None, "FedPT: the small model's folder; default the bundled")
    proxy_alpha: float = option(1.0, "FedPT: weight of the small model's change (alpha)")
    proxy_steps: int = option(10, "FedPT: distillation steps after a round")


def share(text: str) -> Fraction:
    """What was typed, exactly: 0.2 is 1/5."""
    try:
        float(value := Fraction(text))
    except ArithmeticError:
        raise ValueError(text) from None                    # argparse makes one line of it
    return value


def make_parser() -> Parser:
    """One flag a field of RunConfig; a flag that was not given is absent, so presets can tell."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(RunConfig):
        text = f.metadata["help"] + ("" if f.default is None else f" (default {f.default})")
        kind = next(k for k in (bool, int, float, str, Fraction) if k.__name__ in str(f.type))
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": share if kind is Fraction else kind, "choices": f.metadata.get("choices"),
            "metavar": None if "choices" in f.metadata else f.name.upper()}
        parser.add_argument(flag(f.name), help=text.replace("%", "%%"), **how)
    for name, text in (("--resume", "go on from the last finished round of --out"),
                       ("--plan", "print layers and costs, and exit"),
                       ("--json", "--plan as one JSON object")):
        parser.add_argument(name, action="store_true", default=False, help=text)
    return parser


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(given: dict) -> RunConfig:
    """The whole configuration from the flags given: preset, then what the checkpoint suggests."""
    bundled = given.get("ckpt") is None
    task, method = given.get("task", "gsm8k"), given.get("method", "fedbiot")
    values = {"max_len": MAX_LEN[task], "clients": 1 if method == "offsite" else CLIENTS[task]}
    values |= PAPER | (BUNDLED if bundled else {})
    if method.startswith("fedkseed"):
        values |= {"local_steps": 200, "lr": 1e-3 if bundled else 3e-7,
                   "kseed_candidates": 1024 if method == "fedkseed-pro" else 4096}
    if method == "fedpt":
        values["proxy_ckpt"] = str(BUNDLED_SMALL)
    values |= PRESETS[given.get("preset", "paper")] | given
    values["ckpt"] = str(given.get("ckpt") or BUNDLED_CKPT)
    values["data_dir"] = str(given.get("data_dir") or BUNDLED_DATA)
    cores = len(os.sched_getaffinity(0))
    values["threads"] = values.get("threads") or max(cores // local_processes(), 1)
    cfg = RunConfig(**values)
    check(cfg)
    idle = [flag(f) for f in given if f in NO_USE[method]
            or any(f.startswith(own) and not method.startswith(its) for own, its in OWN.items())]
    if idle:
        print(f"note: {method} has no use for {', '.join(idle)}", file=sys.stderr)
    return cfg


def local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


AT_LEAST_ONE = {"rounds", "local_steps", "batch_size", "rank", "clients", "threads", "eval_batch",
                "samples", "kseed_candidates", "tt_rank", "tt_bottleneck"}


def check(cfg: RunConfig):
    """Ranges, before anything is read; --adapter's and --dropout's wait for the model's layers."""
    for name, value in vars(cfg).items():
        least = 2 if name == "max_len" else int(name in AT_LEAST_ONE)
        if isinstance(value, int) and value < least and name != "adapter":
            raise UserError(f"{flag(name)} {value}: expected {least} or more")
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise UserError(f"{flag(name)} {value}: expected a finite number, 0 or more")
    if not cfg.kseed_eps:
        raise UserError("--kseed-eps 0: expected a finite number above 0, for example 5e-4")
    if cfg.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard: not installed; pip install tensorboard, or leave it: "
                        "log.csv has the same numbers")
    if cfg.clients_per_round > cfg.clients:
        raise UserError(f"--clients-per-round {cfg.clients_per_round}: there are {cfg.clients}")
    if cfg.task == "gsm8k":
        gsm8k_shots(cfg.shots)                              # refused now, not after the last round
    if cfg.task == "rosetta" and cfg.run_code:
        make_box()                                          # likewise
    if cfg.validate and cfg.task != "gsm8k":
        raise UserError(f"--validate {cfg.validate}: only gsm8k trains and tests on rows of "
                        f"one kind; leave it out")
    if cfg.method == "offsite" and cfg.clients != 1:
        raise UserError(f"--method offsite --clients {cfg.clients}: Offsite-Tuning has one client; "
                        f"fedot has several")


# ---- plan ---------------------------------------------------------------------------------------

def plan(c: ModelConfig, cfg) -> dict:
    """Table 5 by its closed forms: layers, trainable parameters, MB a client a round (down + up),
    GMAC a token.

    GMAC: (L + L_bp - 1) P, with P = a layer's matrices and what is tuned in it, L = layers at the
    client, L_bp = layers that the backward pass crosses. Norms, head, attention scores not counted.
    """
    n, method, module = c.n_layers, cfg.method, baselines.module_of(cfg.method)
    if method == "fedpt":                                               # FedAvg, on the small model
        costs = plan(ModelConfig.read(cfg.proxy_ckpt), replace(cfg, method="fedavg"))
        return costs | {"kept_layers": [], "adapter_layers": [], "dropped_layers": list(range(n))}
    emulator, adapter = [], list(range(n))
    if method in ("fedbiot", "offsite", "fedot"):
        emulator, adapter = module.Server.split(n, cfg)
    held, tuned = len(emulator + adapter), len(adapter)
    matrices, lora = layer_sizes(c, cfg.rank)
    layer, trained, sent, crossed = matrices + lora, lora * tuned, 8 * lora * tuned, 2 * held - 1
    if method == "fedbiot":                         # E's LoRA comes down too; backward ends above E
        sent, crossed = 4 * lora * (held + tuned), held + tuned - 1
    elif method.startswith("fedkseed"):                                 # two forwards, no backward
        layer, trained, crossed = matrices, whole_size(c), 2 * n
        vectors = 2 if method == "fedkseed-pro" else 1                  # a, and Pro's p
        sent = 4 + 4 * cfg.kseed_candidates * vectors + 8 * cfg.local_steps
    elif method.startswith("fedtt"):             # FedTT+: mean of a cycle, where none is absent
        cores, biases = module.sizes(c.dim, cfg)
        layer, trained = matrices + cores + biases, n * (cores + biases)
        some_absent = cfg.clients_per_round or cfg.client_timeout
        cycle = module.J if method == "fedtt+" and not some_absent else 1
        sent = 8 * n * (cores / cycle + biases)
    dropped = sorted(set(range(n)) - set(emulator + adapter))
    return {"kept_layers": emulator, "adapter_layers": adapter, "dropped_layers": dropped,
            "trainable_params": trained, "comm_mb_per_round": sent / 1e6,
            "gmac_per_token": crossed * layer / 1e9}


def layer_sizes(c: ModelConfig, rank: int) -> tuple[int, int]:
    """Parameters of a layer's matrices, and of its LoRA on wq and wv."""
    kv = c.n_kv_heads * c.head_dim
    return 2 * c.dim * (c.dim + kv) + 3 * c.dim * c.hidden_dim, rank * (3 * c.dim + kv)


def whole_size(c: ModelConfig) -> int:
    """Parameters of the model. Where the tokenizer has the vocabulary, it is LLaMA's: 32,000."""
    embeddings = c.dim * (32000 if c.vocab_size == -1 else c.vocab_size)
    layers = c.n_layers * (layer_sizes(c, 0)[0] + 2 * c.dim)
    return layers + c.dim + embeddings * (1 if c.tied else 2)


def print_plan(p: dict, c: ModelConfig, cfg):
    def layers(name):
        return f"{len(p[name]):3d}   " + " ".join(map(str, p[name]))
    traffic = megabytes(p["comm_mb_per_round"] * 1e6)
    for name, text in {
            "method": f"{cfg.method}, {cfg.task}, {cfg.clients} clients, {cfg.rounds} rounds",
            "model": f"{c.n_layers} layers x {c.dim}, {cfg.ckpt}",
            "kept (emulator)": layers("kept_layers"), "dropped": layers("dropped_layers"),
            "adapter": layers("adapter_layers"),
            "trainable": f"{p['trainable_params']:,} parameters",
            "communication": f"{traffic} a client a round, down + up",
            "compute": f"{p['gmac_per_token']:.4g} GMAC a token at a client"}.items():
        print(f"{name:16}  {text}")


# ---- run folder ---------------------------------------------------------------------------------

COLUMNS = ("round", "client_loss", "align_l2", "align_kl", "bytes_down", "bytes_up", "seconds")


def write(path: Path, fill):
    """`fill(file)` into a temporary name, synced, renamed: the old stays until the new is whole."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)          # the name must outlive a power cut too
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:                # RuntimeError: torch.save, disk full
        raise UserError(f"{path}: cannot be written ({error}); "
                        f"what was there before is unchanged") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_json(path: Path, content: dict):
    write(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def write_log(folder: Path, rows: list[dict]):
    columns = list(dict.fromkeys([*COLUMNS, *(k for row in rows for k in row)]))
    table = [columns] + [[str(row.get(c, "")) for c in columns] for row in rows]
    text = "".join(",".join(line) + "\n" for line in table)
    write(folder / "log.csv", lambda file: file.write(text.encode()))


def as_json(cfg: RunConfig) -> dict:
    return {k: str(v) if isinstance(v, Fraction) else v for k, v in asdict(cfg).items()}


def run_folder(cfg: RunConfig, resume: bool, restarted: bool) -> Path:
    """Where the run goes. An explicit --out that exists needs --resume; a default name takes -2, -3
    …, and the last is resumed. What torchrun restarts goes on, but not with a finished run."""
    if cfg.out:
        folder = Path(cfg.out)
        if folder.exists() and not (resume or restarted):
            raise UserError(f"--out {folder}: exists already; add --resume to go on with it, "
                            f"or choose another name")
        return folder
    name = f"{cfg.task}-{cfg.method}-b{float(cfg.dropout):g}-s{cfg.adapter}-seed{cfg.seed}"
    last, folder, number = None, Path("runs") / name, 1
    while folder.exists():
        number += 1
        last, folder = folder, Path("runs") / f"{name}-{number}"
    go_on = last and (resume or restarted and not (last / "summary.json").exists())
    return last if go_on else folder


@contextlib.contextmanager
def reading_state(folder: Path):
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file, and what it holds, raise nearly anything
        raise UserError(f"{folder / 'state.pt'}: not a state that can be resumed "
                        f"({str(error)[:100]}); move it away to start anew") from None


def load_state(folder: Path, cfg: RunConfig) -> dict | None:
    """What the last finished round left, or None. A state of another configuration is refused."""
    path = folder / "state.pt"
    if not path.is_file():
        return None
    with reading_state(folder):
        state = read_saved(path)
        then, now = state["config"] | {}, as_json(cfg)
        if [row["round"] for row in state["rows"]] != list(range(1, len(state["rows"]) + 1)):
            raise ValueError("its rounds are not 1, 2, …")
    if name := difference(then, now, FREE | {"client_timeout"}):
        raise UserError(f"{path}: was made with {flag(name)} {then.get(name)}, now it is "
                        f"{now[name]}; resume with the same flags, or choose another --out")
    return state


FREE = {"out", "device", "tensorboard"}


def difference(then: dict, now: dict, free: set[str]) -> str | None:
    """The first flag in which two configurations differ, but for those that are free to."""
    return next((key for key in now if key not in free and then.get(key) != now[key]), None)


# ---- processes ----------------------------------------------------------------------------------
# Short JSON messages go through torch.distributed's key-value store, tensors through its process
# group, and only once the other side waits for them. So nobody hangs in a receive: a slow client
# can be left out of a round, and a rank that fails is heard by all who wait.

DTYPES = {str(d): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.int32,
                              torch.int64, torch.uint8, torch.bool)}


def described(header) -> Payload:
    """What a header claims, as tensors without memory; {} where it is no header."""
    try:
        return {str(name): torch.empty(shape, dtype=DTYPES[dtype], device="meta")
                for name, dtype, shape in header}
    except (ValueError, KeyError, TypeError, RuntimeError):
        return {}


def header_of(payload: Payload) -> list:
    return [[name, str(t.dtype), list(t.shape)] for name, t in payload.items()]


def meet(store, rank: int, world: int) -> str:
    """A word that this start's ranks share. torchrun may keep the store when it restarts them, so
    what the dead left there must not count: rank 0 answers each greeting, only the living reply."""
    word = mine = secrets.token_hex(8)
    if rank:
        store.set(f"hello {rank}", mine)
        word = store.get(f"welcome {mine}").decode()                    # waits
        store.set(f"here {word} {rank}", "")
    while rank == 0 and not store.check([f"here {word} {r}" for r in range(1, world)]):
        for r in range(1, world):
            store.set(f"welcome {store.get(f'hello {r}').decode()}", word)
        time.sleep(0.01)
    return word


@contextlib.contextmanager
def reaching(whom: str):
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{whom} cannot be reached: {str(error).splitlines()[0][:120]}") from None


class Processes:
    """The wire between processes: rank 0 is the server, the others serve the clients.

    Sums are in the order of the clients, so any number of ranks gives the same bits.
    """
    def __init__(self):
        with reaching("torchrun's other processes"):
            store, self.rank, self.world = next(dist.rendezvous("env://"))
            self.store = dist.PrefixStore(meet(store, self.rank, self.world), store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, None, timedelta(hours=24), self.world, self.rank,
                                    self.store)             # hours: a server may align for long
        self.busy = {}          # rank: (round, client, since), of orders that have no answer yet

    def post(self, rank: int, message, payload: Payload):
        """A message to a rank, and what tensors belong to it."""
        with reaching("torchrun's store"):
            self.store.set(f"{self.rank} to {rank}", json.dumps([message, header_of(payload)]))

    def look(self, rank: int):
        """A rank's message and header, once; None: not yet. Exits if the run has ended."""
        key = f"{rank} to {self.rank}"
        with reaching("torchrun's store"):
            if self.store.check(["end"]):
                sys.exit(int(self.store.get("end").split()[0]))
            if self.store.check([key]):
                message = self.store.get(key)
                self.store.delete_key(key)
                return json.loads(message)

    def wait(self) -> tuple:
        """The server's next order."""
        while (order := self.look(0)) is None:
            time.sleep(0.01)
        return order

    def send(self, rank: int, payload: Payload):
        """Every tensor as its bytes: gloo does not know all dtypes. Waits for the receiver."""
        with reaching(f"rank {rank}"):
            for t in payload.values():
                dist.send(t.detach().to(self.place).contiguous().view(-1).view(torch.uint8), rank)

    def receive(self, rank: int, like: Payload) -> Payload:
        payload = {name: torch.empty_like(t, device=self.place) for name, t in like.items()}
        with reaching(f"rank {rank}"):
            for t in payload.values():
                dist.recv(t.view(-1).view(torch.uint8), rank)
        return {name: t.to(self.device) for name, t in payload.items()}

    def travel(self, device, own_gpu: bool):
        """Tensors go from GPU to GPU if every rank has one of its own, else by way of the CPU."""
        self.device, self.place = device, device if own_gpu else torch.device("cpu")
        if own_gpu:
            torch.cuda.set_device(device)

    def start_clients(self, cfg: RunConfig, device, bootstrap: Payload):
        self.timeout = cfg.client_timeout or float("inf")
        own_gpu = device.type == "cuda" and torch.cuda.device_count() >= local_processes()
        self.travel(device, own_gpu)
        for rank in range(1, self.world):
            self.post(rank, [as_json(cfg), own_gpu], bootstrap)
            self.send(rank, bootstrap)
        return self

    def serve(self, cfg: RunConfig, device, shards):
        """A client rank's life: compares flags, builds itself from what it is sent, obeys."""
        ([flags, own_gpu], header), mine, upload = self.wait(), as_json(cfg), {}
        free = FREE | {"threads", "ckpt", "proxy_ckpt", "data_dir", "init_lora"}
        if name := difference(flags, mine, free):
            raise UserError(f"rank {self.rank}: was started with {flag(name)} {mine[name]}, rank 0 "
                            f"with {flags.get(name)}; give all hosts the same flags")
        self.travel(device, own_gpu)
        bootstrap = self.receive(0, described(header))
        client = baselines.module_of(cfg.method).Client(bootstrap, cfg, device)
        while True:
            order, header = self.wait()
            if order == "send":
                self.send(0, upload)
            else:
                t, m = order
                payload = self.receive(0, described(header))
                upload, metrics = client.update(t, payload, shards[m], m)
                self.post(0, metrics, upload)

    def round(self, t: int, payload: Payload, client, shards, chosen, expected) -> dict:
        """As Wire.round: a free rank takes the next client. Goes on without those that have been at
        work for longer than --client-timeout; what they offer in a later round is not asked for."""
        self.down, self.up, results, todo, waiting = [], [], {}, list(chosen), True
        bar = tqdm(total=len(chosen), desc=f"round {t + 1}", leave=False, disable=None)
        while waiting:
            for rank in range(1, self.world):
                if rank in self.busy and (answer := self.look(rank)) is not None:
                    began, m, _ = self.busy.pop(rank)
                    if began == t:
                        results[m] = self.collect(rank, answer, expected)
                        bar.update()
                if rank not in self.busy and todo:
                    self.busy[rank] = t, todo.pop(0), time.monotonic()
                    self.post(rank, self.busy[rank][:2], payload)
                    self.send(rank, payload)
                    self.down.append(payload_bytes(payload))
            now = time.monotonic()
            waiting = any(now - since < self.timeout for _, _, since in self.busy.values())
            time.sleep(0.01)
        bar.close()
        for m in sorted(set(chosen) - set(results)):
            print(f"round {t + 1}, client {m}: left out, no upload within --client-timeout "
                  f"{self.timeout:g} s", file=sys.stderr)
        return {m: results[m] for m in chosen if m in results}

    def collect(self, rank: int, answer, expected: Payload) -> tuple[Payload, dict]:
        """An upload, asked for if its header fits; else its header, which `accepted` rejects."""
        try:
            metrics, upload = {"loss": float(answer[0]["loss"])}, described(answer[1])
        except (TypeError, ValueError, LookupError):
            metrics, upload = {}, {}
        if not misfit(upload, expected):
            self.post(rank, "send", {})
            upload = self.receive(rank, upload)
            self.up.append(payload_bytes(upload))
        return upload, metrics

    def end(self, status: int) -> bool:
        """All ranks stop. True for the first to say so: its line is the one to print."""
        mine, first, until = f"{status} {self.rank}", True, time.monotonic() + 10
        try:
            first = self.store.compare_set("end", "", mine).decode() == mine
            others = [f"gone {r}" for r in range(1, self.world) if r != self.rank]
            waits = others if first or self.rank == 0 else []       # the store may be rank 0's
            while waits and time.monotonic() < until and not self.store.check(waits):
                time.sleep(0.01)
            self.store.set(f"gone {self.rank}", "")                 # a client's last word
        except RuntimeError:
            pass                                            # it is gone already
        return first


# ---- what is printed ----------------------------------------------------------------------------

def round_line(r: dict, rounds: int) -> str:
    parts = [f"round {r['round']:{len(str(rounds))}d}", f"client {r['client_loss']:.3f}"]
    if "distill_kl" in r:
        parts.append(f"distil kl {r['distill_kl']:.3f} drift {r['drift']:.2f}")
    if "align_l2" in r:
        parts.append(f"align l2 {r['align_l2']:.3f} kl {r['align_kl']:.3f}")
    parts.append(f"down {megabytes(r['bytes_down'])} up {megabytes(r['bytes_up'])}")
    parts.append(f"{r['seconds']:.0f} s")
    logged = COLUMNS + ("distill_kl", "drift")
    parts += [f"{name} {r[name]:.1%}" for name in r if name not in logged]
    return " | ".join(parts)


def megabytes(n: float) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e4 else f"{n:.0f} B"


def print_summary(summary: dict):
    print(f"\n{'model':10} {'accuracy':>9}   correct")
    for name, m in summary["metrics"].items():
        print(f"{name:10} {m['accuracy']:9.1%}   {m['correct']} of {m['total']}")
    print(f"\na client, a round: {megabytes(summary['bytes_down_per_client_round'])} down, "
          f"{megabytes(summary['bytes_up_per_client_round'])} up; "
          f"once: {megabytes(summary['bootstrap_bytes'])}; "
          f"{summary['trainable_params']:,} trainable parameters; {summary['seconds']:.0f} s")


# ---- main ---------------------------------------------------------------------------------------

class Run:
    """A run folder and what has been learnt so far: logs, saves and evaluates, round by round."""

    def __init__(self, folder: Path, cfg: RunConfig, server, tokenizer, state: dict | None):
        self.folder, self.cfg, self.server, self.tokenizer = folder, cfg, server, tokenizer
        self.state = state or {"config": as_json(cfg), "rows": [], "seconds": 0.0, "metrics": {}}
        self.rows = self.state["rows"]
        self.start = time.perf_counter() - self.state["seconds"]
        write_json(folder / "config.json", as_json(cfg))
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(folder / "tensorboard", purge_step=len(self.rows) + 1)
        if self.rows:
            self.evaluate_if_due()
            write_log(folder, self.rows)

    def save(self):
        """state.pt is in place before the round's row is in the log."""
        seconds = time.perf_counter() - self.start
        self.state |= {"server": self.server.state_dict(), "seconds": seconds}
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
        print(round_line(record, self.cfg.rounds), flush=True)

    def evaluate_if_due(self):
        """The last row's accuracies; the base model never changes and is scored once."""
        row, cfg, metrics = self.rows[-1], self.cfg, self.state["metrics"]
        last = row["round"] == cfg.rounds
        if "base" in row or not (last or cfg.eval_every and row["round"] % cfg.eval_every == 0):
            return
        opts = argparse.Namespace(**vars(cfg) | {
            "limit": cfg.eval_limit, "batch_size": cfg.eval_batch, "max_new_tokens": 0,
            "temperature": None, "top_k": 40, "top_p": 0.75, "k": 0, "unsafe_no_sandbox": False,
            "save_predictions": None})
        for name, lm in self.server.models().items():
            if name != "base" or "base" not in metrics:
                metrics[name] = evaluate(lm, self.tokenizer, cfg.task, opts, f"evaluate {name}")
            row[name] = metrics[name]["accuracy"]
        self.save()

    def finish(self, bootstrap_bytes: int, trainable: int) -> dict:
        """lora.pt and summary.json: what other tools read."""
        learnt, cfg = self.server.state_dict()["learnt"], self.cfg
        write(self.folder / "lora.pt", lambda file: torch.save(learnt, file))
        summary = {"task": cfg.task, "method": cfg.method, "seed": cfg.seed, "rounds": cfg.rounds,
                   "metrics": self.state["metrics"],
                   "bytes_down_per_client_round": fmean(row["bytes_down"] for row in self.rows),
                   "bytes_up_per_client_round": fmean(row["bytes_up"] for row in self.rows),
                   "bootstrap_bytes": bootstrap_bytes, "trainable_params": trainable,
                   "peak_memory_bytes": peak_memory(), "seconds": self.state["seconds"]}
        write_json(self.folder / "summary.json", summary)
        return summary


def peak_memory() -> int:
    """Of this process: on a GPU what PyTorch allocated there, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv=None) -> int:
    """One process, or one rank of torchrun's: an error of any of them ends all, in one line."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return run(argv)
    processes = Processes()
    try:
        with contextlib.ExitStack() as quiet:
            if processes.rank:                              # rank 0 prints, and whoever fails first
                nowhere = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            status = run(argv, processes)
    except BaseException as error:
        status = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)         # 1: a bug
        status = error.code if isinstance(error, SystemExit) else status
        if processes.end(status) or status == 1:
            raise
        sys.exit(status)                                    # another rank has said why
    processes.end(status)
    return status


def run(argv=None, processes: Processes | None = None) -> int:
    args = vars(make_parser().parse_args(argv))
    resume, only_plan, as_json_object = args.pop("resume"), args.pop("plan"), args.pop("json")
    cfg = resolve(args)
    torch.set_num_threads(cfg.threads)
    model_config, method = ModelConfig.read(cfg.ckpt), baselines.module_of(cfg.method)
    costs = plan(model_config, cfg)
    if only_plan:
        print(json.dumps(costs)) if as_json_object else print_plan(costs, model_config, cfg)
        return 0
    if not (processes and processes.rank):                  # of rank 0 alone: its run folder
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        folder = run_folder(cfg, resume, restarted)
        if (resume or restarted) and (folder / "summary.json").is_file():
            print(f"{folder}: this run is finished", file=sys.stderr)
            return 0
        state = load_state(folder, cfg)
    device = pick_device(cfg.device)
    if device.type == "cuda" and device.index is None:  # each process of a host takes the next GPU
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    tokenizer = load_tokenizer(cfg.ckpt, model_config)
    if cfg.method == "fedpt" and not (processes and processes.rank):
        small = load_tokenizer(cfg.proxy_ckpt, ModelConfig.read(cfg.proxy_ckpt))
        if small.vocabulary() != tokenizer.vocabulary():
            raise UserError(f"--proxy-ckpt {cfg.proxy_ckpt}: has other pieces than {cfg.ckpt}; "
                            f"logits can only be added over the same pieces")
    shards = make_shards(cfg.task, cfg.data_dir, tokenizer, cfg.clients, cfg.max_len, cfg.seed,
                         cfg.validate, cfg.strip_annotations)
    if processes and processes.rank:
        processes.serve(cfg, device, shards)                # until the run ends
    if cfg.task == "gsm8k":
        read_gsm8k(cfg.data_dir, "test")                    # a bad file is refused before training
    full, _ = load(cfg.ckpt, dtype=pick_dtype(cfg.dtype, device), device=device)
    print_plan(costs, model_config, cfg)
    print(f"{'run':16}  {folder}\n", flush=True)
    server = method.Server(full, make_public(cfg.data_dir, tokenizer, cfg.max_len), cfg)
    if state:
        with reading_state(folder):
            server.load_state_dict(state["server"])
    elif cfg.init_lora and "init_lora" not in NO_USE[cfg.method]:
        start_from(Path(cfg.init_lora), server, model_config, cfg.alpha / cfg.rank)
    bootstrap = server.bootstrap()
    if processes:
        client, wire = None, processes.start_clients(cfg, device, bootstrap)
    else:
        client, wire = method.Client(bootstrap, cfg, device), Wire()
    log = Run(folder, cfg, server, tokenizer, state)
    for record in federate(server, client, shards, cfg, wire, first_round=len(log.rows)):
        log.finish_round(record)
    print_summary(log.finish(payload_bytes(bootstrap), costs["trainable_params"]))
    return 0


if __name__ == "__main__":
    main_guard(main)
