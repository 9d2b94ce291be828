"""LoRA by hand (Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x, W frozen.

In order: LoRALinear; twin_blocks and add_lora (an LM around the same frozen tensors, with LoRA on
wq and wv of every block); lora_tensors (A and B by name) and copy_into (load them, strict); merged
(W + (alpha / r) B A); write_peft, read_lora, start_from (PEFT's adapter folders, a run's lora.pt).
"""
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (LM, Block, ModelConfig, UserError, from_hf_name, read_pickle, read_safetensors,
                   reorder, to_hf, write_safetensors)

TARGETS = ("wq", "wv")                  # ABLATE: which matrices of an attention carry LoRA
NOT_PLAIN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")     # of PEFT's


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen. B = 0, so it starts as W.

    W *is* base.weight: emulator and full model share one tensor, under its Meta name.
    A and B stay fp32: in bf16 an AdamW step below about 1/256 of a weight rounds to nothing.
    """
    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.weight, device = base.weight, base.weight.device       # W: (d_out, d_in), no copy
        A = nn.init.kaiming_uniform_(torch.empty(rank, d_in), a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(A.to(device))                                # A: (r, d_in)
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, device=device))     # B: (d_out, r)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:                         # (..., d_in) -> (..., d_out)
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, A), B)


def twin_blocks(lm: LM) -> dict[int, Block]:
    """Second blocks around the *same* frozen tensors: to be built into, `lm` stays as it is."""
    twins = {}
    for i, block in lm.layers.items():
        with torch.device("meta"):
            twins[int(i)] = Block(lm.config)
        twins[int(i)].load_state_dict(block.state_dict(keep_vars=True), assign=True)
        twins[int(i)].requires_grad_(False)
    return twins


def add_lora(lm: LM, rank: int, alpha: float, generator: torch.Generator) -> LM:
    """A second LM around `lm`'s tensors, whose every block has LoRA on TARGETS.

    A is drawn on the CPU, layer by layer, so that a seed means the same start on every device.
    """
    twins = twin_blocks(lm)
    for twin in twins.values():
        for name in TARGETS:
            base = getattr(twin.attention, name)
            setattr(twin.attention, name, LoRALinear(base, rank, alpha, generator))
    return lm.with_layers(twins)


def lora_tensors(lm: LM, layer_ids=None) -> dict[str, nn.Parameter]:
    """A and B by name (`layers.30.attention.wq.lora_A`), of `layer_ids` or of every layer."""
    return {f"layers.{i}.{name}": p for i, block in lm.layers.items()
            if layer_ids is None or int(i) in layer_ids
            for name, p in block.named_parameters() if ".lora_" in name}


@torch.no_grad()
def copy_into(own: dict[str, Tensor], tensors: dict[str, Tensor]):
    """Copies `tensors` into those of the same names: each name once, each shape right."""
    assert own.keys() == tensors.keys(), f"names differ: {sorted(own.keys() ^ tensors.keys())[:4]}"
    for name, p in own.items():
        t = tensors[name]
        assert p.shape == t.shape, f"{name}: expected {tuple(p.shape)}, found {tuple(t.shape)}"
        p.copy_(t)


# ---- in and out ---------------------------------------------------------------------------------

@torch.no_grad()
def merged(lm: LM) -> dict[str, Tensor]:
    """`lm`'s weights by Meta's names, W + (alpha / r) B A for W, layers numbered from 0. The sum is
    made in fp32, on a copy, and cast back to W's dtype."""
    number = {old: str(new) for new, old in enumerate(lm.layers)}
    loras, state = {n: m for n, m in lm.named_modules() if isinstance(m, LoRALinear)}, {}
    for name, p in lm.state_dict().items():
        if m := loras.get(name.removesuffix(".weight")):
            p = (p.float() + m.scale * (m.lora_B @ m.lora_A)).to(p.dtype)
        part = name.split(".")
        if part[0] == "layers":
            name = ".".join(["layers", number[part[1]], *part[2:]])
        if ".lora_" not in name:
            state[name] = p
    return state


def write_peft(folder: Path, lm: LM, base: str):
    """A PEFT adapter for the checkpoint `base` in its Hugging Face form."""
    lora = to_hf({name: p.detach() for name, p in lora_tensors(lm).items()}, lm.config)
    module = next(m for m in lm.modules() if isinstance(m, LoRALinear))
    rank, parts = len(module.lora_A), [name.split(".") for name in lora]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": rank, "lora_alpha": module.scale * rank, "lora_dropout": 0.0, "bias": "none",
              "inference_mode": True,
              "layers_to_transform": sorted({int(p[2]) for p in parts}),
              "target_modules": sorted({p[-2] for p in parts})}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    named = {f"base_model.model.{name}.weight": p for name, p in lora.items()}
    write_safetensors(folder / "adapter_model.safetensors", named)


def is_peft_folder(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def read_lora(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A and (alpha / r) B by our names, fp32: of PEFT's folder, of a run's, or of its lora.pt."""
    is_peft, folder = is_peft_folder(path), path if path.is_dir() else path.parent
    about, weights = (("adapter_config.json", "adapter_model.safetensors") if is_peft else
                      ("config.json", "lora.pt"))
    file = path if path.is_file() else path / weights
    try:
        about = json.loads((folder / about).read_text())
        scale = about["lora_alpha" if is_peft else "alpha"] / about["r" if is_peft else "rank"]
        odd = [name for name in NOT_PLAIN if about.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise UserError(f"--init-lora {path}: expected the folder of a run or of a PEFT LoRA "
                        f"adapter") from None
    if odd:
        raise UserError(f"--init-lora {path}: only plain LoRA can be read, this one has {odd[0]}")
    if not file.is_file():
        raise UserError(f"--init-lora {path}: no {file.name} in it")
    tensors = {}
    for name, t in (read_safetensors if is_peft else read_pickle)(file).items():
        if is_peft:
            stem, _, letter = name.removeprefix("base_model.model.").partition(".lora_")
            name = from_hf_name(f"{stem}.weight").removesuffix("weight") + f"lora_{letter[:1]}"
            if name.endswith("wq.lora_B") and len(t) == config.dim:
                t = reorder(name, t, config, from_hf=True)
        tensors[name] = t.float() * scale if name.endswith("B") else t.float()
    return tensors


def start_from(path: Path, server, config: ModelConfig, scale: float):
    """--init-lora: what `path` has of the server's LoRA is copied there; notes name the rest.

    A run's lora.pt knows emulator and adapter. PEFT's was trained on the whole model, so of it
    the adapter takes its own layers, and the emulator, which shall mimic the untuned model, none.
    """
    own = {name: p for lm in server.models().values() for name, p in lora_tensors(lm).items()}
    own = server.tuned if is_peft_folder(path) else own
    given = read_lora(path, config)
    fits = {n: t / scale if n.endswith("B") else t for n, t in given.items() if n in own}
    if not fits:
        raise UserError(f"--init-lora {path}: of other layers or another model: it has "
                        f"{', '.join([*given][:2])}, here are {', '.join([*own][:2])}")
    for n, t in fits.items():
        if t.shape != own[n].shape:
            raise UserError(f"--init-lora {path}: of another --rank or another model: its {n} is "
                            f"{list(t.shape)}, here {list(own[n].shape)}")
    for text, names in (("not used", given.keys() - own.keys()),
                        ("not in it, starts anew", own.keys() - fits.keys())):
        if stems := sorted({name.rsplit(".", 1)[0] for name in names}):
            print(f"note: --init-lora: {text}: {', '.join(stems)}", file=sys.stderr)
    copy_into({n: own[n] for n in fits}, fits)
