"""FedBiOT: Wu, Li, Li, Ding, Gao, KDD 2024 (doi 10.1145/3637528.3671897).

Read from the end: `federate` is Algorithm 2. The paper's equations:

    layer_extract                   Algorithm 1     the emulator's and the adapter's layers
    linear_cross_entropy            Eq. 1           F_m, a client's loss
    Server.alignment_losses         Eq. 3, 4        ||E(x) - E*(x)||^2, KL(full || compressed)
    Server.align_weights, align     Eq. 5, 7        before round 1; between rounds
    Client.update, proximal         Eq. 6, 8-10     K steps on F_m + epsilon/2 ||w_A - w_A^(t)||^2
    federate, Server.aggregate      Eq. 2, 11       the rounds; sum_m p_m A_m, line 16

E* = the original layers for which the emulator E stands; A = adapter.
"""
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from statistics import fmean, median_low

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lora import add_lora, copy_into, lora_tensors
from model import LM, ModelConfig, UserError, room

Payload = dict[str, Tensor]
SERVER = 1 << 20  # the server, as the client of a random key
MOST_EXAMPLES, MOST_LOSS = 10**9, 1e6  # that a client may report
HELD = 2**26  # bytes of uploads in memory; others wait on disk

def option(default, text, **extra):
    return field(default=default, metadata={"help": text, **extra})

@dataclass(frozen=True)
class Config:
    """What the algorithm needs to know. train.py makes flags of it."""
    dropout: float = option(0.2, "share of layers below the adapter to drop (beta)", most=1)
    adapter: int = option(2, "layers of the adapter (s)")
    rounds: int = option(500, "communication rounds (R); bundled model 5", least=1)
    local_steps: int = option(30, "steps of a client in a round (K)", least=1)
    batch_size: int = option(10, "examples a step, clients and server", least=1)
    align_init: int = option(500, "alignment steps before the first round")
    align_steps: int = option(10, "alignment steps between rounds (E)")
    # DIFFERS: section 3.1 and Eq. 5 tune all weights of E before round 1, section 4.1 and the
    # authors' code its LoRA alone. Both readings are here.
    align_init_on: str = option("lora", "what these steps tune; weights is Eq. 5, at 16 bytes "
                                "each; bundled model weights", choices=("weights", "lora"))
    # PAPER SILENT: the learning rate of the alignment, its warm-up and its decay.
    align_init_lr: float = option(1e-3, "peak learning rate of --align-init-on weights")
    server_lr: float = option(1e-4, "learning rate of E's LoRA; bundled model 2e-3")
    # PAPER SILENT: which of 1e-5..1e-4, where the paper searches, it found.
    lr: float = option(1e-4, "learning rate of the clients (eta); bundled model 3e-3")
    # PAPER SILENT: lambda and epsilon come from a grid search whose result is not given.
    kl_weight: float = option(1.0, "weight of the KL in the alignment (lambda)")
    prox: float = option(0.01, "weight of the pull to what was broadcast (epsilon)")
    rank: int = option(8, "LoRA rank", least=1, most=2**16)
    alpha: float = option(16.0, "LoRA alpha", least=1e-9)
    clients_per_round: int = option(0, "clients that take part in a round (0: all)")
    align_norm: str = option("rms", "what the L2 is divided by", choices=("rms", "none"))
    align_tokens: str = option("answer", "tokens to align on", choices=("answer", "all"))
    align_renew: bool = option(False, "a new alignment optimizer every round")
    max_update_norm: float = option(10.0, "reject uploads this many times the median (0: never)")
    client_timeout: float = option(0.0, "torchrun: leave out clients slower than these seconds")
    uniform_weights: bool = option(False, "average uploads uniformly")
    seed: int = option(0, "seed of everything")

# ---- Algorithm 1 --------------------------------------------------------------------------------
def layer_extract(n: int, s: int, beta: float) -> tuple[list[int], list[int]]:
    """Algorithm 1: (emulator's layers, adapter's layers), 0-based indices of the model's n.
    beta is read as the decimal that it prints as: the float 0.2 is a little above 1/5."""
    # DIFFERS: line 2 reads n' = floor(beta (n - s)); the paper's Table 5 needs (1 - beta).
    if not 1 <= s < n:
        raise UserError(f"--adapter {s}: the model has {n} layers, so choose 1..{n - 1}")
    kept = math.floor((1 - Fraction(str(beta))) * (n - s))
    if beta < 0 or kept < 1:
        most = (n - s - 1) * 10**4 // (n - s) / 10**4
        raise UserError(f"--dropout {beta}: expected 0..{most}, which leaves at least one of "
                        f"the {n - s} layers below the adapter")
    return spread(n - s, kept), list(range(n - s, n))

def spread(total: int, kept: int) -> list[int]:
    """`kept` of the layers 0..total-1, evenly, with both ends.  ABLATE: layer choice"""
    return [j * (total - 1) // max(kept - 1, 1) for j in range(kept)]

# ---- losses -------------------------------------------------------------------------------------
# The head W is frozen, so the gradient for the hidden states can be made in the forward pass: no
# (N, V) tensor ever exists, and backward is one multiplication. A matrix product wants many rows
# at a time, a chunk; what is done to its logits wants few, a slice that stays in a CPU's cache.

def chunks(h: Tensor, W: Tensor) -> list[slice]:
    """Rows of h (N, D) by chunks whose fp32 logits take 32 MB on the CPU, 512 MB on a GPU."""
    size = max(2**27 // len(W), 1024) if h.is_cuda else max(2**23 // len(W), 32)
    return [slice(a, min(a + size, len(h))) for a in range(0, len(h), size)]

def slices(*tensors: Tensor):
    """The same rows of all tensors (n, ...): 4 MB of the first in fp32; on a GPU all rows."""
    n, V = tensors[0].shape
    return zip(*(t.split(n if t.is_cuda else max(2**20 // V, 1)) for t in tensors))

def project(h: Tensor, W: Tensor) -> Tensor:
    """Logits (n, V) of h (n, D) and W (V, D), in fp32 where the product can give it."""
    if h.is_cuda and h.dtype != torch.float32:
        return torch.mm(h, W.T, out_dtype=torch.float32)
    return h @ W.T

def cross_entropy_rows(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits z (n, V) fp32, overwritten, and targets y (n, 1): losses (n, 1) and their
    gradients, p - one-hot."""
    top, true = z.amax(-1, keepdim=True), z.gather(-1, y)
    p = torch.softmax(z, -1, out=z)
    lse = top - p.amax(-1, keepdim=True).log()  # exact: max p >= 1 / V
    return lse - true, p.scatter_add_(-1, y, -torch.ones_like(true))  # in fp32, before any cast

def kl_rows(t: Tensor, delta: Tensor, careful: bool) -> tuple[Tensor, Tensor]:
    """Teacher's logits t (n, V) fp32 and student's minus teacher's, both overwritten: KL (n, 1)
    and p_s - p_t.
    Close softmaxes lose their digits when subtracted. With c = lse_s - lse_t, log p_s - log p_t
    is delta - c, so p_s - p_t = (p_s + p_t) tanh((delta - c) / 2) keeps them. A row should sum
    to 0; its sum, `excess`, is the rounding error of c, which both results lose."""
    t -= t.amax(-1, keepdim=True)
    s = t + delta
    top = s.amax(-1, keepdim=True)
    p_t, p_s = torch.softmax(t, -1, out=t), torch.softmax(s, -1, out=s)
    c = top - p_s.amax(-1, keepdim=True).log() + p_t.amax(-1, keepdim=True).log()
    if not careful:  # a bf16 gradient has no use for them
        return c - delta.mul_(p_t).sum(-1, keepdim=True), p_s.sub_(p_t)
    kl = c - (delta * p_t).sum(-1, keepdim=True)
    gradient = p_s.add_(p_t).mul_(delta.sub_(c).mul_(0.5).tanh_())
    excess = gradient.sum(-1, keepdim=True)
    return kl + excess, gradient.addcmul_(p_t, excess, value=-1)

class FusedLoss(torch.autograd.Function):
    """sum_i w_i l_i and its gradient for h, chunk by chunk. `chunk_loss(rows, w)` gives a
    chunk's sum and the gradient (n, V) of its unweighted losses for its logits."""
    @staticmethod
    def forward(ctx, h, W, weights, chunk_loss):
        loss = weights.new_zeros(())
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for rows in chunks(h, W):
            w = weights[rows, None]  # (n, 1)
            part, dz = chunk_loss(rows, w)
            loss += part
            if dh is not None:
                dh[rows] = w * (dz.to(W.dtype) @ W)
            del dz  # before the next chunk's is made
        ctx.save_for_backward(dh)
        return loss

    @staticmethod
    def backward(ctx, g):
        dh = ctx.saved_tensors[0]
        return dh * g.to(dh.dtype), None, None, None

def linear_cross_entropy(h: Tensor, W: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i * cross_entropy(W h_i, y_i): a scalar, fp32. Eq. 1.
    h (N, D) after the final norm, W (V, D) the frozen head, targets (N,) int64, weights (N,)
    fp32; a row of weight 0 is ignored, whatever it holds. Gradient for h only."""
    def chunk_loss(rows, w):
        total, logits = 0.0, project(torch.where(w != 0, h[rows], 0), W)  # (n, V)
        for z, y, w_z in slices(logits, targets[rows, None], w):
            each, gradient = cross_entropy_rows(z.float(), y)
            total = total + (w_z * each).sum()
            z.copy_(gradient)
        return total, logits
    return FusedLoss.apply(h, W, weights, chunk_loss)

def linear_kl(h_student: Tensor, h_teacher: Tensor, W: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i * KL(softmax(W h_teacher_i) || softmax(W h_student_i)): a scalar, fp32. Eq. 4.
    h_* (N, D), W (V, D) frozen, weights (N,) fp32, 0 = ignored. Gradient for h_student only.
    The logits' difference is W (h_s - h_t), so that bf16 rounds the *disagreement*: near
    agreement the gradient of two softmaxes, rounded apart, is noise."""
    def chunk_loss(rows, w):
        total, h_t = 0.0, torch.where(w != 0, h_teacher[rows], 0)
        apart = torch.where(w != 0, h_student[rows], 0).float() - h_t.float()
        teacher, apart = project(h_t, W), project(apart.to(W.dtype), W)  # (n, V), logits
        for t, delta, w_t in slices(teacher, apart, w):
            each, gradient = kl_rows(t.float(), delta.float(), W.dtype == torch.float32)
            total = total + (w_t * each).sum()
            delta.copy_(gradient)
        return total, apart
    return FusedLoss.apply(h_student, W, weights, chunk_loss)

def proximal(pairs, scale: float) -> Tensor:
    """Eq. 6: sum over (B, A, B0, A0) of ||scale (B A - B0 A0)||^2 (W cancels), a scalar, fp32.
    B (d_out, r), A (r, d_in). BA - B0A0 = [B - B0, B0] [A; A - A0] = L R, and ||L R||^2 is the
    sum of (L^T L) * (R R^T): no d x d matrix, and exact where BA - B0A0 rounds to 0 in fp32."""
    total = 0.0
    for B, A, B0, A0 in pairs:
        L = torch.cat((B - B0, B0), 1)  # (d_out, 2r)
        R = torch.cat((A, A - A0), 0)  # (2r, d_in)
        total = total + ((L.T @ L) * (R @ R.T)).sum()
    return scale**2 * total

# ---- Algorithm 2 --------------------------------------------------------------------------------
# Server and Client meet through payloads alone; what is learnt is at the server. A client keeps no
# optimizer and no generator, only tensors that it was sent or makes from those: a wire may build
# it anew from `bootstrap` and a broadcast. (FedTT+ broadcasts less, and refuses a gap.)

def generator(*key: int) -> torch.Generator:
    """Randomness is a function of (seed, round, client, ...), so there is none to save."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))

def detached(tensors: Payload) -> Payload:
    return {name: p.detach() for name, p in tensors.items()}

def weights_of(lm: LM) -> Payload:
    """A model's frozen tensors (no LoRA) by name, and its configuration as JSON bytes."""
    payload = {name: p.detach() for name, p in lm.named_parameters() if ".lora_" not in name}
    config = json.dumps(asdict(lm.config)).encode()
    return payload | {"config": torch.frombuffer(bytearray(config), dtype=torch.uint8)}

def lm_from(payload: Payload, device="cpu") -> LM:
    """The model that `weights_of` described, around the payload's own tensors."""
    config = ModelConfig(**json.loads(bytes(payload["config"].tolist())))
    layers = {int(name.split(".")[1]) for name in payload if name.startswith("layers.")}
    with torch.device("meta"):
        lm = LM.empty(config, layers)
    names = lm.state_dict().keys() & payload.keys()
    return lm.take({name: payload[name].to(device) for name in names})

class Server:
    """Owns the whole LLM and the public data; clients get E and A."""
    no_use = frozenset()  # shared flags that mean nothing to the method
    Flags = Config  # a dataclass: the method's own flags, if any
    period = 1  # rounds after which payloads' sizes repeat (FedTT+)
    emulator: Payload = {}  # E's own weights by name, if Eq. 5 trains them

    defaults = staticmethod(lambda method, bundled: {})  # its own values of shared flags
    split = staticmethod(lambda n, cfg: layer_extract(n, cfg.adapter, cfg.dropout))

    def __init__(self, full: LM, public, cfg):
        self.full, self.public, self.cfg, self.measured = full, public, cfg, {}
        self.kept, self.adapter = self.split(full.config.n_layers, cfg)
        assert self.kept == sorted({*self.kept} - {*self.adapter}), (self.kept, self.adapter)
        self.cut = self.adapter[-cfg.adapter]  # the first above E
        compressed = full.with_layers({i: full.layers[str(i)] for i in self.kept + self.adapter})
        rng = generator(cfg.seed, 0, SERVER)
        self.student = add_lora(compressed, cfg.rank, cfg.alpha, rng).requires_grad_(False)
        if cfg.align_init_on == "weights":
            self.give_own_weights(self.student.layers)
        self.aligned = not self.emulator
        self.emulated = lora_tensors(self.student, self.kept)  # LoRA of E: trained here
        self.tuned = lora_tensors(self.student, self.adapter)  # LoRA of A: averaged here
        for p in self.emulated.values():
            p.requires_grad_()
        adapter = {str(i): self.student.layers[str(i)] for i in self.adapter}
        self.teacher = full.with_layers({**full.layers, **adapter})  # E* and A
        # PAPER SILENT: whether the optimizer's state is kept between rounds. It is, but for
        # --align-renew.
        self.optimizer = torch.optim.AdamW(self.emulated.values(), cfg.server_lr, (0.9, 0.95))

    def give_own_weights(self, layers):
        """E's matrices and norms become fp32 copies: Eq. 5 leaves the full model alone."""
        own = {n: p.to(torch.float32, copy=True) for n, p in layers.state_dict().items()
               if int(n.split(".")[0]) in self.kept and ".lora_" not in n}
        layers.load_state_dict(layers.state_dict() | own, assign=True)
        layers.requires_grad_(False)
        self.emulator = {f"layers.{n}": layers.get_parameter(n) for n in own}

    def bootstrap(self) -> Payload:
        """Once: frozen tensors of E and A, embeddings, norm, head. No dropped layer; after Eq. 5
        no original layer below the adapter (section 2.2)."""
        if not self.aligned:
            self.align_weights(self.cfg.align_init)
        return weights_of(self.student)  # ABLATE: what is shipped

    def broadcast(self, t: int) -> Payload:
        """Lines 3-7: re-align E with E*, then send the LoRA of E and A."""
        # PAPER SILENT: Algorithm 2 aligns in every round, the text 500 steps once and 10 between
        # rounds. So: align_init before the first, align_steps before each other.
        init = self.cfg.align_init if self.cfg.align_init_on == "lora" else 0
        self.align(t, self.cfg.align_steps if t else init)
        return detached(self.emulated | self.tuned)  # ABLATE: what is shipped

    def align(self, t: int, steps: int):
        """Eq. 7: AdamW on the LoRA of E; the adapter sits frozen in both models."""
        if self.cfg.align_renew:
            self.optimizer.state.clear()
        self.descend(t, steps, self.optimizer)

    def align_weights(self, steps: int):
        """Eq. 5: AdamW on all matrices and norms of E, which then freeze in the checkpoint's
        dtype. LoRA of E is zero in these steps."""
        self.student.requires_grad_(False)  # also the LoRA of E, until `freeze`
        weights, warm_up = [p.requires_grad_() for p in self.emulator.values()], 20
        optimizer = torch.optim.AdamW(weights, lr=self.cfg.align_init_lr, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min((k + 1) / warm_up, (steps - k) / max(steps - warm_up, 1)))
        self.descend(0, steps, optimizer, schedule)
        self.freeze(detached(self.emulator))

    def freeze(self, weights: Payload):
        """E's own weights become `weights`, rounded to the checkpoint's dtype."""
        dtype = self.full.output.weight.dtype
        for name, p in self.emulator.items():
            assert p.shape == weights[name].shape, f"freeze: another shape of {name}"
            p.data = weights[name].to(p.device, self.full.stored or dtype).to(dtype)
            p.grad = None
            p.requires_grad_(False)
        for p in self.emulated.values():
            p.requires_grad_()
        self.aligned = True

    def descend(self, t: int, steps: int, optimizer, schedule=None):
        """`steps` steps of `optimizer` on the alignment's losses on the public data."""
        cfg, losses, device = self.cfg, [], self.full.output.weight.device
        key = cfg.seed, t, SERVER
        batches = self.public.batches(steps, cfg.batch_size, key) if steps else ()  # line 4
        for batch in tqdm(batches, "align", steps, leave=False, disable=None):
            terms = self.alignment_losses(batch.to(device))
            optimizer.zero_grad()
            sum(weight * value for weight, value in terms.values()).backward()
            optimizer.step()
            if schedule:
                schedule.step()
            losses.append(torch.stack([value.detach() for _, value in terms.values()]))
        if losses:  # mean of the last ten steps
            means = torch.stack(losses[-10:]).mean(0).tolist()
            self.measured = {f"align_{name}": value for name, value in zip(terms, means)}
            if not all(map(math.isfinite, means)):
                raise UserError(f"round {t + 1}: the alignment's losses are {means}; try a "
                                f"smaller --server-lr or --align-init-lr")

    def alignment_losses(self, batch) -> dict[str, tuple[float, Tensor]]:
        """Name: (weight, value) of Eq. 3, ||E(x) - E*(x)||^2, and Eq. 4, KL(teacher || student);
        Eq. 5 and 7 minimise the weighted sum. A new term reaches log.csv, a round's line and
        benchmarks/plot.py by itself."""
        # ABLATE: the alignment's losses
        # DIFFERS: the L2 is divided by the teacher's mean square, so that lambda and the rates
        # carry over between model sizes; --align-norm none is the literal Eq. 3.
        # PAPER SILENT: means are over a batch's answer tokens, so a long answer weighs more.
        rows, weights = batch.rows, batch.weights
        if self.cfg.align_tokens == "all":
            rows = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
            weights = torch.full(rows.shape, 1 / len(rows), device=rows.device)
        W = self.full.output.weight
        with torch.no_grad():
            target, h_teacher = self.teacher.hidden(batch.tokens, rows=rows, tap=self.cut)
        mixed = not self.aligned and W.dtype != torch.float32  # fp32 weights of E in Eq. 5
        with torch.autocast(W.device.type, W.dtype, enabled=mixed):
            entered, h_student = self.student.hidden(batch.tokens, rows=rows, tap=self.cut)
        l2 = (weights * (entered.float() - target.float()).square().sum(-1)).sum()
        if self.cfg.align_norm == "rms":
            l2 = l2 / (weights * target.float().square().sum(-1)).sum()
        return {"l2": (1.0, l2),
                "kl": (self.cfg.kl_weight, linear_kl(h_student, h_teacher, W, weights))}

    def expected(self, t: int) -> Payload:
        """An upload that learnt nothing: what `accepted` holds the others against."""
        return detached(self.tuned)

    def aggregate(self, t: int, uploads: list[Payload], weights: list[float]) -> dict[str, float]:
        """Eq. 11, line 16: A <- sum_m p_m A_m, p_m = |D_m| / |D| over those who took part. lora_B
        and lora_A apart: mean(B) mean(A) is not mean(B A).  ABLATE: aggregation
        Only reads `uploads`: some are on disk. Returns what was measured since the last call."""
        total = sum(weights)
        for name, p in self.tuned.items():
            p.copy_(sum(w / total * up[name].to(p.device) for up, w in zip(uploads, weights)))
        measured, self.measured = self.measured, {}
        return measured

    def models(self) -> dict[str, LM]:
        return {"base": self.full, "adapemu": self.student, "adapfu": self.teacher}

    def state_dict(self) -> dict:
        """What rounds change; `learnt` is what lora.pt holds."""
        learnt = {name: p.detach().cpu() for name, p in (self.emulated | self.tuned).items()}
        return {"learnt": learnt, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict):
        copy_into(self.emulated | self.tuned, state["learnt"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.emulator:
            self.freeze(state["emulator"])

class Client:
    """Knows E and A, which it was handed; keeps nothing of its own between rounds."""
    def __init__(self, bootstrap: Payload, cfg, device="cpu"):
        self.cfg = cfg
        lm = lm_from(bootstrap, device)
        self.lm = add_lora(lm, cfg.rank, cfg.alpha, generator(0)).requires_grad_(False)
        self.received = lora_tensors(self.lm)  # LoRA of E and A: a broadcast
        self.tuned = lora_tensors(self.lm, self.adapter(lm, cfg))  # LoRA of A: trained here
        for p in self.tuned.values():
            p.requires_grad_()

    adapter = staticmethod(lambda lm, cfg: [*range(lm.config.n_layers)][-cfg.adapter:])

    def update(self, t: int, payload: Payload, examples, m: int) -> tuple[Payload, dict]:
        """Lines 8-15: K steps of AdamW on Eq. 6 over the LoRA of A; the upload, and F_m's mean.
        Nothing below A needs a gradient, so autograd keeps no activation of E."""
        cfg, losses = self.cfg, []
        copy_into(self.received, payload)  # Eq. 8
        sent = {name: p.detach().clone() for name, p in self.tuned.items()}
        stems = [name.removesuffix("A") for name in sent if name.endswith("lora_A")]
        pairs = [(self.tuned[s + "B"], self.tuned[s + "A"], sent[s + "B"], sent[s + "A"])
                 for s in stems]
        # PAPER SILENT: whether the optimizer's state is kept. It is not: a client keeps nothing.
        optimizer = torch.optim.AdamW(self.tuned.values(), lr=cfg.lr, betas=(0.9, 0.95))
        for batch in examples.batches(cfg.local_steps, cfg.batch_size, (cfg.seed, t, m)):
            loss = self.loss(batch.to(self.lm.output.weight.device))
            losses.append(loss.detach())
            if cfg.prox:
                loss = loss + cfg.prox / 2 * proximal(pairs, cfg.alpha / cfg.rank)  # Eq. 6
            optimizer.zero_grad()
            loss.backward()  # Eq. 9
            optimizer.step()  # Eq. 10
        upload = {name: p.detach().clone() for name, p in self.tuned.items()}
        return upload, {"loss": torch.stack(losses).mean().item()}

    def loss(self, batch) -> Tensor:
        """Eq. 1: F_m, a mean over the batch's answer tokens.  ABLATE: the client's loss"""
        h = self.lm.hidden(batch.tokens, rows=batch.rows)  # (N, D): answer's tokens only
        return linear_cross_entropy(h, self.lm.output.weight, batch.targets, batch.weights)

    def macs_per_token(self) -> int:
        """Table 5's cost of a token, (L + L_bp - 1) P multiplications with addition (the paper's
        GFLOP are GMAC): L layers at the client, L_bp of them crossed by the backward pass, P
        numbers in a layer's matrices and LoRA. Norms, head and attention scores do not count."""
        layers, lowest = self.lm.layers, min(int(name.split(".")[1]) for name in self.tuned)
        counted = sum(p.numel() for n, p in layers.named_parameters() if "norm" not in n)
        crossed = sum(int(i) >= lowest for i in layers)
        return (len(layers) + crossed - 1) * counted // len(layers)

def payload_bytes(payload: Payload) -> int:
    return sum(t.numel() * t.element_size() for t in payload.values())

class Wire:
    """Server and clients in one process, in turn."""
    def round(self, t: int, payload: Payload, client, shards, chosen, expected) -> tuple:
        """The work of the `chosen`: {client: (upload, metrics)}, and the bytes of every payload
        down and up. metrics["examples"] is |D_m| of Eq. 2."""
        results, up, spool = {}, [], None
        for m in tqdm(chosen, f"round {t + 1}", leave=False, disable=None):
            upload, metrics = client.update(t, payload, shards[m], m)
            up.append(payload_bytes(upload))
            if len(up) * payload_bytes(expected) > HELD:
                spool = spool or room("extras.spool").Spool(expected)
                upload = spool.keep(upload)
            results[m] = upload, metrics | {"examples": len(shards[m])}
        return results, [payload_bytes(payload) for _ in chosen], up

def choose_clients(cfg, clients: int, t: int) -> list[int]:
    """All, or clients_per_round of them, drawn without replacement."""
    rng = np.random.default_rng((cfg.seed, t, SERVER))
    return sorted(rng.choice(clients, cfg.clients_per_round or clients, False).tolist())

def misfit(upload: Payload, expected: Payload) -> str:
    """Why an upload's names, shapes or dtypes keep it from being counted; "": nothing."""
    found, wanted = ({name: (t.dtype, [*t.shape]) for name, t in p.items()}
                     for p in (upload, expected))
    for n in sorted(found.keys() | wanted.keys()):
        if found.get(n) != wanted.get(n):
            return f"{n!r:.80} is {found.get(n)}, expected {wanted.get(n)}"
    return ""

def implausible(metrics: dict) -> str:
    """Why a client's report cannot be used; "": it can."""
    loss, examples = metrics.get("loss"), metrics.get("examples")
    if type(loss) not in (int, float) or not abs(loss) <= MOST_LOSS:  # NaN compares false
        return f"its loss is {loss!r:.40}; try a smaller --lr or --dtype fp32"
    if type(examples) is not int or not 1 <= examples <= MOST_EXAMPLES:
        return f"it claims {examples!r:.40} examples, not 1..{MOST_EXAMPLES}"
    return ""

def distances(uploads: list[Payload], expected: Payload) -> list[float]:
    """Every upload's distance from what was sent, a norm in fp64. The host reads once."""
    found = next(iter(expected.values())).new_zeros(len(uploads), dtype=torch.float64)
    for name, p in expected.items():
        for i, upload in enumerate(uploads if p.is_floating_point() else ()):
            found[i] += (upload[name].to(p.device).double() - p.double()).square().sum()
    return found.sqrt().tolist()

def accepted(t: int, results: dict, expected: Payload, cfg) -> dict[int, tuple[Payload, dict]]:
    """The results that count; prints a line for each that does not."""
    # DIFFERS: the paper averages whatever comes. --max-update-norm 0 accepts all sizes.
    reasons = {m: misfit(upload, expected) or implausible(metrics)
               for m, (upload, metrics) in results.items()}
    fit = [m for m in results if not reasons[m]]
    norms = dict(zip(fit, distances([results[m][0] for m in fit], expected)))
    usual = median_low([*filter(math.isfinite, norms.values())] or [0.0])
    count = sum(like.numel() for like in expected.values() if like.is_floating_point())
    bound = cfg.max_update_norm * max(1, 16 / count)**2  # norms of few numbers vary
    for m, norm in norms.items():
        if not math.isfinite(norm):
            reasons[m] = "not all of its numbers are finite; try a smaller --lr"
        elif 0 < bound * usual < norm:
            reasons[m] = (f"it is {norm:.3g} from what was sent, over --max-update-norm {bound:g} "
                          f"times the round's median {usual:.3g}")
    for m in (m for m in results if reasons[m]):
        print(f"round {t + 1}, client {m}: rejected, {reasons[m]}", file=sys.stderr)
    if all(reasons.values()):
        raise UserError(f"round {t + 1}: no client's upload counts, the last one since "
                        f"{reasons.popitem()[1]}; the last round's state is kept")
    return {m: result for m, result in results.items() if not reasons[m]}

def federate(server, client, shards, cfg, wire, first_round: int = 0):
    """Algorithm 2: a record a round, for any Server and Client; first bootstrap (Eq. 5)."""
    for t in range(first_round, cfg.rounds):
        start = time.perf_counter()
        payload = server.broadcast(t)  # lines 3-7: align E, send A and E
        chosen = choose_clients(cfg, len(shards), t)
        expected = server.expected(t)  # an upload's names, shapes, dtypes, and what was sent
        results, down, up = wire.round(t, payload, client, shards, chosen, expected)  # lines 8-15
        uploads, metrics = zip(*accepted(t, results, expected, cfg).values())
        weights = [1.0 if cfg.uniform_weights else float(m["examples"]) for m in metrics]
        # line 16: A <- sum p_m A_m, p_m = |D_m| / |D| as in Eq. 2
        measured = server.aggregate(t, uploads, weights)
        del results, uploads  # before the next round's come
        loss = sum(w * m["loss"] for w, m in zip(weights, metrics)) / sum(weights)
        yield {"round": t + 1, "client_loss": loss, **measured, "bytes_down": fmean(down),
               "bytes_up": fmean(up or [0]), "seconds": time.perf_counter() - start}
