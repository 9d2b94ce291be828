"""FedTT and FedTT+: Ghiasvand et al., Findings of ACL 2025 (arXiv 2410.13097). Tensor-train adapters in every block.

    W (M, N) = G_1 G_2 ... G_J      J cores G_j (r_{j-1}, k_j, r_j) over the factors of M, then of N; r_0 = r_J = 1
    adapter     h + up(relu(down(h))), d -> bottleneck -> d, after attention and after the feed-forward
    FedTT       clients tune all cores, the server averages core by core: mean(G_1) mean(G_2) is not mean(G_1 G_2)
    FedTT+      one core of each W is tuned in a round: W is linear in it, so the average of cores is that of W

At rank 5, 4096 -> 64 is 1,100 parameters. The layer is LoRETTA's, of the same authors' group.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import fedavg
from fedbiot import Payload
from model import LM, Block


def factors(d: int) -> list[int]:
    """d as three balanced integers: 4096 -> 16, 16, 16; 128 -> 4, 4, 8."""
    triples = [(a, b, d // (a * b)) for a in range(1, round(d ** (1 / 3)) + 1) if d % a == 0
               for b in range(a, math.isqrt(d // a) + 1) if d // a % b == 0]
    return list(min(triples, key=sum))


def core_shapes(d_in: int, d_out: int, rank: int) -> list[tuple[int, int, int]]:
    k = factors(d_in) + factors(d_out)
    r = [1] + [rank] * (len(k) - 1) + [1]
    return [(r[j], k[j], r[j + 1]) for j in range(len(k))]


def sizes(d: int, cfg) -> tuple[int, int]:
    """Parameters of a block's two adapters: cores, biases."""
    shapes = core_shapes(d, cfg.tt_bottleneck, cfg.tt_rank) + core_shapes(cfg.tt_bottleneck, d, cfg.tt_rank)
    return 2 * sum(map(math.prod, shapes)), 2 * (cfg.tt_bottleneck + d) * cfg.tt_bias


class TTLinear(nn.Module):
    """y = x W (+ b), W (d_in, d_out) made from its cores: exact, and no slower at these sizes. Cores stay fp32."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool, rng, device):
        super().__init__()
        shapes = core_shapes(d_in, d_out, rank)
        # PAPER SILENT: normal cores such that Var W = 1 / d_in; an entry of W sums rank^(J-1) products of J
        std = (d_in * float(rank) ** (len(shapes) - 1)) ** (-0.5 / len(shapes))
        self.cores = nn.ParameterList(torch.randn(shape, generator=rng).mul_(std).to(device) for shape in shapes)
        self.bias = nn.Parameter(torch.zeros(d_out, device=device)) if bias else None
        self.shape = d_in, d_out

    def matrix(self) -> Tensor:
        W = self.cores[0]                                               # (1, k_1, r_1)
        for core in list(self.cores)[1:]:
            W = torch.tensordot(W, core, 1)                             # (1, k_1, ..., k_j, r_j)
        return W.reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:                             # (..., d_in) -> (..., d_out)
        y = x @ self.matrix().to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Adapter(nn.Module):
    """h + up(relu(down(h))). The last core of `up` is zero, so it starts as the identity."""

    def __init__(self, d: int, cfg, rng, device):
        super().__init__()
        # PAPER SILENT: the activation; ReLU, as in the library
        self.down = TTLinear(d, cfg.tt_bottleneck, cfg.tt_rank, cfg.tt_bias, rng, device)
        self.up = TTLinear(cfg.tt_bottleneck, d, cfg.tt_rank, cfg.tt_bias, rng, device)
        nn.init.zeros_(self.up.cores[-1])

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(F.relu(self.down(h)))


class TTBlock(nn.Module):
    """A Block with an adapter after its attention and after its feed-forward, before each residual sum."""

    def __init__(self, block: Block, d: int, cfg, rng, device):
        super().__init__()
        self.block = block                                              # shared with the full model, frozen
        self.after_attention = Adapter(d, cfg, rng, device)
        self.after_feed_forward = Adapter(d, cfg, rng, device)

    def forward(self, x: Tensor, rope: Tensor, past=None, rows=None) -> Tensor:
        b = self.block
        x = x + self.after_attention(b.attention(b.attention_norm(x), rope, past))
        if rows is not None:
            x = x.flatten(0, 1)[rows]
        return x + self.after_feed_forward(b.feed_forward(b.ffn_norm(x)))


def adapted(lm: LM, cfg, rng) -> tuple[LM, dict[str, Tensor]]:
    """The model with two adapters a block around `lm`'s tensors, and the adapters' tensors by name."""
    device = lm.output.weight.device
    twin = lm.with_layers({int(i): TTBlock(block, lm.config.dim, cfg, rng, device) for i, block in lm.layers.items()})
    return twin.requires_grad_(False), {name: p for name, p in twin.named_parameters() if ".after_" in name}


def active(tensors: Payload, t: int) -> Payload:
    """What FedTT+ tunes in round t: one core of each W (and the biases).

    PAPER SILENT: which; round-robin from the last core, since at the start the zero core of `up`
    is the only one with a gradient.
    """
    J = 1 + max(int(name.rsplit(".", 1)[1]) for name in tensors if ".cores." in name)
    return {name: p for name, p in tensors.items() if ".cores." not in name or name.endswith(f".{(J - 1 - t) % J}")}


class Server(fedavg.Server):
    adapted = staticmethod(adapted)

    def __init__(self, full: LM, public, cfg):
        super().__init__(full, public, cfg)                             # FedTT+: tuned changes, learnt is all
        self.plus = cfg.method == "fedtt+"

    def bootstrap(self) -> Payload:
        """FedTT+ sends later what changed, so whoever joins, or joins again, starts from all cores."""
        cores = {name: p.detach().clone() for name, p in self.learnt.items()}
        return super().bootstrap() | (cores if self.plus else {})

    def broadcast(self, t: int) -> Payload:
        """FedTT+: the cores that the last round moved; all, if some clients may have been absent."""
        sent = self.learnt
        if self.plus:
            self.tuned = active(self.learnt, t)
            some_absent = self.cfg.clients_per_round or self.cfg.client_timeout
            sent = self.learnt if some_absent else active(self.learnt, t - 1)
        return {name: p.detach() for name, p in sent.items()}


class Client(fedavg.Client):
    adapted = staticmethod(adapted)

    def __init__(self, bootstrap: Payload, cfg, device="cpu"):
        self.held = {name: p.clone() for name, p in bootstrap.items() if ".after_" in name}     # as last sent
        super().__init__({name: p for name, p in bootstrap.items() if name not in self.held}, cfg, device)

    def update(self, t: int, payload: Payload, examples, m: int) -> tuple[Payload, dict]:
        """AdamW on this round's cores, from what the server last sent."""
        self.held |= {name: p.clone() for name, p in payload.items()}
        self.tuned = active(self.received, t) if self.cfg.method == "fedtt+" else self.received
        for name, p in self.received.items():
            p.requires_grad_(name in self.tuned)
        return super().update(t, self.held, examples, m)
