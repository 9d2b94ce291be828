"""What memory a run needs, for `train.py --plan`. The objects of the run itself take two steps each
on the meta device, where a tensor has a shape and no numbers, and every storage is followed.

    Live            the bytes that are referred to at a moment, and their peak
    StandIn         attention on "meta" as on the device of the run; Mixed: autocast likewise
    needed          the counts by name; described, the same for people

Not counted: Python and PyTorch themselves (0.2 to 0.4 GB; a CUDA context 0.5 GB), the training
data, what an allocator keeps for later, and what a kernel needs while it runs.
"""
import contextlib
import weakref
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from data import Batch, Example, collate
from eval import pick_dtype
from fedbiot import HELD, Payload, Wire, federate, payload_bytes
from model import CACHE_BYTES, LM, ModelConfig, expecting, generate, load_weights

SHOT = 128              # tokens of a worked example; GSM8K's have about 90


# ---- following storages -------------------------------------------------------------------------

def tensors_in(values) -> list[Tensor]:
    """The tensors among an operator's arguments or results, which may be lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
    return found


class Live(TorchDispatchMode):
    """Bytes of the storages on "meta" that operators made while this lasts and that something still
    refers to: `now`, and the `peak`. Views and what was there before add nothing, nor do empty
    models, which a run itself makes on "meta". A number that the host reads is 1."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.followed, self.pausing = 0, 0, {}, False
        self.empty = LM.empty

    def empty_model(self, config, layer_ids=None) -> LM:
        """LM.empty, whose storages are not followed: it takes no memory on any device."""
        self.pausing = True
        lm = self.empty(config, layer_ids)
        self.pausing = False
        return lm

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_in((*args, *kwargs.values()))
        source = next((a for a in given if a.is_meta), None)
        if function is torch.ops.aten._local_scalar_dense.default and source is not None:
            return 1
        if source is not None and str(kwargs.get("device", "")) == "cpu":
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if function is torch.ops.aten.copy_.default and source is not None and not args[0].is_meta:
            return args[0].fill_(1)
        result, old = function(*args, **kwargs), {a.untyped_storage()._cdata for a in given}
        for t in tensors_in((result,)):
            if t.is_meta and not self.pausing and t.untyped_storage()._cdata not in old:
                self.follow(t.untyped_storage())
        return result

    def follow(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.followed:
            return

        def gone(_):
            del self.followed[key]
            self.now -= size
        self.followed[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """Flash attention: keeps queries, keys, values, the result and a number a query. The meta
    device's own choice would be to write the scores (B, H, T, T)."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]


class FusedNorm(torch.autograd.Function):
    """F.rms_norm as CUDA's kernel does it: keeps its input and a number a row."""

    @staticmethod
    def forward(ctx, x):                                            # (..., D) -> (..., D)
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        return torch.empty_like(g)


class StandIn(TorchFunctionMode):
    """While this lasts attention is the flash kernel's, and on CUDA a norm is one kernel's, which
    keeps its input; the CPU's keeps more. `marks` are the bytes that were live when a backward pass
    began."""

    def __init__(self, cuda: bool, live: Live):
        super().__init__()
        self.cuda, self.live, self.marks = cuda, live, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if function is F.rms_norm and self.cuda:
            return FusedNorm.apply(args[0])
        if function is torch.Tensor.backward:
            self.marks.append(self.live.now)
        return function(*args, **kwargs)


class Mixed(TorchFunctionMode):
    """torch.autocast for "meta", which has none: fp32 operands are rounded for a product, and the
    rounded ones stay for the backward pass."""

    def __init__(self, device_type: str, dtype: torch.dtype, enabled: bool = True):
        super().__init__()
        self.dtype, self.enabled = dtype, enabled

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and self.enabled:
            args = [x.to(self.dtype) for x in args[:2]]
        return function(*args, **kwargs or {})


def many_at_once(optimizer, args, kwargs):
    """On CUDA an optimizer updates all tensors together, with temporaries of all of them."""
    for group in optimizer.param_groups:
        group["foreach"] = True


@contextlib.contextmanager
def counting(cuda: bool):
    """(Live, StandIn) of a run on CUDA, or on the CPU, while the block lasts: tensors say that they
    are there, and the run's code does what it does there."""
    live, stack = Live(), contextlib.ExitStack()
    stand_in = StandIn(cuda, live)
    if cuda:
        stack.callback(register_optimizer_step_pre_hook(many_at_once).remove)
    for owner, name, other in ((Tensor, "is_cuda", property(lambda self: cuda)),
                               (LM, "empty", live.empty_model), (torch, "autocast", Mixed)):
        stack.enter_context(patch.object(owner, name, other))
    with stack, live, stand_in:
        yield live, stand_in


def growth(live: Live, stand_in: StandIn, work) -> dict[str, int]:
    """What is live before `work`, and what it adds at its peak. Its first step has activations and
    no optimizer's state yet; at the second both are there. The rest is temporary, gradients too."""
    held = live.peak = live.now
    stand_in.marks.clear()
    work()
    marks = stand_in.marks or [held]
    activations, optimizer = marks[0] - held, marks[-1] - marks[0]
    return {"weights": held, "activations": activations, "optimizer": optimizer,
            "temporaries": live.peak - held - activations - optimizer}


# ---- the parts of a run -------------------------------------------------------------------------

class Longest:
    """In place of data: batches of the longest sequences, with a target at every token."""

    def __init__(self, cfg):
        self.batch: Batch = collate([Example([1] * cfg.max_len, 1)] * cfg.batch_size)

    def batches(self, steps: int, *_):
        return iter([self.batch] * steps)


class Uploads(Wire):
    """The server's end of a wire: what was broadcast, two uploads, and the bytes of the others that
    do not wait on disk, as long as the two are there. (Tensor by tensor they would take minutes.)
    """

    def round(self, t: int, payload: Payload, client, shards, chosen, expected) -> tuple:
        self.payload = payload
        n = max(held(expected, len(chosen)) - 2 * payload_bytes(expected), 0)
        report = {"loss": 1.0, "examples": 1,
                  "others": torch.empty(n, dtype=torch.uint8, device="meta")}
        return {m: (copies(expected), report) for m in chosen[:2]}, [0], [0]


def held(expected: Payload, clients: int) -> int:
    """Bytes of a round's uploads in memory, at most: as many as HELD allows wait there, and under
    torchrun as many are on their way; the others are on disk."""
    upload = payload_bytes(expected)
    return upload * min(clients, HELD // upload + max(HELD // upload, 1))


def copies(payload: Payload) -> Payload:
    return {name: t.clone() for name, t in payload.items()}


def a_server(config: ModelConfig, cfg, method):
    full = load_weights(cfg.ckpt, config, dtype=pick_dtype(cfg.dtype, cfg.device), device="meta")
    return method.Server(full, Longest(cfg), cfg)


def count_weights(live: Live, server):
    """On "meta" the weights in fp32 are shells that were kept."""
    for lm in server.models().values():
        for p in lm.parameters():
            live.follow(p.untyped_storage())


def evaluate(server, cfg):
    """The pass of a batch of prompts through each model, with the whole cache: `generate` believes
    that every text ends at once."""
    new = cfg.max_new_tokens or {"gsm8k": 256}.get(cfg.task, 512)
    length = cfg.max_len + SHOT * (cfg.shots if cfg.task != "rosetta" else 0)
    for lm in server.models().values():
        fit = CACHE_BYTES // (cache_of_a_token(lm) * (length + new))
        rows = cfg.eval_batch or min(max(fit, 1), 64)
        prompts = [[1 + row % 2] * length for row in range(rows)]       # no common beginning
        generate(lm, prompts, new, -1, rows)


def cache_of_a_token(lm) -> int:
    return sum(cache.nbytes for cache in lm.caches(1, 1))


def server_process(config: ModelConfig, cfg, method) -> dict[str, dict[str, int]]:
    """What the server's phases need, and, at a `client` in the same process, a client's steps."""
    wire, shards, sent = Uploads(), [None] * cfg.clients, []
    with counting(cfg.device == "cuda") as (live, stand_in):
        def phase(work):
            return growth(live, stand_in, work)
        server = a_server(config, cfg, method)
        count_weights(live, server)
        phases = {"bootstrap": phase(lambda: sent.append(server.bootstrap())),
                  "round": phase(lambda: [*federate(server, None, shards, cfg, wire, 1)]),
                  "evaluation": phase(lambda: evaluate(server, cfg))}
        client = method.Client(sent[0], cfg, "meta")
        return phases | {"client": phase(lambda: client.update(1, wire.payload, Longest(cfg), 0))}


def client_process(config: ModelConfig, cfg, method) -> dict[str, int]:
    """A client's process under torchrun: it holds what bootstrap and broadcast brought."""
    server = a_server(config, replace(cfg, align_init=0, align_steps=0), method)
    bootstrap, payload = server.bootstrap(), server.broadcast(0)
    with counting(cfg.device == "cuda") as (live, stand_in):
        client, sent = method.Client(copies(bootstrap), cfg, "meta"), copies(payload)
        return growth(live, stand_in, lambda: client.update(0, sent, Longest(cfg), 0))


# ---- the counts ---------------------------------------------------------------------------------

def settings(config: ModelConfig, cfg) -> tuple[ModelConfig, object]:
    """The run's, with two steps of each kind in the second of two rounds, on "cpu" or "cuda", for
    which no GPU need be there."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    with expecting("cpu, cuda, cuda:1, … or auto", f"--device {cfg.device}"):
        device = torch.device(auto if cfg.device == "auto" else cfg.device).type
        if device not in ("cpu", "cuda"):
            raise ValueError(f"{device}, whose memory --plan cannot count")
    align = max(cfg.align_steps, cfg.align_init * (cfg.align_init_on == "lora"))
    config = config if config.vocab_size > 0 else replace(config, vocab_size=32000)     # LLaMA's
    return config, replace(cfg, device=device, rounds=2, local_steps=min(cfg.local_steps, 2),
                           align_init=min(cfg.align_init, 2), align_steps=min(align, 2))


def needed(config: ModelConfig, cfg, method) -> dict[str, int]:
    """Bytes at the peak of a `server`'s process, of a `client`'s, and in `one_process` with all;
    what an `evaluation` adds to the server's weights, and a token in its cache; the `uploads` of a
    round in memory. Of the phase that needs most, its parts: server_weights, server_activations
    (for the backward pass), server_optimizer (its state), server_temporaries (with gradients);
    client_….
    """
    config, cfg = settings(config, cfg)
    phases = server_process(config, cfg, method)
    together, evaluation = phases.pop("client"), phases["evaluation"]
    of_client = together["weights"] - evaluation["weights"]     # beside what the server has
    parts = {"server": max(phases["bootstrap"], phases["round"], key=total),
             "client": client_process(config, cfg, method)}
    server = a_server(config, cfg, method)
    upload = held(server.expected(0), cfg.clients_per_round or cfg.clients)
    counts = {"server": max(map(total, phases.values())), "client": total(parts["client"]),
              "one_process": max(total(together) + upload, total(phases["bootstrap"]),
                                 of_client + max(total(phases["round"]), total(evaluation))),
              "evaluation": total(evaluation) - evaluation["weights"],
              "evaluation_cache_a_token": max(map(cache_of_a_token, server.models().values())),
              "uploads": upload}
    return counts | {f"{side}_{name}": n for side in parts for name, n in parts[side].items()}


def total(parts: dict[str, int]) -> int:
    return sum(parts.values())


# ---- for train.py -------------------------------------------------------------------------------

PARTS = ("weights", "activations", "optimizer", "temporaries")
NOT_COUNTED = {         # rows by device
    "cpu": {
        "  not counted": "Python and PyTorch themselves, 0.2 to 0.4 GB; freed memory that the C",
        "": "library keeps, half as much again (MALLOC_MMAP_THRESHOLD_=65536: less, but slower)"},
    "cuda": {"  not counted": "CUDA's own 0.5 GB; freed memory that PyTorch keeps for later"}}


def add_to(plan: dict, config: ModelConfig, cfg, method) -> dict[str, str]:
    """Adds `memory_bytes`, what `needed` counts, to a plan; returns its rows for people."""
    plan["memory_bytes"] = m = needed(config, cfg, method)
    _, cfg = settings(config, cfg)
    dtype = str(pick_dtype(cfg.dtype, cfg.device)).removeprefix("torch.")
    rows = {"memory": f"at most, in {dtype} on {cfg.device}; {cfg.batch_size} x {cfg.max_len} "
                      f"tokens a batch (--batch-size, --max-len)",
            "  training": columns("in all", *PARTS[:3], "gradients, temporary")}
    for side in ("server", "client"):
        parts = [m[f"{side}_{name}"] for name in PARTS]
        rows[f"    {side}"] = columns(*map(size, (sum(parts), *parts)))
    rows["  evaluation"] = (f"{columns(size(m['evaluation']))}  beside the server's weights; "
                            f"{size(m['evaluation_cache_a_token'])} for every cached token")
    rows["  one process"] = (f"{columns(size(m['one_process']))}  server and clients together, as "
                             f"without torchrun")
    return rows | NOT_COUNTED.get(cfg.device, {})


def columns(*cells: str) -> str:
    """Cells, right-aligned in columns of which the last is wider."""
    return "  ".join(f"{cell:>{20 if i == 4 else 11}}" for i, cell in enumerate(cells))


def size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB" if n >= 2**20 else (
        f"{n / 2**10:.1f} KiB" if n else "0")
