"""LoRA by hand (Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x, W frozen."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import LM, Block

# PAPER SILENT: which matrices carry LoRA. 131,072 parameters a layer (Table 5) fit any two
# square ones; these two are the authors' code's.
TARGETS = ("wq", "wv")  # ABLATE: what carries LoRA

class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen. B = 0, so it starts as W.
    W *is* base.weight: emulator and full model share one tensor, under its Meta name.
    A and B stay fp32: in bf16 an AdamW step below 1/256 of a weight rounds to nothing."""
    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.weight, device = base.weight, base.weight.device  # W: (d_out, d_in), no copy
        A = nn.init.kaiming_uniform_(torch.empty(rank, d_in), a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(A.to(device))  # A: (r, d_in)
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, device=device))  # B: (d_out, r)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, A), B)

def twin_blocks(lm: LM) -> dict[str, Block]:
    """New blocks around `lm`'s frozen tensors, so that LoRA in them leaves `lm` alone."""
    with torch.device("meta"):
        twins = {i: Block(lm.config).requires_grad_(False) for i in lm.layers}
    for i, block in lm.layers.items():
        twins[i].load_state_dict(block.state_dict(keep_vars=True), assign=True)
    return twins

def add_lora(lm: LM, rank: int, alpha: float, generator: torch.Generator) -> LM:
    """A new LM that shares `lm`'s tensors and has LoRA on TARGETS in every block.
    A is drawn on the CPU, layer by layer: a seed is the same start on every device."""
    twins = twin_blocks(lm)
    for twin in twins.values():
        for name in TARGETS:
            base = getattr(twin.attention, name)
            setattr(twin.attention, name, LoRALinear(base, rank, alpha, generator))
    return lm.with_layers(twins)

def lora_tensors(lm: LM, layer_ids=None) -> dict[str, nn.Parameter]:
    """A and B by name (`layers.30.attention.wq.lora_A`), of `layer_ids` or of all layers."""
    return {f"layers.{i}.{name}": p for i, block in lm.layers.items()
            if layer_ids is None or int(i) in layer_ids
            for name, p in block.named_parameters() if ".lora_" in name}

@torch.no_grad()
def copy_into(own: dict[str, Tensor], tensors: dict[str, Tensor]):
    """Copies `tensors` into those of the same names and shapes."""
    differ = sorted(own.keys() ^ tensors.keys())
    assert not differ, f"names differ: {differ[:4]}"
    for name, p in own.items():
        t = tensors[name]
        assert p.shape == t.shape, f"{name}: expected {tuple(p.shape)}, found {tuple(t.shape)}"
        p.copy_(t)
