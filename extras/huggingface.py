"""Checkpoints in Hugging Face's form, read and written by hand.

In order: configuration; tensor names and the order of rows in q and k; safetensors; which weight
files a folder has; export.
"""
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora import merged
from model import (FLOATS, LM, ModelConfig, UserError, load_tokenizer, open_file, parse_json,
                   read_json, write_file, write_folder, write_json)

# ---- configuration ------------------------------------------------------------------------------


def from_config(c: dict) -> ModelConfig:
    """The architecture in a config.json of transformers 4 or 5."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}          # transformers 5, 4
    dim, heads = c["hidden_size"], c["num_attention_heads"]
    plain = {"model_type": c.get("model_type") == "llama",
             "hidden_act": c.get("hidden_act", "silu") in ("silu", "swish"),
             "rope type": rope.get("rope_type", rope.get("type", "default")) == "default",
             "head_dim": c.get("head_dim") in (None, dim // heads),
             "attention_bias": not c.get("attention_bias"), "mlp_bias": not c.get("mlp_bias"),
             "quantization_config": not c.get("quantization_config")}
    odd = [name for name, fine in plain.items() if not fine]
    if odd:
        raise UserError(f"only a plain LLaMA is supported, and here {odd[0]} is not one's")
    theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    return ModelConfig(dim, c["num_hidden_layers"], heads,
                       c.get("num_key_value_heads") or heads, c["vocab_size"],
                       c["intermediate_size"], c["rms_norm_eps"], theta,
                       bool(c.get("tie_word_embeddings")))


def read_config(folder: Path) -> ModelConfig:
    """config.json of a folder; a params.json beside it must say the same."""
    config = ModelConfig.parsed(folder / "config.json", from_config)
    if not (folder / "params.json").is_file():
        return config
    meta = ModelConfig.parsed(folder / "params.json", ModelConfig.from_params)
    for name, value in vars(config).items():
        if name != "tied" and getattr(meta, name) not in (value, -1):
            raise UserError(f"{folder}: params.json and config.json differ in {name}, "
                            f"{getattr(meta, name)} and {value}; remove one of the two")
    return config


def end_ids(folder: Path) -> list[int]:
    """Ids that end a text, as generation_config.json and config.json give them."""
    ids = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name, "a JSON object")
            found = content.get("eos_token_id") if isinstance(content, dict) else None
            ids += found if isinstance(found, list) else [found]
    return [i for i in ids if type(i) is int and i >= 0]


# ---- names --------------------------------------------------------------------------------------

HF_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


def from_hf_name(name: str) -> str | None:
    """Meta's name of a tensor, None where Hugging Face's LLaMA has no such tensor."""
    if name in HF_NAMES:
        return HF_NAMES[name]
    part = re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.weight", name)
    return f"{part[1]}.{HF_NAMES[part[2]]}.weight" if part and part[2] in HF_NAMES else None


def reorder(name: str, tensor: Tensor, config: ModelConfig, from_hf: bool) -> Tensor:
    """The rows of q and k, and of their LoRA's B, as the other format has them: Meta keeps a head's
    pairs as neighbours, Hugging Face as (first half, second half)."""
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
    if heads is None or name.endswith("lora_A"):
        return tensor
    pairs = (heads, 2, -1) if from_hf else (heads, -1, 2)
    return tensor.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)


def translated(path: Path, tensors: dict[str, Tensor], config: ModelConfig):
    """(name, Meta's name, tensor in Meta's order of rows), one after the other."""
    for key, tensor in tensors.items():
        if key.endswith("rotary_emb.inv_freq"):
            continue
        name = from_hf_name(key)
        if name is None:
            raise UserError(f"{path}: surplus tensor {key:.80}, which Hugging Face's LLaMA does "
                            f"not have beside {next(iter(tensors)):.80}")
        rows = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
        if rows and tensor.shape[:1] != (rows * config.head_dim,):
            raise UserError(f"{path}: {key} is {list(tensor.shape)}, expected "
                            f"{[rows * config.head_dim, config.dim]}")
        yield key, name, reorder(name, tensor, config, from_hf=True)


def to_hf(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights, or LoRA's A and B, by Hugging Face's names and with its order of rows in q and k."""
    names, out = {ours: theirs for theirs, ours in HF_NAMES.items()}, {}
    for name, tensor in tensors.items():
        tensor = reorder(name, tensor, config, from_hf=False)
        if part := re.fullmatch(r"(layers\.\d+)\.(.+)\.(weight|lora_A|lora_B)", name):
            name = f"model.{part[1]}.{names[part[2]]}.{part[3]}"
        out[names.get(name, name)] = tensor
    return out


# ---- safetensors --------------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_safetensors(path: Path, tensors: dict[str, Tensor]):
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape),
                        "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                                     # the data begin aligned

    def fill(file):
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    write_file(path, fill)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The format: 8 bytes (the header's length), a JSON header, the tensors' bytes. All mapped."""
    size = path.stat().st_size
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise UserError(f"{path}: the header's length {length} does not fit a file of {size} "
                            f"bytes (truncated?)")
        header = parse_json(file.read(length), path, "a safetensors header")
    try:
        entries = [(name, str(e["dtype"]), [*e["shape"]], *e["data_offsets"])
                   for name, e in header.items() if name != "__metadata__"]
        if not all(len(e) == 5 and {*map(type, [*e[2], *e[3:]])} == {int} for e in entries):
            raise ValueError("sizes and offsets must be integers")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: its header is damaged; download it again") from None
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    tensors, end = {}, 0
    for name, dtype, shape, start, stop in sorted(entries, key=lambda e: e[3:]):
        if dtype not in DTYPES:
            raise UserError(f"{path}: {name:.80} is {dtype:.80}; expected one of "
                            f"{', '.join(DTYPES)}")
        width = DTYPES[dtype].itemsize
        plausible = start == end and stop <= len(data) and min(shape, default=1) >= 0
        if not plausible or stop - start != math.prod(shape) * width:
            raise UserError(f"{path}: {name:.80} claims bytes {start!s:.20}..{stop!s:.20} for "
                            f"shape {shape!s:.80} in a file with {len(data)} bytes of data; "
                            f"truncated or damaged, download it again")
        raw = data[start:stop]
        raw = raw if (8 + length + start) % width == 0 else raw.clone()     # view() needs alignment
        tensors[name], end = raw.view(DTYPES[dtype]).view(shape), stop
    if end != len(data):
        raise UserError(f"{path}: {len(data) - end} bytes behind the last tensor; expected none")
    return tensors


# ---- weight files -------------------------------------------------------------------------------

def weight_sets(folder: Path, names: list[str]) -> list[list[Path]]:
    """The sets of weight files that `names` of a folder make."""
    for index, pattern in (("model.safetensors.index.json", r".*\.safetensors"),
                           ("pytorch_model.bin.index.json", r"pytorch_model.*\.bin")):
        if index in names:
            return [indexed_files(folder / index)]
        if found := [folder / name for name in names if re.fullmatch(pattern, name)]:
            return [found]
    return []


def indexed_files(index: Path) -> list[Path]:
    """The files that Hugging Face's index names; each must be one of its own folder."""
    try:
        names = sorted(set(read_json(index, "a JSON object with a weight_map")["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: expected a JSON object with a weight_map") from None
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not (index.parent / name).is_file():
            raise UserError(f"{index}: names {name!r}, which is not a file of this folder")
    return [index.parent / name for name in names]


# ---- export -------------------------------------------------------------------------------------

def to_params(config: ModelConfig) -> dict:
    """The inverse of from_params, with a multiplier where `multiple_of` 256 would not do."""
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")
    p = {name: getattr(config, name) for name in keys} | {"multiple_of": 256}
    if ModelConfig.from_params(p).hidden_dim != config.hidden_dim:
        multiplier = (config.hidden_dim + 0.5) / int(8 * config.dim / 3)
        p |= {"multiple_of": 1, "ffn_dim_multiplier": multiplier}
    return p


def to_config(c: ModelConfig) -> dict:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": c.dim, "num_hidden_layers": c.n_layers,
            "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
            "vocab_size": c.vocab_size, "intermediate_size": c.hidden_dim,
            "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
            "max_position_embeddings": 4096,                                # LLaMA 2's
            "tie_word_embeddings": c.tied}


def write_checkpoint(folder: Path, state: dict[str, Tensor], config: ModelConfig, source: Path,
                     form: str):
    """Weights by Meta's names as a folder of `form` meta or hf, with the tokenizer of `source`."""
    if form == "meta":
        write_file(folder / "consolidated.00.pth", lambda file: torch.save(
            {name: t.cpu() for name, t in state.items()}, file))
        write_json(folder / "params.json", to_params(config))
    else:
        tokens = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                  "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
        write_json(folder / "tokenizer_config.json", tokens)
        dtype = {"torch_dtype": str(state["norm.weight"].dtype).removeprefix("torch.")}
        write_json(folder / "config.json", to_config(config) | dtype)
        own = {name: t for name, t in state.items() if name != "output.weight" or not config.tied}
        write_safetensors(folder / "model.safetensors", to_hf(own, config))
    for path in source.glob("tokenizer*" if form == "hf" else "tokenizer.model"):
        shutil.copyfile(path, folder / path.name)


def export(lm, folder: Path, form: str, source: str):
    """A model as files for other tools. The folder appears once all of it is written."""
    state, config = {}, None
    if isinstance(lm, LM):                                              # FedPT's proxy is two
        state, config = merged(lm), replace(lm.config, n_layers=len(lm.layers))
    with torch.device("meta"):
        if not config or state.keys() != LM.empty(config).state_dict().keys():
            raise UserError("--export: this method's result is not a LLaMA's weights, so no other "
                            "tool could load it")
    write_folder(folder, lambda part: write_checkpoint(part, state, config, Path(source), form))
    print(f"{folder}: written as {form}", file=sys.stderr)
