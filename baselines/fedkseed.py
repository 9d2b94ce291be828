"""FedKSeed and FedKSeed-Pro: Qin et al., ICML 2024 (arXiv 2312.06353). Full-parameter tuning; seeds and scalars travel.

    w0      the checkpoint, which everyone holds        K     candidate seeds s_1..s_K, all from one master seed
    z(s)    ~ N(0, I), drawn again whenever needed      a     accumulator in R^K:  w = w0 - eta sum_j a_j z(s_j)
    g       (L(w + eps z) - L(w - eps z)) / 2 eps       tau, eta    local_steps, lr;  p  (Pro) how often s_j is drawn

A step walks the weights in place, so it needs an inference's memory and one parameter's noise. They are
the client's own fp32 copy: walked back they would be off by a rounding, and in one process the server
reads them too. Each round begins at `start`, replayed from w0 once for all clients of the process:
then a resumed run, and one in more processes, is bit for bit the run that was never stopped.
"""
import math
import random
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from fedbiot import SERVER, Payload, generator, linear_cross_entropy, lm_from, weights_of
from model import LM, UserError

CLIP = 1000.0           # of |g| in Pro's history


def candidates(master: int, K: int) -> list[int]:
    """K distinct seeds below 2^31, the same in every process."""
    return random.Random(master).sample(range(2**31), K)


@torch.no_grad()
def step_along(weights: list[Tensor], seed: int, scale: float):
    """w <- w + scale z(seed), in place. One private generator a draw, one whole parameter at a time, fp32."""
    rng = torch.Generator(weights[0].device).manual_seed(seed)
    for w in weights:
        w.add_(torch.randn(w.shape, generator=rng, device=w.device, dtype=torch.float32), alpha=scale)


def replay(weights: list[Tensor], a: Tensor, master: int, eta: float):
    """w0 -> w0 - eta sum_j a_j z(s_j), in place: exact for a constant eta without momentum or decay."""
    seeds = candidates(master, len(a))
    for j in tqdm(a.nonzero()[:, 0].tolist(), "replay", leave=False, disable=None):
        step_along(weights, seeds[j], -eta * a[j].item())


def fp32_copy(weights: Payload, device="cpu") -> LM:
    return lm_from({name: t if name == "config" else t.to(torch.float32, copy=True) for name, t in weights.items()},
                   device)


class Server:
    """Holds w0, the accumulator and, for Pro, what each seed's |g| has been."""

    def __init__(self, full: LM, public, cfg):
        self.full, self.cfg, self.metrics, self.pro = full, cfg, {}, cfg.method == "fedkseed-pro"
        K = cfg.kseed_candidates or (1024 if self.pro else 4096)
        self.state = {"seed": torch.randint(2**31 - 1, (1,), generator=generator(cfg.seed, 0, SERVER)).int(),
                      "a": torch.zeros(K), "on_gpu": torch.tensor(full.output.weight.is_cuda),
                      "total": torch.zeros(K), "count": torch.ones(K)}  # a history starts with one 0

    def bootstrap(self) -> Payload:
        return weights_of(self.full)

    def broadcast(self, t: int) -> Payload:
        payload = {"seed": self.state["seed"], "a": self.state["a"]}
        return payload | {"p": self.probabilities()} if self.pro else payload

    def probabilities(self) -> Tensor:
        """Pro: softmax of the min-max-normalised mean |g|; so max p / min p <= e. No importance correction."""
        m = self.state["total"] / self.state["count"]
        return torch.softmax((m - m.min()) / (m.max() - m.min()).clamp(min=1e-30), 0)

    def expected(self, t: int) -> Payload:
        return {"j": torch.zeros(self.cfg.local_steps).int(), "g": torch.zeros(self.cfg.local_steps)}

    def aggregate(self, t: int, uploads: list[Payload], weights: list[float]):
        """a_j <- a_j + sum_i lambda_i sum g, lambda_i = n_i / sum n over those who took part."""
        for upload, weight in zip(uploads, weights):
            j, g = upload["j"].long().cpu() % len(self.state["a"]), upload["g"].cpu()   # no index out of range
            self.state["a"].index_add_(0, j, g, alpha=weight / sum(weights))
            self.state["total"].index_add_(0, j, g.abs().clamp(max=CLIP))
            self.state["count"].index_add_(0, j, torch.ones_like(g))

    def models(self) -> dict[str, LM]:
        tuned = fp32_copy(weights_of(self.full), self.full.output.weight.device)
        replay(list(tuned.parameters()), self.state["a"], self.state["seed"].item(), self.cfg.lr)
        return {"base": self.full, "full": tuned}

    def state_dict(self) -> dict:
        return {"learnt": {name: t.clone() for name, t in self.state.items()}}

    def load_state_dict(self, state: dict):
        learnt = state["learnt"]
        if learnt["on_gpu"] != self.state["on_gpu"]:
            there, here = ("cuda", "cpu") if learnt["on_gpu"] else ("cpu", "cuda")
            raise UserError(f"--device {here}: this run drew its noise on {there}, and {here} draws other numbers from "
                            f"the same seeds; use --device {there}")
        self.state = {name: learnt[name].clone() for name in self.state}


class Client:
    """Walks along tau random directions; uploads which, and how far."""

    def __init__(self, bootstrap: Payload, cfg, device="cpu"):
        self.cfg, self.w0 = cfg, bootstrap
        self.lm = fp32_copy(bootstrap, device)
        self.w = list(self.lm.parameters())
        self.start, self.held = [p.clone() for p in self.w], torch.zeros(0)

    @torch.no_grad()
    def update(self, t: int, payload: Payload, examples, m: int) -> tuple[Payload, dict]:
        cfg, eps, tau, losses = self.cfg, self.cfg.kseed_eps, self.cfg.local_steps, []
        seeds = candidates(payload["seed"].item(), len(payload["a"]))
        self.restart(payload)
        p = payload["p"].cpu() if "p" in payload else torch.ones(len(seeds))
        j, g = torch.multinomial(p, tau, True, generator=generator(cfg.seed, t, m)), torch.zeros(tau)
        for k, batch in enumerate(examples.batches(tau, cfg.batch_size, (cfg.seed, t, m))):
            step_along(self.w, seeds[j[k]], eps)
            above = self.loss(batch)
            step_along(self.w, seeds[j[k]], -2 * eps)
            below = self.loss(batch)
            if math.isfinite(above - below):                            # else the step moves nothing, here and in a replay
                g[k] = (above - below) / (2 * eps)
                losses.append((above + below) / 2)
            step_along(self.w, seeds[j[k]], eps - cfg.lr * g[k].item())  # back, and w <- w - eta g z, in one pass
        if len(losses) < tau:
            print(f"note: round {t + 1}, client {m}: {tau - len(losses)} of {tau} steps had no finite loss and moved "
                  f"nothing", file=sys.stderr)
        if not losses:
            raise UserError(f"round {t + 1}, client {m}: no step had a finite loss; try a smaller --lr")
        return {"j": j.int(), "g": g}, {"loss": sum(losses) / len(losses)}

    def restart(self, payload: Payload):
        """The round's weights into `w`: the accumulator replayed from w0, by whoever joins and whenever."""
        if not torch.equal(payload["a"].cpu(), self.held):
            for p, (name, _) in zip(self.start, self.lm.named_parameters()):
                p.copy_(self.w0[name])
            replay(self.start, payload["a"].cpu(), payload["seed"].item(), self.cfg.lr)
            self.held = payload["a"].cpu().clone()
        for p, start in zip(self.w, self.start):
            p.copy_(start)

    def loss(self, batch) -> float:
        batch = batch.to(self.w[0].device)
        h = self.lm.hidden(batch.tokens, rows=batch.rows)                    # (N, D)
        return linear_cross_entropy(h, self.lm.output.weight, batch.targets, batch.weights).item()
