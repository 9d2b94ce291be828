"""FedKSeed and FedKSeed-Pro: Qin et al., ICML 2024 (arXiv 2312.06353): seeds and scalars travel.

    w0      the checkpoint, which everyone holds; all of it is tuned
    z(s)    ~ N(0, I), drawn anew whenever needed; s_1..s_K, the candidates, from one master seed
    g, a    (L(w + eps z) - L(w - eps z)) / 2 eps;  accumulator: w = w0 - eta sum_j a_j z(s_j)
    p       Pro: how often s_j is drawn;  tau, eta: local_steps, lr

A client updates an fp32 copy in place, so a step needs an inference's memory and one parameter's
noise. Each round begins at `start`, replayed from w0 once for all clients of a process: so on the
CPU a run that was resumed, or has more processes, is bit for bit the one never stopped. Two fp32
copies at a time: `start`, and one that is updated or evaluated. The host reads g once, at the end.
"""
import math
import random
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from baselines import fedavg
from fedbiot import (SERVER, Payload, generator, linear_cross_entropy, lm_from, option,
                     weights_of)
from model import LM, UserError

CLIP = 1000.0           # of |g| in Pro's history


def candidates(master: int, K: int) -> list[int]:
    """K distinct seeds below 2^31, the same in every process."""
    return random.Random(master).sample(range(2**31), K)


@torch.no_grad()
def step_along(weights: list[Tensor], seed: int, scale: float | Tensor):
    """w <- w + scale z(seed), in place: a generator of its own, one whole parameter at a time. A
    scale that is a tensor () of the weights' device is not read; on the CPU the bits are equal."""
    device = weights[0].device
    rng = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
    for w in weights:
        z = torch.randn(w.shape, generator=rng, device=device, dtype=torch.float32)
        if torch.is_tensor(scale):
            w.addcmul_(z, scale.float())
        else:
            w.add_(z, alpha=scale)


def replay(weights: list[Tensor], a: Tensor, master: int, eta: float):
    """w0 -> w0 - eta sum_j a_j z(s_j), in place: exact for a constant eta and no momentum."""
    seeds = candidates(master, len(a))
    for j in tqdm(a.nonzero()[:, 0].tolist(), "replay", leave=False, disable=None):
        step_along(weights, seeds[j], -eta * a[j].item())


def fp32_copy(weights: Payload, device) -> LM:
    """The model, to be updated in place: in one process the given tensors are the server's own."""
    copies = {name: t.to(device, torch.float32, copy=True) for name, t in weights.items()
              if name != "config"}
    return lm_from(copies | {"config": weights["config"]}, device)


@dataclass(frozen=True)
class Flags:
    kseed_candidates: int = option(4096, "FedKSeed: candidate seeds (K); Pro 1024", least=1)
    kseed_eps: float = option(5e-4, "FedKSeed: step of the two-point gradient (epsilon)",
                              least=1e-9)


class Server(fedavg.Server):
    """Holds w0, the accumulator and, for Pro, what each seed's |g| has been."""

    Flags = Flags
    no_use = fedavg.Server.no_use | {"rank", "alpha", "init_lora"}

    @staticmethod
    def defaults(method: str, bundled: bool) -> dict:
        return {"local_steps": 200, "lr": 1e-3 if bundled else 3e-7,
                "kseed_candidates": 1024 if method == "fedkseed-pro" else 4096}

    def __init__(self, full: LM, public, cfg):
        self.full, self.cfg, K = full, cfg, cfg.kseed_candidates
        self.adapter = list(range(full.config.n_layers))
        master = torch.randint(2**31 - 1, (1,), generator=generator(cfg.seed, 0, SERVER)).int()
        self.learnt = {"seed": master, "a": torch.zeros(K),
                       "total": torch.zeros(K), "count": torch.ones(K),  # a history starts with a 0
                       "on_gpu": torch.tensor(full.output.weight.is_cuda)}

    def broadcast(self, t: int) -> Payload:
        """Pro's p: softmax of the min-max-normalised mean |g|, so max p / min p <= e."""
        payload = {name: self.learnt[name].clone() for name in ("seed", "a")}
        if self.cfg.method == "fedkseed-pro":
            m = self.learnt["total"] / self.learnt["count"]
            payload["p"] = torch.softmax((m - m.min()) / (m.max() - m.min()).clamp(min=1e-30), 0)
        return payload

    def expected(self, t: int) -> Payload:
        tau = self.cfg.local_steps
        return {"j": torch.zeros(tau).int(), "g": torch.zeros(tau)}

    def aggregate(self, t: int, uploads: list[Payload], weights: list[float]) -> dict:
        """a_j <- a_j + sum_i lambda_i sum g, lambda_i = n_i / sum n over those who took part."""
        a, total, count = (self.learnt[name] for name in ("a", "total", "count"))
        for upload, weight in zip(uploads, weights):
            j, g = upload["j"].long().cpu() % len(a), upload["g"].cpu()     # no index out of range
            a.index_add_(0, j, g, alpha=weight / sum(weights))
            total.index_add_(0, j, g.abs().clamp(max=CLIP))
            count.index_add_(0, j, torch.ones_like(g))
        return {}

    def models(self) -> dict[str, LM]:
        tuned = fp32_copy(weights_of(self.full), self.full.output.weight.device)
        replay([*tuned.parameters()], self.learnt["a"], self.learnt["seed"].item(), self.cfg.lr)
        return {"base": self.full, "full": tuned}

    def load_state_dict(self, state: dict):
        there, here = ("cuda" if x["on_gpu"] else "cpu" for x in (state["learnt"], self.learnt))
        if there != here:
            raise UserError(f"--device {here}: use {there}, where this run drew its noise; {here} "
                            f"draws other numbers from the same seeds")
        super().load_state_dict(state)


class Client:
    """Takes tau steps along random directions; uploads which, and how far along each."""

    def __init__(self, bootstrap: Payload, cfg, device="cpu"):
        self.cfg, self.given = cfg, lm_from(bootstrap, device)
        self.start, self.held = fp32_copy(bootstrap, device), torch.zeros(0)
        self.tuned = dict(self.start.named_parameters())

    @torch.no_grad()
    def update(self, t: int, payload: Payload, examples, m: int) -> tuple[Payload, dict]:
        cfg, tau = self.cfg, self.cfg.local_steps
        seeds = candidates(payload["seed"].item(), len(payload["a"]))
        p = payload.get("p", torch.ones(len(seeds))).cpu()
        j = torch.multinomial(p, tau, True, generator=generator(cfg.seed, t, m))
        self.restart(payload)
        lm = fp32_copy(weights_of(self.start), self.start.output.weight.device)
        batches = examples.batches(tau, cfg.batch_size, (cfg.seed, t, m))
        found = [self.step(lm, seeds[j[k]], batch) for k, batch in enumerate(batches)]
        g, losses = torch.stack([torch.stack(pair) for pair in found]).cpu().T     # fp64, (tau,)
        losses = [loss for loss in losses.tolist() if math.isfinite(loss)]
        if len(losses) < tau:
            print(f"note: round {t + 1}, client {m}: {tau - len(losses)} of {tau} steps had no "
                  f"finite loss and changed nothing", file=sys.stderr)
        loss = sum(losses) / len(losses) if losses else math.nan        # NaN: `accepted` says so
        return {"j": j.int(), "g": g.float()}, {"loss": loss}

    def step(self, lm: LM, seed: int, batch) -> tuple[Tensor, Tensor]:
        """A step of `lm`'s weights along z(seed), in place: (g, the mean of the two losses), fp64
        numbers on their device; g is rounded to fp32, as it is sent. Losses that are not finite
        are a step of 0, here and in every replay."""
        eps, w = self.cfg.kseed_eps, [*lm.parameters()]
        step_along(w, seed, eps)
        above = self.loss(lm, batch)
        step_along(w, seed, -2 * eps)
        below = self.loss(lm, batch)
        apart = above - below
        g = torch.where(apart.isfinite(), apart / (2 * eps), 0.0).float().double()
        step_along(w, seed, eps - self.cfg.lr * g)                      # back, and - eta g z
        return g, (above + below) / 2

    def restart(self, payload: Payload):
        """The round's weights into `start`: the accumulator replayed from w0, whenever one joins.
        """
        a = payload["a"].cpu()
        if not torch.equal(a, self.held):
            self.start.load_state_dict(self.given.state_dict())         # copied, to fp32
            replay([*self.start.parameters()], a, payload["seed"].item(), self.cfg.lr)
            self.held = a

    def macs_per_token(self) -> int:
        """Two forward passes and no backward, over the matrices of all layers."""
        layers = self.start.layers
        return 2 * sum(p.numel() for n, p in layers.named_parameters() if "norm" not in n)

    def loss(self, lm: LM, batch) -> Tensor:
        """Eq. 1 at `lm`, an fp64 number () on its device."""
        batch = batch.to(lm.output.weight.device)
        h = lm.hidden(batch.tokens, rows=batch.rows)                        # (N, D)
        loss = linear_cross_entropy(h, lm.output.weight, batch.targets, batch.weights)
        return loss.double()
