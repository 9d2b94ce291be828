"""Drawing the next token at a temperature, within the top k and the top p: for several programs a
problem. `model.generate` asks for it where its temperature is above 0."""
from torch import Tensor
import torch


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator) -> Tensor:
    """Next tokens (B,) from logits (B, V), drawn with `generator`, a generator of their device.

    `top_k` 0: all. The nucleus (Holtzman et al. 2020) is the fewest pieces with top_p of what top_k
    left. Draws as torch.multinomial does, by the largest p / Exp(1), without its look at the
    values, for which the host would wait at every token of a GPU.
    """
    p = (logits.float() / max(temperature, 1e-6)).softmax(-1)       # below, fp32 may overflow
    p, ids = p.sort(dim=-1, descending=True, stable=True)
    if top_k:
        p[:, top_k:] = 0
    beyond = p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True)
    beyond[:, 0] = False                                            # the first piece always stays
    chance = p.masked_fill(beyond, 0) / torch.empty_like(p).exponential_(generator=generator)
    return ids.gather(1, chance.argmax(-1, keepdim=True))[:, 0]


def sampler(temperature: float, top_k: int, top_p: float, generator):
    return lambda logits: choose(logits, temperature, top_k, top_p, generator)
