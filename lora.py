"""LoRA by hand (Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x on wq and wv, W frozen.

In order: LoRALinear; add_lora (an LM around the same frozen tensors, with LoRA in every block);
lora_tensors (A and B by name) and copy_into (load them, strict).
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import LM, Block

TARGETS = ("wq", "wv")                  # ABLATE: which matrices of an attention carry LoRA


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen. B = 0, so it starts as W.

    W *is* base.weight: emulator and full model share one tensor, under its Meta name.
    A and B stay fp32: in bf16 an AdamW step below about 1/256 of a weight rounds to nothing.
    """
    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.weight = base.weight                                       # W: (d_out, d_in), no copy
        A = nn.init.kaiming_uniform_(torch.empty(rank, d_in), a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(A.to(self.weight.device))            # A: (r, d_in)
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, device=self.weight.device))  # B: (d_out, r)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:                             # (..., d_in) -> (..., d_out)
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, A), B)


def add_lora(lm: LM, rank: int, alpha: float, generator: torch.Generator) -> LM:
    """A second LM over the *same* frozen tensors, whose every block has LoRA on TARGETS.

    `lm` itself is left as it is. A is drawn on the CPU, layer by layer, so that a seed means
    the same start on every device.
    """
    twins = {}
    for i, block in lm.layers.items():
        with torch.device("meta"):
            twin = Block(lm.config)
        twin.load_state_dict(block.state_dict(keep_vars=True), assign=True)     # shared, not copied
        twin.requires_grad_(False)
        for name in TARGETS:
            setattr(twin.attention, name, LoRALinear(getattr(twin.attention, name), rank, alpha, generator))
        twins[int(i)] = twin
    return lm.with_layers(twins)


def lora_tensors(lm: LM, layer_ids=None) -> dict[str, nn.Parameter]:
    """A and B by name (`layers.30.attention.wq.lora_A`), of `layer_ids` or of every layer."""
    return {f"layers.{i}.{name}": p for i, block in lm.layers.items() if layer_ids is None or int(i) in layer_ids
            for name, p in block.named_parameters() if ".lora_" in name}


@torch.no_grad()
def copy_into(own: dict[str, Tensor], tensors: dict[str, Tensor]):
    """Copies `tensors` into those of the same names: each name once, each shape right."""
    assert own.keys() == tensors.keys(), f"names differ: {sorted(own.keys() ^ tensors.keys())[:4]}"
    for name, p in own.items():
        assert p.shape == tensors[name].shape, f"{name}: expected {tuple(p.shape)}, found {tuple(tensors[name].shape)}"
        p.copy_(tensors[name])
