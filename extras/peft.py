"""LoRA as PEFT's adapter folder, written and read, and as a start: --init-lora.

In order: write_peft; reading (PEFT's folder, a run's folder or its lora.pt); start_from.
"""
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from extras.huggingface import (meta_name, read_safetensors, reorder, to_hf, turned_heads,
                                write_safetensors)
from lora import LoRALinear, copy_into, lora_tensors
from model import (LM, ModelConfig, UserError, expecting, read_json, read_pickle, replacing,
                   write_json)

# What a plain LoRA's adapter_config.json says: these keys may have these values, or None.
PLAIN = {"peft_type": ["LORA"], "bias": ["none"], "task_type": ["CAUSAL_LM"],
         "init_lora_weights": [True, False, "gaussian"]}    # these leave the model's weights alone
# These do not change what is added to which matrix, or the tensors show it.
FREE = {"r", "lora_alpha", "lora_dropout", "base_model_name_or_path", "revision", "auto_mapping",
        "inference_mode", "peft_version", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
        "runtime_config"}
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def write_peft(folder: Path, lm: LM, base: str):
    """A PEFT adapter for the checkpoint `base` in its Hugging Face form; whole or not at all."""
    if not lora_tensors(lm) or len(lm.layers) != lm.config.n_layers:
        raise UserError("--format peft: needs LoRA on the whole model, such as adapfu's; take hf "
                        "or meta")
    lora = to_hf({name: p.detach() for name, p in lora_tensors(lm).items()}, lm.config)
    module = next(m for m in lm.modules() if isinstance(m, LoRALinear))
    rank, parts = len(module.lora_A), [name.split(".") for name in lora]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": rank, "lora_alpha": module.scale * rank, "lora_dropout": 0.0, "bias": "none",
              "inference_mode": True, "layers_to_transform": sorted({int(p[2]) for p in parts}),
              "target_modules": sorted({p[-2] for p in parts})}
    named = {f"base_model.model.{name}.weight": p for name, p in lora.items()}

    with replacing(folder) as part:
        part.mkdir()
        write_json(part / "adapter_config.json", config)
        write_safetensors(part / "adapter_model.safetensors", named)
    print(f"{folder}: written as peft", file=sys.stderr)


# ---- reading ------------------------------------------------------------------------------------

def check_plain(about: dict):
    """An adapter_config.json must say of all it says that it is plain LoRA."""
    for name, value in {"peft_type": None, **about}.items():
        fine = value in PLAIN[name] if name in PLAIN else name in FREE or not value
        if not fine and (value is not None or name == "peft_type"):
            raise UserError(f"{name} {value!r:.80}, which is not known to be plain LoRA")


def our_name(name: str) -> str:
    """`layers.3.attention.wq.lora_A` of PEFT's name of it; any other name is a UserError."""
    stem, _, letter = name.removeprefix("base_model.model.").partition(".lora_")
    ours = meta_name(f"{stem}.weight") or ""
    if not ours.startswith("layers.") or letter not in ("A.weight", "B.weight"):
        raise UserError(f"{name:.100}, which is not A or B of a LLaMA's matrix")
    return f"{ours.removesuffix('weight')}lora_{letter[0]}"


def translated(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A and B by our names, the rows of B of q and k in Meta's order."""
    out = {}
    for theirs, t in tensors.items():
        name = our_name(theirs)
        heads = turned_heads(name, config)
        if t.dim() != 2 or heads and len(t) != heads * config.head_dim:
            raise UserError(f"{theirs:.100} of another model, {list(t.shape)}")
        if name in out:
            raise UserError(f"{theirs:.100}, which is there by another name too; remove one")
        out[name] = reorder(name, t, config, from_hf=True)
    return out


def scaled(tensors: dict[str, Tensor], rank, alpha) -> dict[str, Tensor]:
    """A and (alpha / r) B, fp32, of a LoRA that has one rank throughout."""
    if type(rank) is not int or type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise UserError(f"rank {rank!r:.80}, alpha {alpha!r:.80}")
    for name, t in tensors.items():
        this, other = (0, "B") if name.endswith("A") else (1, "A")     # A: (r, d), B: (d, r)
        if t.dim() != 2 or t.shape[this] != rank:
            raise UserError(f"{name} {list(t.shape)}, which is not of rank {rank}")
        if name[:-1] + other not in tensors:
            raise UserError(f"{name} without its lora_{other}")
    return {name: t.float() * (alpha / rank if name.endswith("B") else 1)
            for name, t in tensors.items()}


def read_peft(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A and (alpha / r) B by our names, of PEFT's folder."""
    about = read_json(folder / "adapter_config.json", "PEFT's configuration of a LoRA")
    with expecting("an adapter of plain LoRA", f"--init-lora {folder}"):
        check_plain(about)
        found = [translated(read_pickle(path) if path.suffix == ".bin" else read_safetensors(path),
                            config) for path in map(folder.joinpath, WEIGHTS)
                 if os.path.isfile(path)]
        if not found:
            raise UserError(f"no {WEIGHTS[0]}")
        for other in found[1:]:
            if found[0].keys() != other.keys() or not all(
                    torch.equal(found[0][name], t) for name, t in other.items()):
                raise UserError(f"{' and '.join(WEIGHTS)} that differ; remove one of the two")
        return scaled(found[0], about["r"], about["lora_alpha"])


def read_run(file: Path) -> dict[str, Tensor]:
    """A and (alpha / r) B of a run's lora.pt; the run's folder says which configuration it has."""
    there = all(os.path.isfile(file.with_name(name)) for name in ("lora.pt", "summary.json"))
    if not there or file.name != "lora.pt":
        raise UserError(f"--init-lora {file}: expected the folder of a finished run, its lora.pt, "
                        f"or the folder of a PEFT LoRA adapter; found no such file")
    import train                                            # here: train.py needs no room to start
    about, tensors = train.read_run(file.parent), read_pickle(file)
    with expecting("what a run has learnt", f"--init-lora {file}"):
        lora = {name: t for name, t in tensors.items() if ".lora_" in name}
        return scaled(lora, about.rank, about.alpha)


# ---- --init-lora --------------------------------------------------------------------------------

def start_from(path: Path, server, config: ModelConfig, scale: float):
    """What `path` has of the server's LoRA is copied there; notes name the rest.

    A run's lora.pt knows emulator and adapter, and an emulator.pt beside it the emulator's weights.
    PEFT's was trained on the whole model, so of it the adapter takes its own layers, and the
    emulator, which shall mimic the untuned model, none. `scale`: alpha / r of the server's LoRA.
    """
    path = Path(path)
    file = path / "lora.pt" if os.path.isdir(path) else path
    if os.path.isfile(path / "adapter_config.json"):
        if os.path.exists(file):
            raise UserError(f"--init-lora {path}: holds both a PEFT adapter and a run's lora.pt; "
                            f"give {file}, or a folder with the adapter alone")
        fill(path, server.tuned, read_peft(path, config), scale)
    else:
        own = {n: p for lm in server.models().values() for n, p in lora_tensors(lm).items()}
        given, weights = read_run(file), file.with_name("emulator.pt")
        given |= read_pickle(weights) if os.path.isfile(weights) else {}
        fill(path, own | server.emulator, given, scale)


def fill(path: Path, own: dict[str, Tensor], given: dict[str, Tensor], scale: float):
    """Copies what `given` (A, (alpha / r) B, weights) has of `own`, once all of it is checked."""
    fits = {n: t / scale if n.endswith(".lora_B") else t for n, t in given.items() if n in own}
    if not any(".lora_" in n for n in fits):
        raise UserError(f"--init-lora {path}: of other layers or another model: it has "
                        f"{', '.join([*given][:2])}, here are {', '.join([*own][:2])}")
    for n, t in fits.items():
        if t.shape != own[n].shape:
            raise UserError(f"--init-lora {path}: of another --rank or another model: its {n} is "
                            f"{list(t.shape)}, here {list(own[n].shape)}")
        if not t.isfinite().all():
            raise UserError(f"--init-lora {path}: its {n} has numbers that are not finite; take "
                            f"what was learnt before, or another adapter")
    for text, names in (("not used", given.keys() - own.keys()),
                        ("not in it, starts anew", own.keys() - fits.keys())):
        if stems := sorted({name.rsplit(".", 1)[0] for name in names}):
            print(f"note: --init-lora: {text}: {', '.join(stems)}", file=sys.stderr)
    copy_into({n: own[n] for n in fits}, fits)
