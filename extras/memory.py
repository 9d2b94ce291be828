"""What memory a run needs, for `train.py --plan`. The objects of the run itself take two steps each
on the meta device, where a tensor has a shape and no numbers, and every storage is followed.

    Live            the bytes that are referred to at a moment, and their peak
    StandIn         answers on "meta" as on the device of the run; Mixed does so for autocast
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
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Batch, Example, collate
from eval import pick_dtype
from fedbiot import Payload, Wire, federate, payload_bytes
from model import ModelConfig, expecting, generate, load_weights

SHOT = 128              # tokens of a worked example; GSM8K's have about 90


# ---- following storages -------------------------------------------------------------------------

class Live(TorchDispatchMode):
    """Bytes of the storages on "meta" that operators made while this lasts and that something still
    refers to: `now`, and the `peak`. Views and what was there before add nothing. A number that the
    host reads is 1."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.followed = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        source = next((a for a in given if a.is_meta), None)
        if function is torch.ops.aten._local_scalar_dense.default and source is not None:
            return 1
        if source is not None and str(kwargs.get("device", "")) == "cpu":
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if function is torch.ops.aten.copy_.default and source is not None and not args[0].is_meta:
            return args[0].fill_(1)
        result, old = function(*args, **kwargs), {a.untyped_storage()._cdata for a in given}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.is_meta and t.untyped_storage()._cdata not in old:
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


class StandIn(TorchFunctionMode):
    """While this lasts tensors say that they are on a GPU, or that they are not, and attention is
    the flash kernel's. `marks` are the bytes that were live when a backward pass began."""

    def __init__(self, cuda: bool, live: Live):
        super().__init__()
        self.cuda, self.live, self.marks = cuda, live, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.is_cuda.__get__:
            return self.cuda
        if function is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if function is torch.Tensor.backward:
            self.marks.append(self.live.now)
        return function(*args, **kwargs)


class Mixed(TorchFunctionMode):
    """torch.autocast for "meta", which has none: fp32 matrices are rounded for a product, those
    that are tuned once for as long as this lasts."""

    def __init__(self, device_type: str, dtype: torch.dtype, enabled: bool = True):
        super().__init__()
        self.dtype, self.enabled, self.rounded = dtype, enabled, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.linear or not self.enabled:
            return function(*args, **kwargs or {})
        x, W = args
        rounded = self.rounded[W] if W in self.rounded else W.to(self.dtype)
        if W.requires_grad:
            self.rounded[W] = rounded
        return F.linear(x.to(self.dtype), rounded)


def many_at_once(optimizer, args, kwargs):
    """On CUDA an optimizer updates all tensors together, with temporaries of all of them."""
    for group in optimizer.param_groups:
        group["foreach"] = True


@contextlib.contextmanager
def counting(cuda: bool):
    """(Live, StandIn) of a run on CUDA, or on the CPU, while the block lasts."""
    live = Live()
    stand_in, hook = StandIn(cuda, live), contextlib.ExitStack()
    if cuda:
        hook.callback(register_optimizer_step_pre_hook(many_at_once).remove)
    with hook, patch.object(torch, "autocast", Mixed), live, stand_in:
        yield live, stand_in


def growth(live: Live, stand_in: StandIn, work) -> dict[str, int]:
    """What is live before `work`, and what it adds at its peak. Its first step has activations and
    no optimizer's state yet; at the second both are there. The rest is temporary, gradients too."""
    held = live.peak = live.now
    stand_in.marks.clear()
    work()
    first, *_, last = (stand_in.marks or [held]) * 2
    activations, optimizer = first - held, (stand_in.marks or [held])[-1] - first
    return {"weights": held, "activations": activations, "optimizer": optimizer,
            "temporaries": live.peak - held - activations - optimizer}


# ---- the parts of a run -------------------------------------------------------------------------

class Longest:
    """In place of data: batches of the longest sequences, in which every token is an answer's."""

    def __init__(self, cfg):
        self.batch: Batch = collate([Example([1] * cfg.max_len, 1)] * cfg.batch_size)

    def batches(self, steps: int, *_):
        return iter([self.batch] * steps)

    def __len__(self):
        return 1


class Copies(Wire):
    """One client's work, in place of every client's, and an upload of each; without a client (a
    server's process under torchrun) the uploads alone."""

    def round(self, t: int, payload: Payload, client, shards, chosen, expected) -> tuple:
        upload, metrics = expected, {"loss": 1.0}
        if client:
            upload, metrics = client.update(t, payload, shards[0], chosen[0])
        metrics |= {"loss": 1.0, "examples": 1}
        return {m: (copies(upload), metrics) for m in chosen}, [0], [0]


def copies(payload: Payload) -> Payload:
    return {name: t.clone() for name, t in payload.items()}


def a_server(config: ModelConfig, cfg, method):
    full = load_weights(cfg.ckpt, config, dtype=pick_dtype(cfg.dtype, cfg.device), device="meta")
    return method.Server(full, Longest(cfg), cfg)


def train(server, client, cfg):
    shards = [Longest(cfg)] * cfg.clients
    for _ in federate(server, client, shards, cfg, Copies()):
        pass


def evaluate(server, cfg):
    """The prompts' pass of each model, with the whole cache. Its batch is generate's own choice."""
    new = cfg.max_new_tokens or {"gsm8k": 256}.get(cfg.task, 512)
    length = cfg.max_len + SHOT * (cfg.shots if cfg.task != "rosetta" else 0)
    for lm in server.models().values():
        generate(lm, [[1] * length] * (cfg.eval_batch or 64), new, -1, cfg.eval_batch)


def process(config: ModelConfig, cfg, method, with_client: bool) -> list[dict[str, int]]:
    """The server's process, with the clients in it or not: what the bootstrap, the rounds and the
    evaluation need."""
    with counting(cfg.device == "cuda") as (live, stand_in):
        server, sent = a_server(config, cfg, method), []
        first = growth(live, stand_in, lambda: sent.append(server.bootstrap()))
        client = method.Client(sent[0], cfg, "meta") if with_client else None
        rounds = growth(live, stand_in, lambda: train(server, client, cfg))
        return [first, rounds, growth(live, stand_in, lambda: evaluate(server, cfg))]


def client_process(config: ModelConfig, cfg, method) -> dict[str, int]:
    """A client's process under torchrun: it holds what the bootstrap brought."""
    server = a_server(config, replace(cfg, align_init=0, align_steps=0), method)
    bootstrap, payload = server.bootstrap(), server.broadcast(0)
    with counting(cfg.device == "cuda") as (live, stand_in):
        client = method.Client(copies(bootstrap), cfg, "meta")
        return growth(live, stand_in, lambda: client.update(0, copies(payload), Longest(cfg), 0))


# ---- the counts ---------------------------------------------------------------------------------

def settings(config: ModelConfig, cfg) -> tuple[ModelConfig, object]:
    """The run's, with two steps of each kind in two rounds, on "cpu" or "cuda", for which a GPU need
    not be there."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    with expecting("a device such as cpu, cuda or auto", f"--device {cfg.device}"):
        device = torch.device(auto if cfg.device == "auto" else cfg.device).type
    few = {name: min(getattr(cfg, name), 2) for name in ("rounds", "local_steps", "align_init",
                                                         "align_steps")}
    config = config if config.vocab_size > 0 else replace(config, vocab_size=32000)     # LLaMA's
    return config, replace(cfg, device=device, **few)


def needed(config: ModelConfig, cfg, method) -> dict[str, int]:
    """Bytes at the peak of a `server`'s process, a `client`'s, and of `one_process` with both; what
    an `evaluation` adds to the server's weights; and of the steps that need most server_weights,
    server_activations (kept for the backward pass), …_optimizer, …_temporaries; client_… likewise.
    """
    config, cfg = settings(config, cfg)
    *steps, evaluation = process(config, cfg, method, with_client=False)
    parts = {"server": max(steps, key=total), "client": client_process(config, cfg, method)}
    uploads = (cfg.clients_per_round or cfg.clients) * payload_bytes(
        a_server(config, cfg, method).expected(0))
    counts = {"server": max(map(total, [*steps, evaluation])), "client": total(parts["client"]),
              "one_process": max(map(total, process(config, cfg, method, with_client=True))),
              "evaluation": total(evaluation) - evaluation["weights"], "uploads": uploads}
    return counts | {f"{side}_{name}": n for side in parts for name, n in parts[side].items()}


def total(parts: dict[str, int]) -> int:
    return sum(parts.values())
