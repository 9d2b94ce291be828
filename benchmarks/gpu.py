"""What only a GPU can answer, beside bench.py --device cuda; benchmarks/gpu.sh runs both.

    python benchmarks/gpu.py card        the card's name and the versions
    python benchmarks/gpu.py decode      a decoding step beside what reading the weights takes
    python benchmarks/gpu.py reads       how often the host waits for the device
    python benchmarks/gpu.py memory      a step's peak beside what `train.py --plan` counts
    python benchmarks/gpu.py halves      generation in too little memory: batches become smaller

--device cpu --shape tiny tries all but `reads` and `halves` without a GPU (memory: set the variable
MALLOC_MMAP_THRESHOLD_=65536, or the C library keeps more than is live).
"""
import argparse
import platform
import sys
import warnings

import torch

from bench import SHAPES, Given, batches_of, make_server, random_lm     # it finds the modules below
import fedbiot
import train
from extras import memory
from fedbiot import Client, Config, Server, generator, layer_extract, weights_of
from measuring import fresh, peak_growth, table, timed
from model import generate


def card(args) -> list[dict]:
    name = platform.machine()
    if args.device == "cuda":
        found = torch.cuda.get_device_properties(0)
        name = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    return [{"device": name, "torch": torch.__version__, "CUDA": str(torch.version.cuda),
             "python": platform.python_version()}]


# ---- decoding -----------------------------------------------------------------------------------

def bandwidth(device: str) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    x = torch.zeros(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.numel() / (min(timed(lambda: y.copy_(x), device) for _ in range(5)) / 1e3)


def decode(args) -> list[dict]:
    """Greedy decoding with random weights; the bound is one reading of the weights and the cache a
    step. The prompts' own pass is measured apart and taken off."""
    lm, rows, speed = random_lm(SHAPES[args.shape], None, args), [], bandwidth(args.device)
    weights = sum(p.nbytes for p in lm.parameters()) - lm.tok_embeddings.weight.nbytes
    vocab, g, prompt, steps = SHAPES[args.shape].vocab_size, generator(5), 128, args.new_tokens
    for batch in args.batches:
        prompts = torch.randint(3, vocab, (batch, prompt), generator=g).tolist()

        def text(n, prompts=prompts):
            return generate(lm, prompts, n, -1, len(prompts))     # no piece is -1: no early end
        text(2)
        first, whole = (min(timed(lambda n=n: text(n), args.device) for _ in range(args.rounds))
                        for n in (1, 1 + steps))
        ms = (whole - first) / steps
        cache = sum(c.nbytes for c in lm.caches(batch, prompt + steps // 2))
        bound = 1e3 * (weights + cache) / speed
        rows.append({"case": f"decode {args.shape} {args.dtype}", "batch": batch, "ms a step": ms,
                     "bound ms": bound, "share of the bound": bound / ms,
                     "tokens / s": 1e3 * batch / ms, "GB/s": speed / 1e9})
    return rows


# ---- host reads ---------------------------------------------------------------------------------

def count_reads(work) -> int:
    """How often PyTorch says that the host waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def reads(args) -> list[dict]:
    """Of a client's round, of an alignment and of decoding, at two lengths each: what grows with
    the steps is a read in the loop."""
    if args.device != "cuda":
        sys.exit("error: reads needs a GPU")
    server, rows = make_server(args), []
    client = Client(weights_of(server.student), server.cfg, args.device)
    sent = {name: p.detach().clone() for name, p in client.received.items()}
    batches = [b.to(args.device) for b in batches_of(args)]
    prompts = torch.randint(3, 1000, (8, 32), generator=generator(6)).tolist()
    for n in (2, 32):
        given = Given((batches * n)[:n])
        client.cfg = Config(local_steps=n, batch_size=args.batch_size)
        server.public = given
        for name, work in (("a client's round", lambda: client.update(0, sent, given, 0)),
                           ("an alignment", lambda: server.align(1, n)),
                           ("decoding", lambda: generate(server.full, prompts, n, -1, 8))):
            work()                                              # what starts once starts now
            rows.append({"what": name, "steps": n, "host reads": count_reads(work)})
    return rows


# ---- memory -------------------------------------------------------------------------------------

def longest(args):
    """(architecture, configuration) of two steps, every sequence the longest, and of an evaluation
    of 8 tokens an answer."""
    argv = ("--align-init-on", "lora", "--device", args.device, "--dtype", args.dtype, "--max-len",
            "257", "--batch-size", str(args.batch_size), "--threads", "1", "--max-new-tokens", "8")
    return memory.settings(SHAPES[args.shape], train.parse(argv))


def peak_of(args, side: str) -> float:
    """MB that two steps of a client, or of the server, or its evaluation, need beside what it
    holds."""
    config, cfg = longest(args)
    if side != "client":
        server = Server(random_lm(config, None, args), memory.Longest(cfg), cfg)
        work = {"server": lambda: server.broadcast(1),
                "evaluation": lambda: memory.evaluate(server, cfg)}[side]
        return peak_growth(work, args.device)
    emulator, adapter = layer_extract(config.n_layers, cfg.adapter, cfg.dropout)
    client = Client(weights_of(random_lm(config, emulator + adapter, args)), cfg, args.device)
    sent = {name: p.detach().clone() for name, p in client.received.items()}
    return peak_growth(lambda: client.update(1, sent, memory.Longest(cfg), 0), args.device)


def memory_table(args) -> list[dict]:
    counts, rows, args.threads = memory.needed(*longest(args), fedbiot), [], 1
    parts = "activations", "optimizer", "temporaries"
    counts |= {"evaluation_activations": counts["evaluation"]}
    for side in ("client", "server", "evaluation"):
        mb = fresh(peak_of, args, side)
        counted = sum(counts.get(f"{side}_{part}", 0) for part in parts) / 2**20
        rows.append({"case": f"{side} {args.shape} {args.dtype} B={args.batch_size} x 256",
                     "measured MB": mb, "counted MB": counted, "counted / measured": counted / mb})
    return rows


def halves(args) -> list[dict]:
    """Generation with 64 long prompts where 2 GiB are free ends, with a note for each halving."""
    lm, vocab = random_lm(SHAPES[args.shape], None, args), SHAPES[args.shape].vocab_size
    prompts = torch.randint(3, vocab, (64, 1024), generator=generator(5)).tolist()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**31) / total)
    texts = generate(lm, prompts, 8, -1, len(prompts))
    return [{"what": "64 prompts of 1,024 tokens in 2 GiB", "texts": len(texts),
             "peak GiB": torch.cuda.max_memory_allocated() / 2**30}]


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("card", "decode", "reads", "memory", "halves"))
    add("--device", default="cuda", choices=("cpu", "cuda"))
    add("--dtype", default="bf16", choices=("bf16", "fp32"))
    add("--shape", default="7b", choices=SHAPES)
    add("--batches", type=int, nargs="+", default=[1, 16, 64], help="decode: sequences at a time")
    add("--new-tokens", type=int, default=128)
    add("--batch-size", type=int, default=4)
    add("--steps", type=int, default=2)
    add("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU here that PyTorch can use")
    with torch.no_grad() if args.what == "decode" else torch.enable_grad():
        table({"card": card, "decode": decode, "reads": reads, "memory": memory_table,
               "halves": halves}[args.what](args))
    print()


if __name__ == "__main__":
    main()
