"""Offsite-Tuning (Xiao et al. 2023, arXiv 2302.04870), FedOT (Kuang et al., KDD 2024).

    split           A = the first s and the last s layers; E = what dropout leaves of the middle
    Server          E is aligned once, before anything is sent, then never again
    Client          plain cross-entropy (epsilon = 0); A is at both ends, so backward crosses all

Offsite-Tuning is one client with all the data, FedOT the task's clients with weighted averaging.
DIFFERS: the original tunes whole layers; as the FedBiOT paper's own runs of both, LoRA and floor.
"""
from dataclasses import replace

import fedbiot
from fedbiot import Payload, detached, layer_extract
from model import UserError


def split(n: int, cfg) -> tuple[list[int], list[int]]:
    """(emulator's layers, adapter's layers), 0-based indices of the full model's n layers."""
    s = cfg.adapter
    if not 1 <= 2 * s < n:
        raise UserError(f"--adapter {s}: {cfg.method} tunes the first and the last s of the "
                        f"model's {n} layers, so choose 1..{(n - 1) // 2}")
    middle, last = layer_extract(n - s, s, cfg.dropout)             # of what lies above the first s
    return [s + i for i in middle], list(range(s)) + [s + i for i in last]


class Server(fedbiot.Server):
    no_use = frozenset({"prox", "align_steps", "align_renew"})
    split = staticmethod(split)

    @staticmethod
    def defaults(method: str, bundled: bool) -> dict:
        return {"clients": 1} if method == "offsite" else {}

    def bootstrap(self) -> Payload:
        """PAPER SILENT: neither the length nor the loss of the alignment; FedBiOT's own, align_init
        steps with its KL, so that nothing but the method differs."""
        if self.cfg.align_init_on == "lora" and not self.once:
            self.align(0, self.cfg.align_init)
        self.once = True
        return super().bootstrap() | detached(self.emulated)

    once = False                                    # whether the LoRA of E is aligned already

    def broadcast(self, t: int) -> Payload:
        return detached(self.tuned)

    def load_state_dict(self, state: dict):
        super().load_state_dict(state)
        self.once = True


class Client(fedbiot.Client):
    def __init__(self, bootstrap: Payload, cfg, device="cpu"):
        super().__init__(bootstrap, replace(cfg, prox=0.0), device)
        for name in self.received.keys() - self.tuned.keys():       # E's LoRA, aligned
            self.received[name].copy_(bootstrap[name])
        self.received = self.tuned

    @staticmethod
    def adapter(lm, cfg) -> list[int]:
        return split(lm.config.n_layers, cfg)[1]
