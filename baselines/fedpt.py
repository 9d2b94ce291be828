"""FedPT: Gao et al. 2024 (arXiv 2410.00362): a large model is tuned by way of a small one.

    z_L         logits of the large model, which is asked for nothing else and stays at the server
    z_S, z_S0   logits of the small model with its LoRA, and with it off: one copy of its weights
    z           z_L + alpha (z_S - z_S0), the proxy-tuned model

A round: (1) broadcast the small model's LoRA; (2) clients tune it; (3) average them, S; (4) z from
S; (5) distil z back into S on public data: KL(softmax(z) || softmax(z_S)). z_S0 is the untuned
model in every round, so z_L - z_S0 is added again in each: watch `drift`, the mean ||z_S - z_S0||
over the answers' tokens; keep the steps few, or alpha below 1.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from baselines import fedavg
from baselines.fedavg import Client  # noqa: F401  (2): plain cross-entropy on the small LoRA
from fedbiot import SERVER, generator, option
from lora import copy_into
from model import LM, ModelConfig, UserError, load_tokenizer, load_weights

BUNDLED_SMALL = Path(__file__).resolve().parent.parent / "tiny" / "small"


class Proxy(nn.Module):
    """z, with what `generate` asks of a model. Untuned, z is z_L exactly."""

    def __init__(self, large: LM, small: LM, untuned: LM, alpha: float):
        super().__init__()
        self.large, self.small, self.untuned, self.alpha = large, small, untuned, alpha
        self.config, self.tok_embeddings = large.config, large.tok_embeddings

    def caches(self, batch: int, slots: int) -> list:
        three = (self.large, self.small, self.untuned)
        return [cache for lm in three for cache in lm.caches(batch, slots)]

    def hidden(self, tokens: Tensor, caches=None, slots=0, mask=None, rows=None) -> Tensor:
        """(B, T) -> (B, T, D_L + D_S), or (N, D_L + D_S) at `rows`: what the heads read."""
        n, k = len(self.large.layers), len(self.large.layers) + len(self.small.layers)
        own = (caches[:n], caches[n:k], caches[k:]) if caches else (None, None, None)
        large, small, untuned = (lm.hidden(tokens, c, slots, mask, rows) for lm, c in
                                 zip((self.large, self.small, self.untuned), own))
        return torch.cat((large, small - untuned), -1)

    def output(self, h: Tensor) -> Tensor:                          # (..., D_L + D_S) -> (..., V)
        D = self.config.dim
        return self.large.output(h[..., :D]) + self.alpha * self.small.output(h[..., D:])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.hidden(tokens))


@dataclass(frozen=True)
class Flags:
    proxy_ckpt: str = option(str(BUNDLED_SMALL), "FedPT: the small model's folder")
    proxy_alpha: float = option(1.0, "FedPT: weight of the small model's change (alpha)")
    proxy_steps: int = option(10, "FedPT: distillation steps after a round")


def check_vocabularies(large: str, small: str):
    """Logits can only be added over the same pieces."""
    a, b = (load_tokenizer(folder, ModelConfig.read(folder)) for folder in (large, small))
    if [*map(a.pieces.id_to_piece, range(a.vocab_size))] != [
            *map(b.pieces.id_to_piece, range(b.vocab_size))]:
        raise UserError(f"--proxy-ckpt {small}: has other pieces than {large}; logits can only be "
                        f"added over the same pieces")


class Server(fedavg.Server):
    """FedAvg's, of the small model: `full` is S0, `lm` is S; `averaged` is the LoRA of (3)."""

    Flags = Flags
    no_use = fedavg.Server.no_use - {"server_lr"} | {"init_lora"}

    def __init__(self, full: LM, public, cfg):
        """`full` is the large model here; the small one is read from --proxy-ckpt."""
        self.large, head = full, full.output.weight
        if not head.is_meta:
            check_vocabularies(cfg.ckpt, cfg.proxy_ckpt)
        config = replace(ModelConfig.read(cfg.proxy_ckpt), vocab_size=full.config.vocab_size)
        small = load_weights(cfg.proxy_ckpt, config, dtype=head.dtype, device=head.device)
        super().__init__(small, public, cfg)
        self.adapter = []                                           # of the large model: none
        self.snapshot, self.averaged = self.adapted(small, cfg, generator(cfg.seed, 0, SERVER))
        self.learnt = self.tuned | {f"averaged.{name}": p for name, p in self.averaged.items()}

    def aggregate(self, t: int, uploads, weights) -> dict:
        super().aggregate(t, uploads, weights)                      # (3)
        copy_into(self.averaged, self.tuned)                        # (4): frozen before (5)
        return self.distil(t)

    def distil(self, t: int) -> dict:
        """(5) PAPER SILENT: temperature 1, proxy_steps steps of a new AdamW at server_lr."""
        cfg, found = self.cfg, []
        for p in self.tuned.values():
            p.requires_grad_()
        optimizer = torch.optim.AdamW(self.tuned.values(), lr=cfg.server_lr, betas=(0.9, 0.95))
        batches = self.public.batches(cfg.proxy_steps, cfg.batch_size, (cfg.seed, t, SERVER))
        for batch in tqdm(batches, "distil", cfg.proxy_steps, leave=False, disable=None):
            kl, drift = self.distillation_loss(batch.to(self.large.output.weight.device))
            optimizer.zero_grad()
            kl.backward()
            optimizer.step()
            found.append(torch.stack((kl.detach(), drift)))
        self.lm.requires_grad_(False)
        means = torch.stack(found).mean(0).tolist() if found else ()
        return dict(zip(("distill_kl", "drift"), means))

    def distillation_loss(self, batch) -> tuple[Tensor, Tensor]:
        """(KL(proxy || small), mean ||z_S - z_S0||) over the answers' tokens, in fp32."""
        rows, weights, head = batch.rows, batch.weights, self.full.output
        with torch.no_grad():
            z_L = self.large.output(self.large.hidden(batch.tokens, rows=rows)).float()     # (N, V)
            h, h0 = (lm.hidden(batch.tokens, rows=rows) for lm in (self.snapshot, self.full))
            change = head(h - h0).float()
            teacher = (z_L + self.cfg.proxy_alpha * change).log_softmax(-1)
        student = head(self.lm.hidden(batch.tokens, rows=rows)).float().log_softmax(-1)
        kl = (weights * (teacher.exp() * (teacher - student)).sum(-1)).sum()
        return kl, (weights * change.norm(dim=-1)).sum()

    def models(self) -> dict:
        proxy = Proxy(self.large, self.snapshot, self.full, self.cfg.proxy_alpha)
        return {"base": self.large, "small": self.snapshot, "distilled": self.lm, "proxy": proxy}
