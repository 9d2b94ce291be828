"""Time, peak memory and distance of results, for bench.py, and a table of them for people.

CPU time, because other processes may share the cores; memory in a fresh process, because an
allocator keeps what it once had.
"""
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(step, device: str) -> float:
    """Milliseconds."""
    start = clock(device)
    step()
    return 1e3 * (clock(device) - start)


def status(field: str) -> int:
    """Bytes, from /proc/self/status: VmRSS, VmHWM (its peak), RssAnon (without mapped files)."""
    return next(int(x.split()[1]) << 10 for x in open("/proc/self/status") if x.startswith(field))


def peak_growth(step, device: str) -> float:
    """MB by which the peak of one step exceeds what is there before it."""
    x = torch.randn(64, 64, device=device, requires_grad=True)          # libraries start here
    for dtype in (torch.float32, torch.bfloat16):
        q = (x @ x).softmax(-1).to(dtype)[None, None]
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    torch.optim.AdamW([x]).step()               # the first optimizer imports PyTorch's compiler
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")                       # VmHWM starts again
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) / 2**20


def fresh(call, args, *given):
    """call(args, *given) in a process that has imported torch and done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        pool.submit(torch.set_num_threads, args.threads).result()
        return pool.submit(call, args, *given).result()


def distance(a, b) -> float:
    a, b = (torch.as_tensor(t).flatten().double() for t in (a, b))
    return float((a - b).norm() / b.norm()) if a.shape == b.shape else float("inf")


def table(rows: list[dict]):
    """Markdown, a column for every key."""
    names = list(dict.fromkeys(key for row in rows for key in row))

    def text(v):
        return str(v) if not isinstance(v, float) else f"{v:.3g}" if v < 100 else f"{v:,.0f}"
    lines = [names, ["---"] * len(names)] + [[text(row.get(n, "")) for n in names] for row in rows]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
