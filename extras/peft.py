"""PEFT's LoRA adapters, and a run's lora.pt, as a start; PEFT's as a form of export."""
import sys
from pathlib import Path

from torch import Tensor

from extras.huggingface import (from_hf_name, read_safetensors, reorder, to_hf,
                                write_safetensors)
from lora import LM, LoRALinear, copy_into, lora_tensors
from model import ModelConfig, UserError, read_json, read_pickle, write_json

NOT_PLAIN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")     # of PEFT's


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
    write_json(folder / "adapter_config.json", config)
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
        about = read_json(folder / about)
        scale = about["lora_alpha" if is_peft else "alpha"] / about["r" if is_peft else "rank"]
        odd = [name for name in NOT_PLAIN if about.get(name)]
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
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
            name = str(from_hf_name(f"{stem}.weight")).removesuffix("weight") + f"lora_{letter[:1]}"
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
