"""FedBiOT: Wu, Li, Li, Ding, Gao, KDD 2024 (doi 10.1145/3637528.3671897).

Read from the end: `federate` is Algorithm 2.

    layer_extract            Algorithm 1      which layers the emulator keeps, which are the adapter
    linear_cross_entropy     Eq. 6  (F_m)     the client's loss on response tokens
    proximal                 Eq. 8-10         the client's epsilon-term, on reconstructed matrices
    linear_kl, Server.align  Eq. 3-5, 7       L2 at the adapter's input + lambda KL of the outputs
    Client.update            Algorithm 2, 8-15    K local steps on the adapter's LoRA
    Server.aggregate         Eq. 11, line 16  weighted average
    Server, Client, Wire, accepted, federate  the protocol that every method here shares

E* = the original layers that the emulator E stands for (they stay at the server); A = adapter.
"""
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from statistics import mean, median_low

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lora import add_lora, copy_into, lora_tensors
from model import LM, ModelConfig, UserError

Payload = dict[str, Tensor]
SERVER = 1 << 20            # stands for the server where randomness asks for a client's number


def option(default, text, **extra):
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class Config:
    """What the algorithm needs to know. train.py adds its own and makes flags of it."""
    dropout: Fraction = option(Fraction("0.2"), "share of layers below the adapter to drop (beta)")
    adapter: int = option(2, "layers of the adapter (s)")
    rounds: int = option(500, "communication rounds (R)")
    local_steps: int = option(30, "steps of a client in a round (K)")
    batch_size: int = option(10, "examples a step, clients and server")
    align_init: int = option(500, "alignment steps before the first round")
    align_steps: int = option(10, "alignment steps between rounds (E)")
    lr: float = option(1e-4, "learning rate of the clients (eta); the paper searches 1e-5..1e-4")
    server_lr: float = option(1e-4, "learning rate of the alignment")
    # PAPER SILENT: lambda and epsilon come from a grid search whose result is not given.
    kl_weight: float = option(1.0, "weight of the KL in the alignment (lambda)")
    prox: float = option(0.01, "weight of the clients' pull towards what was broadcast (epsilon)")
    rank: int = option(8, "LoRA rank")
    alpha: float = option(16.0, "LoRA alpha")
    clients_per_round: int = option(0, "clients that take part in a round (0: all)")
    align_norm: str = option("rms", "divide the L2 by the teacher's mean square, or not",
                             choices=("rms", "none"))
    align_tokens: str = option("answer", "tokens to align on: the answer's, or all, padding too",
                               choices=("answer", "all"))
    align_renew: bool = option(False, "a new alignment optimizer every round (authors' code)")
    max_update_norm: float = option(10.0, "reject an upload that moved this many times further "
                                          "than the round's median (0: none)")
    client_timeout: float = option(0.0, "seconds after which a round goes on without a client's "
                                        "upload (0: it waits); for torchrun")
    uniform_weights: bool = option(False, "average uploads uniformly, as in the authors' code")
    seed: int = option(0, "seed of everything")


# ---- Algorithm 1 --------------------------------------------------------------------------------

def layer_extract(n: int, s: int, beta: Fraction) -> tuple[list[int], list[int]]:
    """Algorithm 1: (emulator's layers, adapter's layers), 0-based indices of the model's n layers.

    DIFFERS: the paper's line 2 reads n' = floor(beta (n - s)); its own Table 5 needs (1 - beta).
    In integers and fractions throughout: floats lose a layer at n - s = 16, n' = 14.
    """
    if not 1 <= s < n:
        raise UserError(f"--adapter {s}: the model has {n} layers, so choose 1..{n - 1}")
    if not 0 <= beta < 1:
        raise UserError(f"--dropout {float(beta):g}: expected a share in [0, 1), for example 0.2")
    kept = int((1 - Fraction(beta)) * (n - s))                          # floor: both are >= 0
    if kept == 0:
        raise UserError(f"--dropout {float(beta):g}: leaves no layer of the {n - s} below the "
                        f"adapter; at most {float(1 - Fraction(1, n - s)):.4g} keeps one")
    return spread(n - s, kept), list(range(n - s, n))


def spread(total: int, kept: int) -> list[int]:
    """`kept` of the layers 0..total-1, evenly, first and last included.  ABLATE: layer choice"""
    return [j * (total - 1) // max(kept - 1, 1) for j in range(kept)]


# ---- losses -------------------------------------------------------------------------------------
# The head W is frozen, so the gradient with respect to the hidden states can be made in the forward
# pass: no (N, V) tensor ever exists, and backward is one multiplication. A matrix product wants
# many rows at a time, a chunk; what is done to its logits in fp32 wants few, a slice that stays in
# a CPU's cache.

def chunks(h: Tensor, W: Tensor) -> list[slice]:
    """Rows of h (N, D) by chunks whose fp32 logits would take 32 MB on the CPU, 512 MB on a GPU."""
    budget, least = (2**25, 32) if h.device.type == "cpu" else (2**29, 1024)
    size = max(budget // (4 * len(W)), least)
    return [slice(a, min(a + size, len(h))) for a in range(0, len(h), size)]


def slices(*tensors: Tensor):
    """The same rows of every tensor (n, ...): 4 MB of the first in fp32; on a GPU all of them."""
    n, V = tensors[0].shape
    return zip(*(t.split(max(2**20 // V, 1) if t.device.type == "cpu" else n) for t in tensors))


def project(h: Tensor, W: Tensor) -> Tensor:
    """h (n, D) times W (V, D) transposed: logits (n, V), in fp32 where the product can give it."""
    if h.is_cuda and h.dtype != torch.float32:
        return torch.mm(h, W.T, out_dtype=torch.float32)
    return h @ W.T


def cross_entropy_rows(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits z (n, V) fp32, overwritten, and targets y (n, 1): the losses (n, 1) and their
    gradients p - one-hot."""
    top, true = z.amax(-1, keepdim=True), z.gather(-1, y)
    p = torch.softmax(z, -1, out=z)
    lse = top - p.amax(-1, keepdim=True).log()                          # exact: max p >= 1 / V
    return lse - true, p.scatter_add_(-1, y, -torch.ones_like(true))    # in fp32, before any cast


def kl_rows(t: Tensor, delta: Tensor, careful: bool) -> tuple[Tensor, Tensor]:
    """Teacher's logits t (n, V) fp32 and student's minus teacher's, both overwritten: KL (n, 1)
    and p_s - p_t.

    Close softmaxes lose their digits when subtracted. With c = lse_s - lse_t, log p_s - log p_t is
    delta - c, so p_s - p_t = (p_s + p_t) tanh((delta - c) / 2) keeps them; the rows' sums, 0 but
    for c's rounding, correct c.
    """
    t -= t.amax(-1, keepdim=True)
    s = t + delta
    top = s.amax(-1, keepdim=True)
    p_t, p_s = torch.softmax(t, -1, out=t), torch.softmax(s, -1, out=s)
    c = top - p_s.amax(-1, keepdim=True).log() + p_t.amax(-1, keepdim=True).log()
    if not careful:                                         # a bf16 gradient has no use for them
        return c - delta.mul_(p_t).sum(-1, keepdim=True), p_s.sub_(p_t)
    kl = c - (delta * p_t).sum(-1, keepdim=True)
    gradient = p_s.add_(p_t).mul_(delta.sub_(c).mul_(0.5).tanh_())
    astray = gradient.sum(-1, keepdim=True)
    return kl + astray, gradient.addcmul_(p_t, astray, value=-1)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, targets, weights, needs_grad):
        loss, dh = weights.new_zeros(()), torch.empty_like(h) if needs_grad else None
        for rows in chunks(h, W):
            w = weights[rows, None]                                     # (n, 1)
            logits = project(torch.where(w != 0, h[rows], 0), W)        # (n, V)
            for z, y, w_z in slices(logits, targets[rows, None], w):
                each, gradient = cross_entropy_rows(z.float(), y)
                loss += (w_z * each).sum()
                z.copy_(gradient)
            if needs_grad:
                dh[rows] = w * (logits.to(W.dtype) @ W)
            del logits, z, gradient     # before the next chunk's are made; in fp32 all are one
        ctx.save_for_backward(dh)
        return loss

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g.to(ctx.saved_tensors[0].dtype), None, None, None, None


class LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_student, h_teacher, W, weights, needs_grad, offset):
        loss, dh = weights.new_zeros(()), torch.empty_like(h_student) if needs_grad else None
        for rows in chunks(h_student, W):
            w = weights[rows, None]                                     # (n, 1)
            h_t = torch.where(w != 0, h_teacher[rows], 0)
            apart = torch.where(w != 0, h_student[rows], 0).float() - h_t.float()
            teacher, apart = project(h_t, W), project(apart.to(W.dtype), W)         # (n, V), logits
            if offset is not None:
                more = torch.where(w != 0, offset[rows], 0).float()
                teacher, apart = teacher + more, apart - more           # fp32
            for t, delta, w_t in slices(teacher, apart, w):
                each, gradient = kl_rows(t.float(), delta.float(), W.dtype == torch.float32)
                loss += (w_t * each).sum()
                delta.copy_(gradient)
            if needs_grad:
                dh[rows] = w * (apart.to(W.dtype) @ W)
            del teacher, apart, t, delta                        # before the next chunk's are made
        ctx.save_for_backward(dh)
        return loss

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g.to(ctx.saved_tensors[0].dtype), None, None, None, None, None


def linear_cross_entropy(h: Tensor, W: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i * cross_entropy(W h_i, y_i): a scalar, fp32. Eq. 6.

    h (N, D) after the final norm, W (V, D) the frozen head (it gets no gradient), targets (N,)
    int64, weights (N,) fp32; a row of weight 0 is ignored, whatever it holds.
    """
    needs_grad = torch.is_grad_enabled() and h.requires_grad
    return LinearCrossEntropy.apply(h, W, targets, weights, needs_grad)


def linear_kl(h_student: Tensor, h_teacher: Tensor, W: Tensor, weights: Tensor,
              offset=None) -> Tensor:
    """sum_i w_i * KL(softmax(W h_teacher_i) || softmax(W h_student_i)): a scalar, fp32. Eq. 5.

    h_* (N, D), W (V, D) frozen, weights (N,) fp32, 0 = ignored. Gradient for h_student only. The
    two logits' difference is W (h_s - h_t), so that bf16 rounds the *disagreement*: near agreement
    the gradient of two separately rounded softmaxes is noise. `offset` (N, V), where there is one,
    is added to the teacher's logits (FedPT's black box; not for FedBiOT).
    """
    needs_grad = torch.is_grad_enabled() and h_student.requires_grad
    return LinearKL.apply(h_student, h_teacher.detach(), W, weights, needs_grad, offset)


def proximal(pairs, scale: float) -> Tensor:
    """Eq. 9: sum over (B, A, B0, A0) of ||scale (B A - B0 A0)||^2, a scalar, fp32.

    B (d_out, r), A (r, d_in). BA - B0A0 = [B - B0, B0] [A; A - A0] = L R, and ||L R||^2 is the sum
    of (L^T L) * (R R^T): no d x d matrix, and exact for deltas too small for B A - B0 A0 in fp32.
    """
    total = 0.0
    for B, A, B0, A0 in pairs:
        L, R = torch.cat((B - B0, B0), 1), torch.cat((A, A - A0), 0)    # (d_out, 2r), (2r, d_in)
        total = total + ((L.T @ L) * (R @ R.T)).sum()
    return scale**2 * total


# ---- Algorithm 2 --------------------------------------------------------------------------------

def generator(*key: int) -> torch.Generator:
    """Randomness is a function of (seed, round, client, ...): nothing to save, nothing shared."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def weights_of(lm: LM) -> Payload:
    """The frozen tensors of a model (no LoRA) by name, and its configuration as JSON bytes."""
    payload = {name: p.detach() for name, p in lm.named_parameters() if ".lora_" not in name}
    config = json.dumps(asdict(lm.config)).encode()
    return payload | {"config": torch.frombuffer(bytearray(config), dtype=torch.uint8)}


def lm_from(payload: Payload, device="cpu") -> LM:
    """The model that `weights_of` described, around the payload's tensors: they are not copied.
    What else a method has put into the payload is left to its client."""
    config = ModelConfig(**json.loads(bytes(payload["config"].tolist())))
    with torch.device("meta"):
        lm = LM.empty(config, {int(n.split(".")[1]) for n in payload if n.startswith("layers.")})
    return lm.take({name: payload[name].to(device) for name in lm.state_dict() if name in payload})


def adapter_input_and_output(lm: LM, tokens: Tensor, rows: Tensor, first: int):
    """What enters layer `first` and what the head reads, at `rows` (N,) of tokens (B, T):
    (N, D) twice."""
    x = lm.tok_embeddings(tokens)
    rope = lm.rope(torch.arange(tokens.shape[1], device=tokens.device))
    *_, last = lm.layers
    for i, block in lm.layers.items():
        if int(i) == first:
            entered = x.flatten(0, 1)[rows]
        x = block(x, rope, rows=rows if i == last else None)
    return entered, lm.norm(x)


class Server:
    """Owns the whole LLM and the public data; clients get the emulator and the adapter."""

    def __init__(self, full: LM, public, cfg):
        self.full, self.public, self.cfg = full, public, cfg
        emulator, self.adapter = self.split(full.config.n_layers, cfg)
        compressed = full.with_layers({i: full.layers[str(i)] for i in emulator + self.adapter})
        rng = generator(cfg.seed, 0, SERVER)
        self.student = add_lora(compressed, cfg.rank, cfg.alpha, rng).requires_grad_(False)
        self.emulated = lora_tensors(self.student, emulator)            # LoRA of E: trained here
        self.tuned = lora_tensors(self.student, self.adapter)           # LoRA of A: averaged here
        for p in self.emulated.values():
            p.requires_grad_()
        layers = {int(i): block for i, block in full.layers.items()}
        layers |= {i: self.student.layers[str(i)] for i in self.adapter}
        self.teacher = full.with_layers(layers)                         # E* and A
        self.optimizer = self.new_optimizer()
        self.metrics = {}

    emulator = {}       # PATCH of this worktree

    split = staticmethod(lambda n, cfg: layer_extract(n, cfg.adapter, cfg.dropout))

    def new_optimizer(self):
        # PAPER SILENT: whether its state lives on between rounds. It does, unless --align-renew.
        return torch.optim.AdamW(self.emulated.values(), lr=self.cfg.server_lr, betas=(0.9, 0.95))

    def bootstrap(self) -> Payload:
        """Once: the frozen tensors of E and A, embeddings, norm and head. No dropped layer."""
        return weights_of(self.student)

    def broadcast(self, t: int) -> Payload:
        """Lines 3-7: re-align E with E*, then send the LoRA of E and A.

        PAPER SILENT: Algorithm 2 aligns E steps in every round, the text 500 once and E between
        rounds; so: align_init before round 0, align_steps before the others, none after the last.
        """
        self.align(t, self.cfg.align_steps if t else self.cfg.align_init)
        return {name: p.detach() for name, p in (self.emulated | self.tuned).items()}

    def align(self, t: int, steps: int):
        """Eq. 3-5, 7: AdamW on the LoRA of E; the current adapter sits frozen in both models."""
        cfg, losses = self.cfg, []
        if cfg.align_renew:
            self.optimizer = self.new_optimizer()
        batches = self.public.batches(steps, cfg.batch_size, (cfg.seed, t, SERVER))
        for batch in tqdm(batches, "align", steps, leave=False, disable=None):
            batch = batch.to(self.full.output.weight.device)
            l2, kl = self.alignment_losses(batch)
            self.optimizer.zero_grad()
            (l2 + cfg.kl_weight * kl).backward()                        # Eq. 3
            self.optimizer.step()
            losses.append(torch.stack((l2.detach(), kl.detach())))
        if losses:
            l2, kl = torch.stack(losses[-10:]).mean(0).tolist()
            if not math.isfinite(l2 + kl):
                raise UserError(f"round {t + 1}: the alignment's loss is L2 {l2}, KL {kl}; "
                                f"try a smaller --server-lr")
            self.metrics = {"align_l2": l2, "align_kl": kl}             # mean of the last ten steps

    def alignment_losses(self, batch) -> tuple[Tensor, Tensor]:
        """Eq. 4, 5: (||E(x) - E*(x)||^2, KL(teacher || student)), means over the answer's tokens.

        DIFFERS: the L2 is divided by the teacher's mean square, so that lambda and the learning
        rates carry over between model sizes; --align-norm none is the literal equation.
        """
        rows, weights = batch.rows, batch.weights
        if self.cfg.align_tokens == "all":
            rows = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
            weights = torch.full(rows.shape, 1 / len(rows), device=rows.device)
        cut = self.adapter[-self.cfg.adapter]                       # the first layer on top of E
        with torch.no_grad():
            target, h_teacher = adapter_input_and_output(self.teacher, batch.tokens, rows, cut)
        entered, h_student = adapter_input_and_output(self.student, batch.tokens, rows, cut)
        l2 = (weights * (entered.float() - target.float()).square().sum(-1)).sum()
        if self.cfg.align_norm == "rms":
            l2 = l2 / (weights * target.float().square().sum(-1)).sum()
        return l2, linear_kl(h_student, h_teacher, self.full.output.weight, weights)

    def expected(self, t: int) -> Payload:
        """An upload that learnt nothing: what `accepted` holds the others against."""
        return {name: p.detach() for name, p in self.tuned.items()}

    def aggregate(self, t: int, uploads: list[Payload], weights: list[float]):
        """Eq. 11, line 16: A <- sum_m p_m A_m, p_m = |D_m| / |D| over those who took part.

        A and B are averaged apart; mean(B) mean(A) is not mean(B A).
        """
        total = sum(weights)
        for name, p in self.tuned.items():
            p.copy_(sum(w / total * up[name].to(p.device) for up, w in zip(uploads, weights)))

    def models(self) -> dict[str, LM]:
        return {"base": self.full, "adapemu": self.student, "adapfu": self.teacher}

    def state_dict(self) -> dict:
        """`learnt` is what lora.pt holds."""
        learnt = {name: p.detach().cpu() for name, p in (self.emulated | self.tuned).items()}
        return {"learnt": learnt, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict):
        copy_into(self.emulated | self.tuned, state["learnt"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])


class Client:
    """Knows what it was handed: E and A. Stateless between rounds."""

    def __init__(self, bootstrap: Payload, cfg, device="cpu"):
        self.cfg = cfg
        lm = lm_from(bootstrap, device)
        self.lm = add_lora(lm, cfg.rank, cfg.alpha, generator(0)).requires_grad_(False)
        self.received = lora_tensors(self.lm)                       # LoRA of E and A: a broadcast
        self.tuned = lora_tensors(self.lm, self.adapter(lm, cfg))   # LoRA of A: trained here
        for p in self.tuned.values():
            p.requires_grad_()

    @staticmethod
    def adapter(lm: LM, cfg) -> list[int]:
        return list(range(lm.config.n_layers - cfg.adapter, lm.config.n_layers))

    def update(self, t: int, payload: Payload, examples, m: int) -> tuple[Payload, dict]:
        """Lines 8-15: K steps of AdamW on F_m + epsilon/2 ||w_A - w_A^(t)||^2, over the LoRA of A.

        Nothing below the adapter needs a gradient, so autograd keeps no activation of the emulator.
        """
        cfg, W, losses = self.cfg, self.lm.output.weight, []
        copy_into(self.received, payload)
        pairs = self.proximal_pairs({name: p.detach().clone() for name, p in self.tuned.items()})
        # PAPER SILENT: the betas; as the alignment's. New in every round: a client keeps nothing.
        optimizer = torch.optim.AdamW(self.tuned.values(), lr=cfg.lr, betas=(0.9, 0.95))
        for batch in examples.batches(cfg.local_steps, cfg.batch_size, (cfg.seed, t, m)):
            batch = batch.to(W.device)
            h = self.lm.hidden(batch.tokens, rows=batch.rows)       # (N, D): answer's tokens only
            loss = linear_cross_entropy(h, W, batch.targets, batch.weights)             # Eq. 6
            losses.append(loss.detach())
            if cfg.prox:
                loss = loss + cfg.prox / 2 * proximal(pairs, cfg.alpha / cfg.rank)      # Eq. 8-10
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise UserError(f"round {t + 1}, client {m}: the loss is {mean}; "
                            f"try a smaller --lr, or --dtype fp32")
        return {name: p.detach().clone() for name, p in self.tuned.items()}, {"loss": mean}

    def proximal_pairs(self, sent: Payload) -> list[tuple[Tensor, ...]]:
        """(B, A, B0, A0) of every tuned matrix; B0 and A0 are what was broadcast."""
        stems = [name.removesuffix("A") for name in self.tuned if name.endswith("lora_A")]
        return [(*(self.tuned[s + x] for x in "BA"), *(sent[s + x] for x in "BA")) for s in stems]


def payload_bytes(payload: Payload) -> int:
    return sum(t.numel() * t.element_size() for t in payload.values())


class Wire:
    """Between server and clients, all in one process, one client after the other. Counts bytes."""

    def round(self, t: int, payload: Payload, client, shards, chosen, expected) -> dict:
        """{client: (upload, metrics)} of those who were `chosen`."""
        bar = tqdm(chosen, f"round {t + 1}", leave=False, disable=None)
        results = {m: client.update(t, payload, shards[m], m) for m in bar}
        self.down = [payload_bytes(payload) for _ in chosen]
        self.up = [payload_bytes(upload) for upload, _ in results.values()]
        return results


def choose_clients(cfg, clients: int, t: int) -> list[int]:
    """All of them, or clients_per_round drawn without replacement, the same in every process."""
    if cfg.clients_per_round in (0, clients):
        return list(range(clients))
    rng = np.random.default_rng((cfg.seed, t, SERVER))
    return sorted(rng.choice(clients, cfg.clients_per_round, False).tolist())


def misfit(upload: Payload, expected: Payload) -> str:
    """Why an upload cannot be counted, by its names, shapes and dtypes alone; "": it can."""
    if odd := sorted(map(str, upload.keys() ^ expected.keys())):
        return f"{len(odd)} tensors are missing or surplus, the first is {odd[0][:80]!r}"
    for name, like in expected.items():
        if (upload[name].dtype, upload[name].shape) != (like.dtype, like.shape):
            return (f"{name} is {upload[name].dtype} {list(upload[name].shape)}, "
                    f"expected {like.dtype} {list(like.shape)}")
    return ""


def moved(upload: Payload, expected: Payload) -> float:
    """How far an upload is from what was sent: a norm over its floats, in fp64: none overflows."""
    steps = (upload[name].to(like.device).double() - like.double()
             for name, like in expected.items() if like.is_floating_point())
    return math.sqrt(sum(step.square().sum().item() for step in steps))


def accepted(t: int, results: dict, expected: Payload, cfg) -> dict[int, tuple[Payload, dict]]:
    """The results that count, and one line for each that does not."""
    reasons = {m: misfit(upload, expected) for m, (upload, _) in results.items()}
    norms = {m: moved(upload, expected) for m, (upload, _) in results.items() if not reasons[m]}
    for m in norms:
        loss = results[m][1].get("loss")
        if not (math.isfinite(norms[m]) and isinstance(loss, float) and math.isfinite(loss)):
            reasons[m] = "not all of its numbers are finite"
    usual = median_low([norms[m] for m in norms if not reasons[m]] or [0.0])  # of two, the smaller
    for m in norms:
        if not reasons[m] and 0 < cfg.max_update_norm * usual < norms[m]:
            reasons[m] = (f"it moved {norms[m]:.3g}, more than --max-update-norm "
                          f"{cfg.max_update_norm:g} times the round's median {usual:.3g}")
    for m in results:
        if reasons[m]:
            print(f"round {t + 1}, client {m}: rejected, {reasons[m]}", file=sys.stderr)
    if all(reasons.values()):
        raise UserError(f"round {t + 1}: no client's upload could be counted; "
                        f"the last round's state is kept")
    return {m: result for m, result in results.items() if not reasons[m]}


def average_loss(results: dict, weights: list[float]) -> float:
    losses = [metrics["loss"] for _, metrics in results.values()]
    return sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)


def federate(server, client, shards, cfg, wire, first_round: int = 0):
    """Algorithm 2: yields one record a round. Any Server/Client pair of the protocol will do."""
    for t in range(first_round, cfg.rounds):
        start = time.perf_counter()
        payload = server.broadcast(t)                       # lines 3-7: align E, send A and E
        chosen = choose_clients(cfg, len(shards), t)
        expected = server.expected(t)
        # lines 8-15: K local steps of each
        results = wire.round(t, payload, client, shards, chosen, expected)
        results = accepted(t, results, expected, cfg)
        weights = [1.0 if cfg.uniform_weights else float(len(shards[m])) for m in results]
        # line 16: A <- sum p_m A_m
        server.aggregate(t, [upload for upload, _ in results.values()], weights)
        yield {"round": t + 1, "client_loss": average_loss(results, weights), **server.metrics,
               "bytes_down": mean(wire.down), "bytes_up": mean(wire.up),
               "seconds": time.perf_counter() - start}
