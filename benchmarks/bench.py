"""Time and peak memory of this project beside the naive form and the peers. Needs no checkpoint but for `generate`.

    python benchmarks/bench.py losses   [--peer naive|compile|torchtune|liger|native]   the fused losses, and the products alone
    python benchmarks/bench.py client   [--peer transformers|naive]  a client's local step; naive: LoRA trained in every layer
    python benchmarks/bench.py server   [--peer naive]               an alignment step; naive: a copy of the model for each role
    python benchmarks/bench.py load     [--shape 7b --scratch DIR]   a client's layers of a two-shard checkpoint, RssAnon sampled
    python benchmarks/bench.py generate [--peer transformers] [--ckpt DIR]              greedy decoding, the same tokens
    python benchmarks/bench.py growth   [--picture growth.png]       a client's step over depth, vocabulary, length, clients

Sides alternate in one process, minimum and median of --rounds rounds of CPU time (of wall time on CUDA) after
their results were compared; memory is the growth of the peak in a fresh process a side. --device cuda takes
the same paths (--shape 7b: LLaMA-2-7B with random weights). An absent peer says so in its row.
"""
import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fedbiot  # noqa: E402
from data import Example, Shard, collate, prompt_of, read_gsm8k  # noqa: E402
from fedbiot import Client, Config, Server, generator, layer_extract, linear_cross_entropy, linear_kl, weights_of  # noqa: E402
from lora import add_lora, lora_tensors  # noqa: E402
from model import LM, ModelConfig, generate, load, load_weights, to_hf  # noqa: E402

SHAPES = {  # `small` has LLaMA-2-7B's proportions at an eighth of its width; tiny is like the bundled model
    "tiny": ModelConfig(128, 12, 4, 2, 1024, 352), "small": ModelConfig(512, 32, 4, 4, 4000, 1376),
    "7b": ModelConfig(4096, 32, 32, 32, 32000, 11008), "7b-8": ModelConfig(4096, 8, 32, 32, 32000, 11008)}  # 8 layers
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Case(NamedTuple):
    """`sides` by name; each makes its inputs and returns a step, which returns the values that must agree."""
    name: str
    sides: dict[str, Callable]
    tolerance: float = 1e-3
    units: Callable = lambda side: 1            # what a step of that side processes, for a time per unit
    memory: bool = True


# ---- measuring ----------------------------------------------------------------------------------

def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()                  # other processes may share the cores


def status(field: str) -> int:
    """Bytes, from Linux's /proc/self/status: VmRSS, VmHWM (its peak) or RssAnon (without mapped files)."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field + ":"))


def peak_growth(step, device: str) -> int:
    """Bytes by which the peak of one step exceeds what is there before it."""
    x = torch.randn(64, 64, device=device, requires_grad=True)          # libraries and threads start here
    for dtype in DTYPES.values():
        F.scaled_dot_product_attention(*[(x @ x).softmax(-1).to(dtype)[None, None]] * 3).sum().backward()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")                       # VmHWM starts again
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def fresh(call, *given):
    """call(*given) in a process of its own, forked from one that has imported torch and done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(call, *given).result()


def memory_of(args, number: int, side: str) -> dict:
    torch.set_num_threads(args.threads)
    case = list(CASES[args.what](args))[number]
    return {"mb": peak_growth(case.sides[side](), args.device) / 2**20}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["?"])[-1][:100]


def distance(a, b) -> float:
    a, b = (torch.as_tensor(t).flatten().double() for t in (a, b))
    return float((a - b).norm() / b.norm()) if a.shape == b.shape else float("inf")


def measure(case: Case, number: int, args) -> list[dict]:
    """A row a side: seconds (min, median) with the sides in turn, extra memory, and the ratio to ours."""
    steps, rows = {}, {}
    for side, build in case.sides.items():
        try:
            steps[side] = build()
            value = steps[side]()                                       # warms up, too
        except Exception as error:      # an absent peer, or one that cannot run here, is a row and no crash
            if side == "ours":
                raise
            rows[side] = {"case": case.name, "side": side, "note": f"absent: {last_line(repr(error))}"}
            steps.pop(side, None)
            continue
        rows[side] = {"case": case.name, "side": side}
        if side == "ours":
            reference = value
        elif value is not None and (off := distance(value, reference)) > case.tolerance:
            raise AssertionError(f"{case.name}: {side} and ours differ by {off:.2g}, expected <= {case.tolerance:.2g}")
    seconds = {side: [] for side in steps}
    for _ in range(args.rounds):
        for side, step in steps.items():
            start = clock(args.device)
            step()
            seconds[side].append(clock(args.device) - start)
    for side, row in rows.items():
        if side in seconds:
            per = case.units(side)
            row |= {"ms": 1e3 * min(seconds[side]) / per, "median_ms": 1e3 * statistics.median(seconds[side]) / per,
                    "ours/it": min(seconds["ours"]) / min(seconds[side])}
            if case.memory and side != "products":
                row |= fresh(memory_of, args, number, side)
    if "mb" in rows["ours"]:
        for row in rows.values():
            row |= {"ours/it mb": rows["ours"]["mb"] / row["mb"]} if row.get("mb") else {}
    return list(rows.values())


# ---- losses -------------------------------------------------------------------------------------

def wide(z):
    return z if z.dtype == torch.float64 else z.float()


def naive_ce(h, W, y, w):
    return (w * F.cross_entropy(wide(h @ W.T), y, reduction="none")).sum()


def naive_kl(h_s, h_t, W, w):
    s, t = wide(h_s @ W.T).log_softmax(-1), wide(h_t @ W.T).log_softmax(-1)
    return (w * (t.exp() * (t - s)).sum(-1)).sum()


def peer_loss(peer: str, kind: str):
    """The same function from another library; rows weigh the same there."""
    if peer == "naive":
        return naive_ce if kind == "ce" else naive_kl
    if peer == "compile":
        return torch.compile(naive_ce if kind == "ce" else naive_kl)
    if peer == "native" and kind == "ce":
        return lambda h, W, y, w: F.linear_cross_entropy(h, W, y)
    if peer == "torchtune":
        from torchtune.modules import loss
        if kind == "ce":
            ce = loss.CEWithChunkedOutputLoss()
            return lambda h, W, y, w: ce([c @ W.T for c in h.chunk(8)], y)
        kl = loss.ForwardKLWithChunkedOutputLoss()
        return lambda h_s, h_t, W, w: kl([c @ W.T for c in h_s.chunk(8)], [c @ W.T for c in h_t.chunk(8)],
                                         torch.zeros(len(h_s), dtype=torch.int64, device=h_s.device))
    if peer == "liger" and kind == "kl":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        jsd = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False)       # beta 0: forward KL
        return lambda h_s, h_t, W, w: jsd(h_s, W, h_t, W, torch.zeros(len(h_s), dtype=torch.int64, device=h_s.device))
    raise ImportError(f"{peer} has no such loss for this device")


def loss_inputs(kind, N, D, V, dtype, device):
    g = generator(1)
    h, other = (torch.randn(N, D, generator=g) for _ in range(2))
    W = (torch.randn(V, D, generator=g) * D**-0.5).to(device, dtype)
    w = torch.full((N,), 1 / N, device=device)
    if kind == "ce":
        return h.to(device, dtype), W, torch.randint(V, (N,), generator=g).to(device), w
    return h.to(device, dtype), (h + 0.1 * other).to(device, dtype), W, w


def loss_side(kind, side, N, D, V, dtype, device):
    h, *rest = loss_inputs(kind, N, D, V, dtype, device)
    ours = linear_cross_entropy if kind == "ce" else linear_kl
    if side == "products":                                              # nothing but the matrix products
        W, times = (rest[1], 2) if kind == "kl" else (rest[0], 1)
        parts = fedbiot.chunks(h, W)
        p = torch.randn(parts[0].stop, V, device=device).to(dtype)

        def products():
            for rows in parts:
                for _ in range(times):
                    z = h[rows] @ W.T
                p[:len(z)] @ W
        return products
    loss = ours if side == "ours" else peer_loss(side, kind)

    def step():
        x = h.detach().requires_grad_()
        loss(x, *rest).backward()
        return x.grad
    return step


def losses(args):
    for kind in ("ce", "kl"):
        for D in args.dims:
            shape = (args.tokens, D, 32000, DTYPES[args.dtype], args.device)
            sides = {side: (lambda kind=kind, side=side, shape=shape: loss_side(kind, side, *shape))
                     for side in ("ours", *args.peer, "products")}
            yield Case(f"{kind} {args.dtype} N={args.tokens} D={D}", sides, 0.5 if args.dtype == "bf16" else 1e-3)


def gradient_errors(args) -> list[dict]:
    """Error of the gradients against float64, ours and naive; the KL at several disagreements."""
    rows = []
    for kind, apart in (("ce", 0), ("kl", 1.0), ("kl", 0.1), ("kl", 0.025), ("kl", 0.0045)):
        for name, dtype in DTYPES.items():
            h, *rest = loss_inputs(kind, 128, 512, 32000, torch.float32, "cpu")
            h, rest = h.to(dtype), [t.to(dtype) if t.is_floating_point() and t.ndim == 2 else t for t in rest]
            if kind == "kl":
                rest[0] = (h + apart * torch.randn(h.shape, generator=generator(2))).to(dtype)
            grads, value = {}, 0
            naive, ours = (naive_ce, linear_cross_entropy) if kind == "ce" else (naive_kl, linear_kl)
            for side, loss in (("true", naive), ("naive", naive), ("ours", ours)):
                x, *others = [t.double() if side == "true" and t.is_floating_point() else t for t in (h.detach(), *rest)]
                x = x.requires_grad_()
                result = loss(x, *others)
                result.backward()
                grads[side], value = x.grad, result if side == "true" else value
            rows.append({"case": f"{kind} {name}", "value": float(value), "ours": distance(grads["ours"], grads["true"]),
                         "naive": distance(grads["naive"], grads["true"])})
    return rows


# ---- client and server --------------------------------------------------------------------------

def random_lm(config: ModelConfig, layers, dtype, device) -> LM:
    """Random weights that keep activations near one, drawn on the device."""
    with torch.device("meta"):
        lm = LM.empty(config, layers)
    lm = lm.to(dtype).to_empty(device=device).requires_grad_(False)
    g = torch.Generator(device).manual_seed(0)
    for name, p in lm.named_parameters():
        p.fill_(1) if name.endswith("norm.weight") else p.normal_(0, p.shape[-1]**-0.5, generator=g)
    return lm


def examples_like_gsm8k(n: int, vocab: int) -> list[Example]:
    """Random ids with GSM8K's spread of lengths (Alpaca's template included): 4 in 10 tokens are the answer's."""
    g = generator(3)
    lengths = (5.2 + 0.35 * torch.randn(n, generator=g)).exp().clamp(60, 512).int().tolist()
    return [Example(torch.randint(3, vocab, (T,), generator=g).tolist(), int(0.6 * T)) for T in lengths]


class Given:
    """A shard whose batches are already there."""
    def __init__(self, batches):
        self.given = batches

    def batches(self, *_):
        return iter(self.given)


def batches_of(config, args, bucketed=True):
    examples = examples_like_gsm8k(10 * args.batch_size, config.vocab_size)
    if bucketed:
        made = Shard(examples, list(range(len(examples)))).batches(10, args.batch_size, (0, 0, 0))
    else:
        made = (collate(examples[i::10]) for i in range(10))
    return list(made)[:args.steps]


def useful_tokens(args, bucketed=True) -> int:
    """Tokens of a side's batches that are not padding; random ids are never 0."""
    return sum(int((b.tokens != 0).sum()) for b in batches_of(SHAPES[args.shape], args, bucketed))


def client_inputs(args, bucketed=True):
    config, cfg = SHAPES[args.shape], Config(dropout=Fraction("0.2"), adapter=2, local_steps=args.steps,
                                             batch_size=args.batch_size, lr=1e-4)
    emulator, adapter = layer_extract(config.n_layers, cfg.adapter, cfg.dropout)
    lm = random_lm(config, emulator + adapter, DTYPES[args.dtype], args.device)
    return config, cfg, lm, adapter, batches_of(config, args, bucketed)


def client_ours(args, bucketed=True):
    config, cfg, lm, _, batches = client_inputs(args, bucketed)
    client = Client(weights_of(lm), cfg, args.device)
    sent = {name: p.detach().clone() for name, p in client.received.items()}
    return lambda: torch.tensor(client.update(0, sent, Given(batches), 0)[1]["loss"])


def client_all(args, bucketed=True):
    """LoRA trained in every layer and the head on every position: what FedBiOT's client avoids."""
    config, cfg, lm, _, batches = client_inputs(args, bucketed)
    lm = add_lora(lm, cfg.rank, cfg.alpha, generator(0))
    return plain_steps(lambda b: lm(b.tokens).flatten(0, 1)[b.rows], list(lora_tensors(lm).values()), batches, args)


def plain_steps(logits, parameters, batches, args):
    start = [p.detach().clone() for p in parameters]

    def steps():
        with torch.no_grad():
            for p, q in zip(parameters, start):
                p.copy_(q)
        optimizer, values = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95)), []
        for b in batches:
            b = b.to(args.device)
            loss = (b.weights * F.cross_entropy(logits(b).float(), b.targets, reduction="none")).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        return torch.stack(values).mean()
    return steps


def hf_model(lm: LM, device):
    """The same weights as a transformers model; its layers are numbered through."""
    from transformers import LlamaConfig, LlamaForCausalLM
    renamed = LM(lm.config, dict(enumerate(lm.layers.values())), lm.tok_embeddings, lm.norm, lm.output)
    config = LlamaConfig(**lm.config.to_hf() | {"num_hidden_layers": len(lm.layers)})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: t.detach() for name, t in to_hf(dict(renamed.named_parameters()), lm.config).items()}
    model.load_state_dict(state, strict=True, assign=True)
    inv = 1 / lm.config.rope_theta ** (torch.arange(0, lm.config.head_dim, 2).float() / lm.config.head_dim)
    for rope in [m for m in model.modules() if hasattr(m, "inv_freq")]:     # meta's buffers are empty
        rope.inv_freq = rope.original_inv_freq = inv.to(device)
    return model.eval()


def client_transformers(args, bucketed=True):
    """The step that a user writes with transformers + peft: labels -100 where no answer is, its own loss."""
    from peft import LoraConfig, get_peft_model
    config, cfg, lm, adapter, batches = client_inputs(args, bucketed)
    depth = len(lm.layers)
    lora = LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
                      layers_to_transform=list(range(depth - len(adapter), depth)))
    model = get_peft_model(hf_model(lm, args.device), lora).to(args.device)
    del lm
    parameters, given = [p for p in model.parameters() if p.requires_grad], []
    for b in batches:
        labels = torch.full((b.tokens.numel() + 1,), -100)
        labels[b.rows[b.weights > 0]] = b.targets[b.weights > 0]        # already shifted by one
        mask = torch.ones_like(b.tokens)                                # right padding: causal attention never sees it
        given.append([t.to(args.device) for t in (b.tokens, mask, labels[:-1].view_as(b.tokens))])

    def steps():
        optimizer, values = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95)), []
        for tokens, mask, labels in given:
            loss = model(input_ids=tokens, attention_mask=mask, labels=F.pad(labels, (1, 0))[:, :-1], shift_labels=labels,
                         use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        return torch.stack(values).mean().float()
    return steps


def client(args):
    """Batches sorted by length beside the peers, then batches at random: their ms a useful token compare."""
    makers = {"ours": client_ours, "naive": client_all, "transformers": client_transformers}
    for bucketed in (True, False):
        names = [side for side in ("ours", *args.peer) if bucketed or side != "transformers"]
        yield Case(f"client {args.shape} {args.dtype} B={args.batch_size}" + ", random batches" * (not bucketed),
                   {side: (lambda make=makers[side], bucketed=bucketed: make(args, bucketed)) for side in names},
                   0.05 if args.dtype == "bf16" else 5e-3, lambda side, b=bucketed: useful_tokens(args, b))


def server_side(args, ours: bool):
    config = SHAPES[args.shape]
    cfg = Config(batch_size=args.batch_size, align_steps=args.steps)
    full = random_lm(config, None, DTYPES[args.dtype], args.device)
    server = Server(full, Given([b.to(args.device) for b in batches_of(config, args)]), cfg)
    if not ours:                                        # every role has its own copy; logits of all positions
        import copy
        server.teacher, server.student = copy.deepcopy(server.teacher), copy.deepcopy(server.student)
        server.emulated = lora_tensors(server.student, server.split(config.n_layers, cfg)[0])
        server.alignment_losses = lambda batch: naive_alignment(server, batch)
    start = {name: p.detach().clone() for name, p in server.emulated.items()}

    def steps():
        fedbiot.copy_into(server.emulated, start)
        server.optimizer = server.new_optimizer()
        server.align(1, args.steps)
        return torch.tensor(list(server.metrics.values()))
    return steps


def naive_alignment(server, batch):
    cut, all_rows = server.adapter[-server.cfg.adapter], torch.arange(batch.tokens.numel(), device=batch.tokens.device)
    with torch.no_grad():
        target, h_t = fedbiot.adapter_input_and_output(server.teacher, batch.tokens, all_rows, cut)
        z_t = server.teacher.output(h_t)
    entered, h_s = fedbiot.adapter_input_and_output(server.student, batch.tokens, all_rows, cut)
    s, t = (z.float().log_softmax(-1)[batch.rows] for z in (server.student.output(h_s), z_t))
    target, entered, w = target[batch.rows].float(), entered[batch.rows].float(), batch.weights
    l2 = (w * (entered - target).square().sum(-1)).sum() / (w * target.square().sum(-1)).sum()
    return l2, (w * (t.exp() * (t - s)).sum(-1)).sum()


def server(args):
    yield Case(f"server {args.shape} {args.dtype} B={args.batch_size}",
               {"ours": lambda: server_side(args, True), **{p: lambda: server_side(args, False) for p in args.peer}}, 0.05,
               lambda side: useful_tokens(args))


# ---- loading ------------------------------------------------------------------------------------

def write_shards(folder: Path, config: ModelConfig):
    """Meta's format in two model-parallel shards of random bf16, one shard in memory at a time."""
    from model import split_dim
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LM.empty(config).state_dict().items()}
    block = torch.randn(2**20, generator=generator(0)).bfloat16()
    for shard in range(2):
        state = {}
        for name, shape in shapes.items():
            dim = split_dim(name)
            size = [n // 2 if i == dim else n for i, n in enumerate(shape)]
            n = math.prod(size)
            state[name] = block.repeat(-(-n // len(block)))[:n].clone().view(size)
        torch.save(state, folder / f"consolidated.{shard:02d}.pth")
        del state


def sampled(call) -> tuple[object, int]:
    """(result, peak of RssAnon above what was there), read every millisecond by a thread."""
    peak, stop, before = [0], threading.Event(), status("RssAnon")

    def watch():
        while not stop.wait(0.001):
            peak[0] = max(peak[0], status("RssAnon"))
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return call(), max(peak[0], status("RssAnon")) - before
    finally:
        stop.set()
        thread.join()


def load_one(args, folder) -> dict:
    config = SHAPES[args.shape]
    emulator, adapter = layer_extract(config.n_layers, 2, Fraction("0.5"))
    start = time.perf_counter()
    lm, peak = sampled(lambda: load_weights(folder, config, emulator + adapter, DTYPES["bf16"]))
    kept = sum(p.numel() * p.element_size() for p in lm.parameters())
    return {"wall_s": time.perf_counter() - start, "kept_mb": kept / 2**20, "mb": peak / 2**20, "peak/kept": peak / kept}


def load_report(args) -> list[dict]:
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        write_shards(Path(folder), SHAPES[args.shape])
        return [{"case": f"load {args.shape}, client at dropout 0.5", "side": "ours", **fresh(load_one, args, folder)}]


# ---- generation ---------------------------------------------------------------------------------

def generate_case(args):
    def prompts(tokenizer):
        rows = read_gsm8k(args.data_dir, "test")[:args.prompts]
        return sorted(([tokenizer.bos] + tokenizer.encode(prompt_of(r.instruction)) for r in rows), key=len)

    def ours(batch):
        lm, tokenizer = load(args.ckpt, device=args.device)
        return lambda: flat(generate(lm, prompts(tokenizer), args.new_tokens, tokenizer.eos, batch))

    def transformers(batch):
        lm, tokenizer = load(args.ckpt, device=args.device)
        model, eos, ids = hf_model(lm, args.device), tokenizer.eos, prompts(tokenizer)

        def run():
            texts = []
            for i in range(0, len(ids), batch):
                part, width = ids[i:i + batch], max(map(len, ids[i:i + batch]))
                tokens = torch.tensor([[eos] * (width - len(p)) + p for p in part], device=args.device)
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=args.device)
                out = model.generate(tokens, attention_mask=mask, max_new_tokens=args.new_tokens, do_sample=False,
                                     eos_token_id=eos, pad_token_id=eos)[:, width:].tolist()
                texts += [t[:t.index(eos)] if eos in t else t for t in out]
            return flat(texts)
        return run

    sides = {"ours": lambda: ours(64), "ours, batch 16": lambda: ours(16)}
    sides |= {"transformers, batch 16": lambda: transformers(16)} if "transformers" in args.peer else {}
    yield Case(f"generate {args.prompts} prompts, {args.new_tokens} new tokens, fp32", sides, 0.0, memory=False)


def flat(texts) -> torch.Tensor:
    return torch.tensor([i for text in texts for i in [*text, -1]])


# ---- growth -------------------------------------------------------------------------------------

GROWTH = {"depth": [4, 8, 16, 32], "vocabulary": [1000, 4000, 16000, 64000, 128000],
          "sequence": [128, 256, 512, 1024, 2048], "clients": [1, 10, 100, 1000]}


def growth_point(args, axis: str, value: int) -> dict:
    """A client's step (or, for `clients`, a round with two of them) at one point, the other sizes fixed."""
    torch.set_num_threads(args.threads)
    at = {"depth": 8, "vocabulary": 4000, "sequence": 256, "clients": 2} | {axis: value}
    config = ModelConfig(256, at["depth"] + 2, 4, 4, at["vocabulary"], 704)
    cfg = Config(dropout=Fraction(0), adapter=2, local_steps=2, batch_size=4, rounds=2, clients_per_round=min(2, at["clients"]),
                 align_init=1, align_steps=1)
    full = random_lm(config, None, DTYPES[args.dtype], args.device)
    T, g = at["sequence"] + 1, generator(4)
    rows = [Example(torch.randint(3, config.vocab_size, (T,), generator=g).tolist(), T - 64)
            for _ in range(4 * at["clients"] if axis == "clients" else 8)]
    if axis == "clients":
        shards = [Shard(rows, list(range(4 * m, 4 * m + 4))) for m in range(at["clients"])]
        server = Server(full, Shard(rows, list(range(len(rows)))), cfg)
        one = Client(server.bootstrap(), cfg, args.device)
        step = lambda: list(fedbiot.federate(server, one, shards, cfg, fedbiot.Wire()))  # noqa: E731
    else:
        one, shard = Client(weights_of(full), cfg, args.device), Shard(rows, list(range(8)))
        sent = {name: p.detach().clone() for name, p in one.received.items()}
        step = lambda: one.update(0, sent, shard, 0)  # noqa: E731
    mb, seconds = peak_growth(step, args.device) / 2**20, []
    for _ in range(args.rounds):
        start = clock(args.device)
        step()
        seconds.append((clock(args.device) - start) / 2)
    return {"ms": 1e3 * min(seconds), "median_ms": 1e3 * statistics.median(seconds), "mb": mb}


def growth_report(args) -> list[dict]:
    rows = [{"case": axis, "side": n, **fresh(growth_point, args, axis, n)} for axis, values in GROWTH.items() for n in values]
    if args.picture:
        draw(rows, args.picture)
    return rows


def draw(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), constrained_layout=True)
    for ax, axis in zip(axes, GROWTH):
        points = [r for r in rows if r["case"] == axis and "ms" in r]
        xs, other = [r["side"] for r in points], ax.twinx()
        ax.plot(xs, [r["ms"] for r in points], "o-", color="tab:blue")
        other.plot(xs, [r["mb"] for r in points], "s--", color="tab:orange")
        ax.set(xscale="log", xlabel=axis, ylabel="CPU ms " + ("a round / 2" if axis == "clients" else "a step"))
        ax.set_xticks(xs, [f"{x // 1000} k" if x >= 4000 else str(x) for x in xs])
        ax.minorticks_off()
        ax.set_ylim(0), other.set_ylim(0)
        other.set_ylabel("extra peak, MB (dashed)")
    figure.savefig(path, dpi=90)


# ---- command line -------------------------------------------------------------------------------

CASES = {"losses": losses, "client": client, "server": server, "generate": generate_case}
PEERS = {"losses": ["naive"], "client": ["transformers", "naive"], "server": ["naive"], "generate": ["transformers"]}
COLUMNS = ("case", "side", "ms", "median_ms", "ours/it", "mb", "ours/it mb", "value", "ours", "naive", "wall_s", "kept_mb",
           "peak/kept", "note", "error")


def table(rows: list[dict]):
    """Columns that some row has, as Markdown."""
    names = [n for n in COLUMNS if any(n in row for row in rows)]
    cells = [names, ["---"] * len(names)]
    cells += [[f"{v:.3g}" if isinstance(v := row.get(n, ""), float) and v < 100 else f"{v:,.0f}" if isinstance(v, float)
               else str(v) for n in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("what", choices=[*CASES, "load", "growth"])
    parser.add_argument("--peer", action="append", help="one or more: naive compile transformers torchtune liger native")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, help="losses: rows N")
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1024, 2048], help="losses: widths D")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="client, server: steps that are timed together")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--ckpt", default=str(ROOT / "tiny" / "llama"))
    parser.add_argument("--data-dir", default=str(ROOT / "tiny" / "data"))
    parser.add_argument("--scratch", help="load: where the checkpoint is made for a moment (7b: 13.5 GB)")
    parser.add_argument("--picture", help="growth: write the curves there")
    args = parser.parse_args()
    args.peer = args.peer or PEERS.get(args.what, [])
    torch.set_num_threads(args.threads)
    if args.what in ("load", "growth"):
        rows = load_report(args) if args.what == "load" else growth_report(args)
    else:
        rows = [row for i, case in enumerate(CASES[args.what](args)) for row in measure(case, i, args)]
    if args.json:
        print(json.dumps(rows))
        return
    table(rows)
    if args.what == "losses":
        print("\nGradients against float64, relative error:\n")
        table(gradient_errors(args))


if __name__ == "__main__":
    main()
