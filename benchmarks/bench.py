"""Time and peak memory of this project beside the naive form and the peers.

    python benchmarks/bench.py losses     the fused losses, the products alone, the proximal term
    python benchmarks/bench.py client     a client's local step; naive: LoRA trained in every layer
    python benchmarks/bench.py server     an alignment step; naive: a copy of the model a role
    python benchmarks/bench.py shares     what of both steps the matrix products and attention are
    python benchmarks/bench.py load       a client's layers of a two-shard checkpoint
    python benchmarks/bench.py generate   greedy decoding of GSM8K, the same tokens
    python benchmarks/bench.py growth     over depth, vocabulary, length, clients, rounds, uploads

Sides alternate in one process after their results were compared: minimum and median of --rounds of
CPU time (CUDA: wall time). Memory: growth of the peak in a fresh process a side. The peers are in
peers.py; an absent one says so.
"""
import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fedbiot  # noqa: E402
import peers  # noqa: E402
from data import Example, Shard, collate, prompt_of  # noqa: E402
from eval import read_pairs  # noqa: E402
from fedbiot import Client, Config, Server, generator, layer_extract, weights_of  # noqa: E402
from measuring import distance, fresh, peak_growth, status, table, timed  # noqa: E402
from model import LM, ModelConfig, generate, load, load_weights  # noqa: E402
from tasks.gsm8k import worked_examples  # noqa: E402

SHAPES = {"tiny": ModelConfig(128, 12, 4, 2, 1024, 352),            # like the bundled model
          "small": ModelConfig(512, 32, 4, 4, 4000, 1376),          # LLaMA-2-7B at an eighth
          "head": ModelConfig(512, 16, 8, 8, 32000, 1376),          # LLaMA's vocabulary, few layers
          "7b-8": ModelConfig(4096, 8, 32, 32, 32000, 11008),       # 8 layers of
          "7b": ModelConfig(4096, 32, 32, 32, 32000, 11008)}        # LLaMA-2-7B
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Case(NamedTuple):
    """`sides` by name; each makes its inputs and returns a step, which returns what must agree."""
    name: str
    sides: dict[str, Callable]
    tolerance: float
    units: Callable = lambda side: 1            # what a step processes, for a time per unit
    memory: bool = True


# ---- measuring ----------------------------------------------------------------------------------

def memory_of(args, number: int, side: str) -> float:
    return peak_growth(list(CASES[args.what](args))[number].sides[side](), args.device)


def absent(error: Exception) -> str:
    return "absent: " + (repr(error).splitlines() or ["?"])[0][:90]


def ready(case: Case, rows: dict) -> dict[str, Callable]:
    """The sides' steps, warm and compared with ours; one that cannot run is a row that says so."""
    steps, values = {}, {}
    for side, build in case.sides.items():
        rows[side] = {"case": case.name, "side": side}
        try:
            step = build()
            values[side] = step()
        except Exception as error:
            if side == "ours":
                raise
            rows[side]["note"] = absent(error)
            continue
        steps[side] = step
        off = 0.0 if values[side] is None else distance(values[side], values["ours"])
        assert off <= case.tolerance, f"{case.name}: {side} is {off:.2g} from ours"
    return steps


def sides(make, names, *given) -> dict[str, Callable]:
    return {side: lambda side=side: make(side, *given) for side in names}


def measure(case: Case, number: int, args) -> list[dict]:
    """A row a side: ms (min, median), extra memory, and the ratios of ours to it."""
    rows = {}
    steps = ready(case, rows)
    ms = {side: [] for side in steps}
    for _ in range(args.rounds):
        for side, step in steps.items():
            ms[side].append(timed(step, args.device))
    for side in steps:
        per = case.units(side)
        rows[side] |= {"ms": min(ms[side]) / per, "median_ms": statistics.median(ms[side]) / per,
                       "ours/it": min(ms["ours"]) / min(ms[side])}
    del step
    steps.clear()                               # their memory is the fresh processes' now
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    for side in ms if case.memory else ():
        if side != "products":
            try:
                rows[side]["mb"] = fresh(memory_of, args, number, side)
            except Exception as error:          # out of memory, for one
                rows[side]["note"] = "memory " + absent(error)
                continue
            if "mb" in rows["ours"]:
                rows[side]["ours/it mb"] = rows["ours"]["mb"] / max(rows[side]["mb"], 1e-9)
    return list(rows.values())


# ---- losses -------------------------------------------------------------------------------------

OURS = {"ce": fedbiot.linear_cross_entropy, "kl": fedbiot.linear_kl}


def loss_inputs(kind, N, D, V, dtype, device, apart=0.1):
    g = generator(1)
    h, other = (torch.randn(N, D, generator=g) for _ in range(2))
    W, w = torch.randn(V, D, generator=g) * D**-0.5, torch.full((N,), 1 / N, device=device)
    h, h_t, W = (t.to(device, dtype) for t in (h, h + apart * other, W))
    y = torch.randint(V, (N,), generator=g).to(device)
    return (h, W, y, w) if kind == "ce" else (h, h_t, W, w)


def loss_side(side, kind, *shape):
    h, *rest = loss_inputs(kind, *shape)
    if side == "products":
        return products(h, rest[kind == "kl"], 1 + (kind == "kl"))
    loss = OURS[kind] if side == "ours" else peers.loss_of(side, kind)

    def step():
        x = h.detach().requires_grad_()
        loss(x, *rest).backward()
        return x.grad
    return step


def products(h, W, forward: int):
    """Nothing but the loss's matrix products, chunk by chunk."""
    parts = fedbiot.chunks(h, W)
    p = torch.randn(parts[0].stop, len(W), device=h.device).to(h.dtype)

    def step():
        for rows in parts:
            for _ in range(forward):
                z = h[rows] @ W.T
            p[:len(z)] @ W
    return step


def proximal_side(side, D, device):
    """The term and its gradient for q and v of two layers, rank 8."""
    g, pairs = generator(1), []
    for _ in range(4):
        B0, A0 = (torch.randn(*size, generator=g).to(device) for size in ((D, 8), (8, D)))
        pairs.append(((1.1 * B0).requires_grad_(), (0.9 * A0).requires_grad_(), B0, A0))
    loss = fedbiot.proximal if side == "ours" else peers.dense_proximal

    def step():
        inputs = [t for pair in pairs for t in pair[:2]]
        return torch.cat([t.flatten() for t in torch.autograd.grad(loss(pairs, 2.0), inputs)])
    return step


def losses(args):
    for kind in OURS:
        for D in args.dims:
            shape = (args.tokens, D, 32000, DTYPES[args.dtype], args.device)
            yield Case(f"{kind} {args.dtype} N={args.tokens} D={D}",
                       sides(loss_side, ("ours", *args.peer, "products"), kind, *shape),
                       0.5 if args.dtype == "bf16" else 1e-3)
    yield Case("proximal D=4096", sides(proximal_side, ("ours", "naive"), 4096, args.device), 1e-3)


def gradient_errors() -> list[dict]:
    """Gradients against float64, relative; the KL at several disagreements."""
    rows = []
    for kind, apart in (("ce", 0), ("kl", 1.0), ("kl", 0.1), ("kl", 0.025), ("kl", 0.0045)):
        for name, dtype in DTYPES.items():
            inputs, grads = loss_inputs(kind, 128, 512, 32000, dtype, "cpu", apart), {}
            for side in ("true", "naive", "ours"):
                x, *rest = [t.double() if side == "true" and t.is_floating_point() else t.clone()
                            for t in inputs]
                value = (OURS if side == "ours" else peers.NAIVE)[kind](x.requires_grad_(), *rest)
                value.backward()
                grads[side] = x.grad
            rows.append({"case": f"{kind} {name}", "value": value.item(),
                         "ours": distance(grads["ours"], grads["true"]),
                         "naive": distance(grads["naive"], grads["true"])})
    return rows


# ---- client and server --------------------------------------------------------------------------

def random_lm(config: ModelConfig, layers, args) -> LM:
    """Random weights that keep activations near one, drawn on the device."""
    with torch.device("meta"):
        lm = LM.empty(config, layers)
    lm = lm.to(DTYPES[args.dtype]).to_empty(device=args.device).requires_grad_(False)
    g = torch.Generator(args.device).manual_seed(0)
    for name, p in lm.named_parameters():
        p.fill_(1) if name.endswith("norm.weight") else p.normal_(0, p.shape[-1]**-0.5, generator=g)
    return lm


class Given:
    """A shard whose batches are already there."""
    def __init__(self, batches):
        self.given = batches

    def batches(self, *_):
        return iter(self.given)


def batches_of(args, bucketed=True):
    """Random ids with GSM8K's spread of lengths, 4 in 10 tokens the answer's; by length or not."""
    n, g = 10 * args.batch_size, generator(3)
    lengths = (5.2 + 0.35 * torch.randn(n, generator=g)).exp().clamp(60, 512).int().tolist()
    vocab = SHAPES[args.shape].vocab_size
    examples = [Example(torch.randint(3, vocab, (T,), generator=g).tolist(), int(0.6 * T))
                for T in lengths]
    made = (Shard(examples, list(range(n))).batches(10, args.batch_size, (0, 0, 0)) if bucketed
            else (collate(examples[i::10]) for i in range(10)))
    return list(made)[:args.steps]


def useful_tokens(args, bucketed=True) -> int:
    return sum(int((b.tokens != 0).sum()) for b in batches_of(args, bucketed))   # no id is 0


def client_parts(args, bucketed):
    cfg = Config(local_steps=args.steps, batch_size=args.batch_size)
    emulator, adapter = layer_extract(SHAPES[args.shape].n_layers, cfg.adapter, cfg.dropout)
    lm = random_lm(SHAPES[args.shape], emulator + adapter, args)
    return cfg, lm, [b.to(args.device) for b in batches_of(args, bucketed)]


def client_side(side, args, bucketed):
    cfg, lm, batches = client_parts(args, bucketed)
    if side != "ours":
        make = {"naive": peers.lora_everywhere, "transformers": peers.transformers_client}[side]
        return make(cfg, lm, batches)
    one = Client(weights_of(lm), cfg, args.device)
    sent = {name: p.detach().clone() for name, p in one.received.items()}
    return lambda: torch.tensor(one.update(0, sent, Given(batches), 0)[1]["loss"])


def client(args):
    """Batches sorted by length, then batches at random: their ms a useful token compare."""
    for bucketed in (True, False):
        name = f"client {args.shape} {args.dtype} B={args.batch_size}" + ", random" * (not bucketed)
        yield Case(name, sides(client_side, ("ours", *args.peer), args, bucketed),
                   0.05 if args.dtype == "bf16" else 5e-3,
                   lambda side, bucketed=bucketed: useful_tokens(args, bucketed))


def make_server(args):
    cfg = Config(batch_size=args.batch_size, align_steps=args.steps)
    batches = Given([b.to(args.device) for b in batches_of(args)])
    return Server(random_lm(SHAPES[args.shape], None, args), batches, cfg)


def server_side(side, args):
    one = make_server(args)
    if side == "transformers":
        return peers.transformers_server(one, one.public.given)
    if side == "naive":
        peers.copy_for_each_role(one)
    start = {name: p.detach().clone() for name, p in one.emulated.items()}

    def steps():
        fedbiot.copy_into(one.emulated, start)
        one.optimizer.state.clear()
        one.align(1, args.steps)
        return torch.tensor(sum(one.measured.values()))
    return steps


def server(args):
    yield Case(f"server {args.shape} {args.dtype} B={args.batch_size}",
               sides(server_side, ("ours", *args.peer), args), 0.05,
               lambda side: useful_tokens(args))


def server_held(args) -> dict:
    """What a server keeps beside what the checkpoint holds."""
    peak_growth(lambda: None, args.device)                              # libraries start here
    before = status("RssAnon")
    one = make_server(args)
    held, kept = status("RssAnon") - before, sum(p.nbytes for p in one.full.parameters())
    return {"case": f"server {args.shape}, built", "mb": held / 2**20,
            "kept_mb": kept / 2**20, "mb/kept": held / kept}


# ---- what the products are ----------------------------------------------------------------------

class Operand(NamedTuple):
    """A tensor as an operator was given it. What still lives after the step is a weight, and a
    replay reads it where it is; else numbers of its shape, one tensor for all operands like it."""
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    storage: weakref.ref

    @classmethod
    def of(cls, t) -> "Operand":
        return cls(t.shape, t.stride(), t.storage_offset(), t.dtype, t.device,
                   weakref.ref(t.untyped_storage()))

    def tensor(self, pool: dict) -> torch.Tensor:
        if (storage := self.storage()) is not None:
            t = torch.empty(0, dtype=self.dtype, device=self.device)
            return t.set_(storage, self.offset, self.shape, self.stride)
        if self[:5] not in pool:
            t = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
            pool[self[:5]] = t.normal_() if t.is_floating_point() else t.zero_()
        return pool[self[:5]]


class Operators(TorchDispatchMode):
    """Notes the operators of a step that `wanted` names, for a replay of nothing else."""

    def __init__(self, *wanted: str):
        super().__init__()
        self.wanted, self.notes = wanted, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if any(w == name or len(w) > 8 and w in name for w in self.wanted):
            given = [Operand.of(a) if torch.is_tensor(a) else a for a in args]
            self.notes.append((function, given, kwargs))
        return function(*args, **kwargs)

    def replay(self) -> Callable:
        pool = {}
        calls = [(function, [a.tensor(pool) if isinstance(a, Operand) else a for a in given], more)
                 for function, given, more in self.notes]

        def step():
            with torch.no_grad():
                for function, given, more in calls:
                    function(*given, **more)
        return step


PARTS = {"products": ("mm", "addmm", "bmm", "baddbmm"), "attention": ("scaled_dot_product",)}


def shares(args) -> list[dict]:
    """A step, and its products (with attention: its kernels) alone: the same shapes, replayed."""
    rows = []
    for name, step in (("client", client_side("ours", args, True)),
                       ("server", server_side("ours", args))):
        step()
        work, ms = {"step": step}, {}
        for part, operators in PARTS.items():
            with Operators(*operators) as found:
                step()
            work[part] = found.replay()
            work[part]()
        for _ in range(args.rounds):
            for part, call in work.items():
                ms.setdefault(part, []).append(timed(call, args.device))
        best = {part: min(times) for part, times in ms.items()}
        row = {"case": f"{name} {args.shape} {args.dtype} B={args.batch_size}",
               "step ms": best["step"] / args.steps}
        row |= {f"{part}, share": best[part] / best["step"] for part in PARTS}
        rows.append(row | {"rest": 1 - sum(best[part] for part in PARTS) / best["step"]})
    return rows


# ---- loading ------------------------------------------------------------------------------------

def write_shards(folder: Path, config: ModelConfig):
    """Meta's format in two model-parallel shards of random bf16, one shard in memory at a time."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LM.empty(config).state_dict().items()}
    block = torch.randn(2**20, generator=generator(0)).bfloat16()
    for shard in range(2):
        state = {}
        for name, shape in shapes.items():
            columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
            size = [n // 2 if len(shape) == 2 and axis == columns else n
                    for axis, n in enumerate(shape)]                    # a norm is whole in each
            n = math.prod(size)
            state[name] = block.repeat(-(-n // len(block)))[:n].clone().view(size)
        torch.save(state, folder / f"consolidated.{shard:02d}.pth")
        del state


def load_one(args, folder) -> dict:
    """Peak of RssAnon above what was there, read every millisecond by a thread."""
    config = SHAPES[args.shape]
    emulator, adapter = layer_extract(config.n_layers, 2, 0.5)
    peak, stop, before, start = [0], threading.Event(), status("RssAnon"), time.perf_counter()

    def watch():
        while not stop.wait(0.001):
            peak[0] = max(peak[0], status("RssAnon"))
    thread = threading.Thread(target=watch)
    thread.start()
    lm = load_weights(folder, config, emulator + adapter, DTYPES["bf16"])
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    grown, kept = max(peak[0], status("RssAnon")) - before, sum(p.nbytes for p in lm.parameters())
    return {"case": f"load {args.shape}, client at dropout 0.5", "mb": grown / 2**20,
            "kept_mb": kept / 2**20, "mb/kept": grown / kept, "wall_s": seconds}


def load_report(args) -> list[dict]:
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        write_shards(Path(folder), SHAPES[args.shape])
        return [fresh(load_one, args, folder)]


# ---- generation ---------------------------------------------------------------------------------

def flat(texts) -> torch.Tensor:
    return torch.tensor([i for text in texts for i in [*text, -1]])


def generate_side(side, batch, args):
    lm, tokenizer = load(args.ckpt, device=args.device)
    eos, n = tokenizer.eos, args.new_tokens
    pairs = read_pairs(args.data_dir, "test")[:args.prompts]
    texts = [prompt_of(question) for question, _ in pairs]
    if args.shots:
        texts = [f"{worked_examples(args.shots)}Q: {question}\nA:" for question, _ in pairs]
    prompts = [[tokenizer.bos] + tokenizer.encode(text) for text in texts]
    prompts.sort(key=len)
    if side == "ours":
        return lambda: flat(generate(lm, prompts, n, eos, batch))
    model = peers.hf_model(lm)
    return lambda: flat(peers.transformers_texts(model, prompts, n, eos, batch))


def generation(args):
    """The default batch first, the others' beside it."""
    made = {"ours": lambda: generate_side("ours", 64, args)}
    for side in ("ours", *args.peer):
        for batch in (16,) if side == "ours" else (16, 64):
            made[f"{side}, batch {batch}"] = lambda s=side, b=batch: generate_side(s, b, args)
    shots = f" of {args.shots} shots" * bool(args.shots)
    yield Case(f"generate {args.prompts} prompts{shots}, fp32", made, 0.0, memory=False)


# ---- growth -------------------------------------------------------------------------------------

GROWTH = {"depth": [4, 8, 16, 32], "vocabulary": [1000, 4000, 16000, 64000, 128000],
          "sequence": [128, 256, 512, 1024, 2048], "clients": [1, 10, 100, 1000],
          "a round": [1, 10, 30, 100], "rounds": [1, 3, 10, 30], "uploads": [1, 10, 100, 1000]}


class Echo:
    """In place of a Client: sends up what it got, without a step."""

    def __init__(self, client: Client):
        self.names = client.tuned.keys()

    def update(self, t, payload, examples, m):
        return {name: payload[name].clone() for name in self.names}, {"loss": 1.0}


def growth_point(args, axis: str, value: int) -> dict:
    """A client's step, the other sizes fixed. `clients`: a round of at most two of so many, a step
    each; `a round`: of all of them; `rounds`: so many of two; `uploads`: the server's side alone of
    a round of so many, each of as many bytes as LLaMA-2-7B's at --adapter 2."""
    usual = {"depth": 8, "vocabulary": 4000, "sequence": 256, "clients": 2, "rounds": 1}
    at = usual | {axis: value}
    at["clients"] = at.get("a round", at.get("uploads", at["clients"]))
    config = ModelConfig(128, at["depth"] + 2, 4, 4, at["vocabulary"], 352)
    all_of_them, aligned = axis in ("a round", "uploads"), int(axis != "uploads")
    cfg = Config(dropout=0.0, local_steps=1, batch_size=4, rounds=at["rounds"], align_init=aligned,
                 align_steps=aligned, rank=8 if aligned else 256,
                 clients_per_round=0 if all_of_them else min(2, at["clients"]))
    full, T, g = random_lm(config, None, args), at["sequence"] + 1, generator(4)
    rows = [Example(torch.randint(3, config.vocab_size, (T,), generator=g).tolist(), T - 64)
            for _ in range(4 * at["clients"])]
    shards = [Shard(rows, list(range(4 * m, 4 * m + 4))) for m in range(at["clients"])]
    one = Client(weights_of(full), cfg, args.device)
    sent = {name: p.detach().clone() for name, p in one.received.items()}
    federated = axis in ("clients", "a round", "rounds", "uploads")
    server = Server(full, shards[0], cfg) if federated else None
    one = one if aligned else Echo(one)

    def step():
        if server:
            return list(fedbiot.federate(server, one, shards, cfg, fedbiot.Wire()))
        return one.update(0, sent, shards[0], 0)
    mb = peak_growth(step, args.device)
    ms = [timed(step, args.device) for _ in range(args.rounds)]
    return {"axis": axis, "at": value, "ms": min(ms), "median_ms": statistics.median(ms), "mb": mb}


def growth_report(args) -> list[dict]:
    rows = []
    for axis, values in GROWTH.items():
        for n in values:
            rows.append(fresh(growth_point, args, axis, n))
            print(f"{axis} {n}: {rows[-1]['ms']:.0f} ms", file=sys.stderr)
    if args.picture:
        draw(rows, args.picture)
    return rows


def draw(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(GROWTH), figsize=(16, 3.2), constrained_layout=True)
    for ax, axis in zip(axes, GROWTH):
        points, other = [r for r in rows if r["axis"] == axis], ax.twinx()
        xs = [r["at"] for r in points]
        ax.plot(xs, [r["ms"] for r in points], "o-", color="tab:blue")
        other.plot(xs, [r["mb"] for r in points], "s--", color="tab:orange")
        whole = axis in ("clients", "a round", "uploads")
        ax.set(xscale="log", xlabel=axis, ylabel=f"ms a {'round' if whole else 'step'}")
        ax.set_xticks(xs, [f"{x // 1000}k" if x >= 4000 else str(x) for x in xs], fontsize=8)
        ax.minorticks_off()
        ax.set_ylim(0, 1.2 * max(r["ms"] for r in points))
        other.set_ylim(0, 1.2 * max(r["mb"] for r in points))
        other.set_ylabel("extra peak, MB (dashed)")
    figure.savefig(path, dpi=90)


# ---- command line -------------------------------------------------------------------------------

CASES = {"losses": losses, "client": client, "server": server, "generate": generation}
REPORTS = {"shares": shares, "load": load_report, "growth": growth_report}
PEERS = {"losses": ["naive"], "client": ["transformers", "naive"],
         "server": ["transformers", "naive"],
         "generate": ["transformers"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=[*CASES, *REPORTS])
    add("--peer", action="append", help="naive compile transformers torchtune liger native; repeat")
    add("--json", action="store_true")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="bf16", choices=DTYPES)
    add("--shape", default="small", choices=SHAPES)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--tokens", type=int, default=1024, help="losses: rows N")
    add("--dims", type=int, nargs="+", default=[512, 1024, 2048], help="losses: widths D")
    add("--batch-size", type=int, default=10)
    add("--steps", type=int, default=2, help="client, server: steps that are timed together")
    add("--prompts", type=int, default=200)
    add("--new-tokens", type=int, default=256)
    add("--shots", type=int, default=0, help="generate: worked examples in a prompt")
    add("--ckpt", default=str(ROOT / "tiny" / "llama"))
    add("--data-dir", default=str(ROOT / "tiny" / "data"))
    add("--scratch", help="load: where the checkpoint is made for a moment (7b: 13.5 GB)")
    add("--picture", help="growth: write the curves there")
    args = parser.parse_args()
    args.peer = args.peer or PEERS.get(args.what, [])
    torch.set_num_threads(args.threads)
    if args.what in REPORTS:
        rows = REPORTS[args.what](args)
    else:
        rows = [r for i, case in enumerate(CASES[args.what](args)) for r in measure(case, i, args)]
    tables = [rows, gradient_errors()] if args.what == "losses" else [rows]
    if args.what == "server":
        tables.append([fresh(server_held, args)])
    if args.json:
        print(json.dumps([row for rows in tables for row in rows]))
    else:
        for rows in tables:
            table(rows)
            print()


if __name__ == "__main__":
    main()
