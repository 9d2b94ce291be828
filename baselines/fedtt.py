"""FedTT and FedTT+: Ghiasvand et al., Findings of ACL 2025 (arXiv 2410.13097).

    W (M, N) = G_1 G_2 ... G_J      J cores G_j (r_{j-1}, k_j, r_j) over the factors of M, then of N
    adapter     h + up(relu(down(h))), d -> bottleneck -> d, after attention and after feed-forward
    FedTT       clients tune all cores, the server averages each: mean(G_1) mean(G_2) is not the
                mean of G_1 G_2
    FedTT+      one core of each W is tuned in a round: W is linear in it, so the average is exact

At rank 5, 4096 -> 64 is 1,100 parameters. The layer is LoRETTA's, of the same authors' group.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import fedavg
from fedbiot import Payload, detached, option
from lora import twin_blocks
from model import LM, UserError

J = 6                   # cores of a W: three factors of each side


def factors(d: int) -> list[int]:
    """d as three balanced integers: 4096 -> 16, 16, 16; 128 -> 4, 4, 8."""
    small = range(1, math.isqrt(d) + 1)
    triples = [(a, b, d // (a * b)) for a in small for b in small if d % (a * b) == 0]
    return sorted(min(triples, key=sum))


def core_shapes(d_in: int, d_out: int, rank: int) -> list[tuple[int, int, int]]:
    r = [1] + [rank] * (J - 1) + [1]
    return [*zip(r, factors(d_in) + factors(d_out), r[1:])]


class TTLinear(nn.Module):
    """y = x W (+ b), W (d_in, d_out) made from its cores: exact, and no slower at these sizes."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool, rng):
        super().__init__()
        # PAPER SILENT: normal cores such that Var W = 1 / d_in; W sums rank^(J-1) products of J
        std = (d_in * float(rank) ** (J - 1)) ** (-0.5 / J)
        cores = [torch.randn(s, generator=rng) * std for s in core_shapes(d_in, d_out, rank)]
        self.cores = nn.ParameterList(cores)                        # fp32, whatever the model is
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.shape = d_in, d_out

    def matrix(self) -> Tensor:
        W, *others = self.cores                                         # (1, k_1, r_1)
        for core in others:
            W = torch.tensordot(W, core, 1)                             # (1, k_1, ..., k_j, r_j)
        return W.reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:                         # (..., d_in) -> (..., d_out)
        y = x @ self.matrix().to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Adapted(nn.Module):
    """A block's attention or feed-forward, frozen, and the adapter behind it, before the residual
    sum. The last core of `up` is zero, so that it starts as the identity."""

    def __init__(self, inner: nn.Module, d: int, cfg, rng):
        super().__init__()
        self.inner = inner
        self.down = TTLinear(d, cfg.tt_bottleneck, cfg.tt_rank, cfg.tt_bias, rng)
        self.up = TTLinear(cfg.tt_bottleneck, d, cfg.tt_rank, cfg.tt_bias, rng)
        nn.init.zeros_(self.up.cores[-1])

    def forward(self, x: Tensor, *where) -> Tensor:                 # where: attention's rope, past
        h = self.inner(x, *where)
        # PAPER SILENT: the activation; ReLU, as in the library
        return h + self.up(F.relu(self.down(h)))


def adapted(lm: LM, cfg, rng) -> tuple[LM, dict[str, Tensor]]:
    """The model with two adapters a block around `lm`'s tensors, and what is theirs by name."""
    twins, d = twin_blocks(lm), lm.config.dim
    for twin in twins.values():
        twin.attention = Adapted(twin.attention, d, cfg, rng)
        twin.feed_forward = Adapted(twin.feed_forward, d, cfg, rng)
    lm = lm.with_layers(twins).to(lm.output.weight.device).requires_grad_(False)
    return lm, {n: p for n, p in lm.named_parameters() if ".down." in n or ".up." in n}


def active(tensors: Payload, t: int, cfg) -> Payload:
    """What is tuned in round t: all; in FedTT+ one core of each W (and the biases).

    PAPER SILENT: which; round-robin from the last core, since at the start the zero core of `up`
    is the only one with a gradient.
    """
    now = f".cores.{(J - 1 - t) % J}"
    return {name: p for name, p in tensors.items()
            if cfg.method == "fedtt" or ".cores." not in name or name.endswith(now)}


def fingerprint(cores: Payload) -> Tensor:
    """The sum of the cores' bits, int64 (1,): the same whatever the device and the order."""
    bits = [core.view(torch.int32).sum(dtype=torch.int64) for core in cores.values()]
    return torch.stack(bits).sum()[None]


@dataclass(frozen=True)
class Flags:
    tt_rank: int = option(5, "FedTT: rank of the tensor trains", least=1, most=1024)
    tt_bottleneck: int = option(64, "FedTT: width inside an adapter", least=1, most=2**16)
    tt_bias: bool = option(False, "FedTT: biases in the adapters")


class Server(fedavg.Server):
    """FedTT+ sends the cores that the last round changed, and a fingerprint of all cores, from
    which a client without the earlier rounds sees that it has a gap."""

    Flags, period = Flags, J
    no_use = fedavg.Server.no_use | {"rank", "alpha", "init_lora"}
    adapted = staticmethod(adapted)

    def bootstrap(self) -> Payload:
        """All cores too: a client that starts, or starts again, needs them all."""
        return super().bootstrap() | {name: p.detach().clone() for name, p in self.learnt.items()}

    def broadcast(self, t: int) -> Payload:
        """FedTT: all. FedTT+: all if some clients may have been absent, else what changed."""
        self.tuned = active(self.learnt, t, self.cfg)
        some_absent = self.cfg.clients_per_round or self.cfg.client_timeout
        if self.cfg.method == "fedtt" or some_absent:
            return detached(self.learnt)
        return detached(active(self.learnt, t - 1, self.cfg)) | {"all": fingerprint(self.learnt)}


class Client(fedavg.Client):
    """FedTT+'s keeps the cores that it was sent, since later rounds send only what changed."""

    adapted = staticmethod(adapted)

    def __init__(self, bootstrap: Payload, cfg, device="cpu"):
        super().__init__(bootstrap, cfg, device)
        self.held = {name: bootstrap[name] for name in self.received}

    def update(self, t: int, payload: Payload, examples, m: int) -> tuple[Payload, dict]:
        """AdamW on this round's cores, from what the server last sent."""
        self.held |= {name: p.clone() for name, p in payload.items() if name != "all"}
        if "all" in payload and fingerprint(self.held).cpu() != payload["all"].cpu():
            raise UserError(f"round {t + 1}, client {m}: lacks what an earlier round sent; start "
                            f"it from a new bootstrap")
        self.tuned = active(self.received, t, self.cfg)
        for name, p in self.received.items():
            p.requires_grad_(name in self.tuned)
        return super().update(t, self.held, examples, m)
