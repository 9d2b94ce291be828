"""FedAvg on LoRA (FedIT): clients hold the full model and tune LoRA in all its layers.

    adapted         a model with LoRA in every block, and the tensors that are tuned
    Server, Client  FedBiOT's update (epsilon = 0) and average, without an emulator

The upper bound: what FedBiOT gives up for privacy and cost is measured against this. The other
methods without an emulator are built on it.
"""
from dataclasses import replace

from torch import Tensor

import fedbiot
from fedbiot import SERVER, Payload, detached, generator, lm_from, weights_of
from lora import add_lora, copy_into, lora_tensors
from model import LM


def adapted(lm: LM, cfg, rng) -> tuple[LM, dict[str, Tensor]]:
    """The model with LoRA in every block around `lm`'s tensors, and its A and B by name."""
    twin = add_lora(lm, cfg.rank, cfg.alpha, rng).requires_grad_(False)
    return twin, lora_tensors(twin)


class Server(fedbiot.Server):
    no_use = frozenset({"dropout", "adapter", "kl_weight", "prox", "align_init", "align_init_on",
                        "align_init_lr", "align_steps", "align_renew", "align_norm",
                        "align_tokens", "server_lr"})
    emulator, kept = {}, []                                         # no client gets an emulator
    adapted = staticmethod(adapted)

    def __init__(self, full: LM, public, cfg):
        self.full, self.public, self.cfg, self.measured = full, public, cfg, {}
        self.adapter = list(range(full.config.n_layers))
        self.lm, self.tuned = self.adapted(full, cfg, generator(cfg.seed, 0, SERVER))
        self.learnt = self.tuned                                    # what lora.pt will hold

    def bootstrap(self) -> Payload:
        return weights_of(self.full)

    def broadcast(self, t: int) -> Payload:
        return detached(self.tuned)

    def models(self) -> dict[str, LM]:
        return {"base": self.full, "full": self.lm}

    def state_dict(self) -> dict:
        return {"learnt": {name: p.detach().cpu() for name, p in self.learnt.items()}}

    def load_state_dict(self, state: dict):
        copy_into(self.learnt, state["learnt"])


class Client(fedbiot.Client):
    adapted = staticmethod(adapted)

    def __init__(self, bootstrap: Payload, cfg, device="cpu"):
        self.cfg = replace(cfg, prox=0.0)
        self.lm, self.tuned = self.adapted(lm_from(bootstrap, device), cfg, generator(0))
        self.received = self.tuned
        for p in self.tuned.values():
            p.requires_grad_()
