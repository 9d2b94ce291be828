"""Checkpoints in Hugging Face's form, read and written by hand (safetensors, or torch.save's .bin).

In order: config.json; tensor names, and the order of the rows of q and k; safetensors; the weight
files of a folder; export (a folder that transformers, or Meta's code, loads).

    from extras.huggingface import export
    export(lm, Path("out"), "hf", source="tiny/llama")
"""
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora import LoRALinear
from model import (LM, ModelConfig, Tokenizer, UserError, expecting, open_file, parse_json,
                   read_bytes, read_json, read_pickle, replacing, write_file, write_json)


# ---- configuration ------------------------------------------------------------------------------

ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_config(folder: Path) -> ModelConfig:
    """config.json of a folder; a params.json beside it must say the same."""
    path, meta, other = folder / "config.json", folder / "params.json", None
    content = read_json(path, "a LLaMA's configuration")
    if os.path.isfile(meta):
        with expecting("a LLaMA's params.json", meta):
            other = ModelConfig.from_params(read_json(meta))
    if other and content == {}:                     # some hosts count downloads by such a file
        return other
    with expecting("a plain LLaMA's configuration", path):
        config = from_config(content)
    for name, value in vars(config).items() if other else ():
        theirs = value if name == "tied" else getattr(other, name)
        if theirs != value and (name, theirs) != ("vocab_size", -1):
            raise UserError(f"{folder}: params.json has {name} {theirs}, config.json {value}; "
                            f"remove the one that is wrong")
    return config


def from_config(c: dict) -> ModelConfig:
    """The architecture in a config.json of transformers 4 or 5. What is not LLaMA's is refused."""
    ropes = [c[name] for name in ("rope_parameters", "rope_scaling") if c.get(name)]   # 5, 4
    thetas = {rope.get("rope_theta") for rope in [c, *ropes]} - {None}
    dim, heads = c["hidden_size"], c["num_attention_heads"]
    plain = {"model_type": c.get("model_type") == "llama",
             "hidden_act": c.get("hidden_act", "silu") in ("silu", "swish"),    # one function
             "rope type": all(rope.get("rope_type", rope.get("type", "default")) == "default"
                              and rope.keys() <= ROPE_KEYS for rope in ropes),
             "rope_theta": len(thetas) <= 1,
             "partial_rotary_factor": all(rope.get("partial_rotary_factor") in (None, 1)
                                          for rope in [c, *ropes]),
             "head_dim": c.get("head_dim") in (None, dim // heads),
             "tie_word_embeddings": c.get("tie_word_embeddings") in (None, True, False),
             "is_causal": c.get("is_causal") in (None, True),            # False: made an encoder
             "layer_types": {*(c.get("layer_types") or [])} <= {"full_attention"}}
    plain |= {name: not c.get(name) for name in (
        "attention_bias", "mlp_bias", "quantization_config", "sliding_window", "auto_map")}
    for name in (name for name, fine in plain.items() if not fine):
        raise UserError(f"{name} {c.get(name, ropes)!r:.80}, which is not a plain LLaMA's")
    return ModelConfig(dim, c["num_hidden_layers"], heads, c.get("num_key_value_heads") or heads,
                       c["vocab_size"], c["intermediate_size"], c["rms_norm_eps"],
                       thetas.pop() if thetas else 10000.0, bool(c.get("tie_word_embeddings")))


def end_ids(folder: Path) -> list[int]:
    """The ids that end a text, as transformers' `generate` takes them: generation_config.json's,
    else config.json's."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        content = read_json(path, "a JSON object") if os.path.isfile(path) else {}
        with expecting("an eos_token_id that is an id or a list of ids", path):
            if (ids := content.get("eos_token_id")) is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
                    raise ValueError(str(ids))
                return ids
    return []


# ---- names --------------------------------------------------------------------------------------

NAMES = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
         "lm_head.weight": "output.weight", "self_attn.q_proj": "attention.wq",
         "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
         "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
         "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
         "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


def meta_name(name: str) -> str | None:
    """Meta's name of a tensor; None where Hugging Face's LLaMA has no such tensor."""
    if name in NAMES:
        return NAMES[name]
    part = re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.weight", name)
    return f"{part[1]}.{NAMES[part[2]]}.weight" if part and part[2] in NAMES else None


def turned_heads(name: str, config: ModelConfig) -> int:
    """How many heads lie in the rows of this tensor that the two forms order differently; 0: none.
    They are those of wq and wk, and of the B of their LoRA."""
    kind = "" if name.endswith("lora_A") else name.split(".")[-2]
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(kind, 0)


def reorder(name: str, tensor: Tensor, config: ModelConfig, from_hf: bool) -> Tensor:
    """The rows as the other form has them: Meta keeps a head's pairs as neighbours, Hugging Face as
    (first half, second half)."""
    heads = turned_heads(name, config)
    if not heads:
        return tensor
    pairs = (heads, 2, -1) if from_hf else (heads, -1, 2)
    return tensor.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)


def translated(path: Path, tensors: dict[str, Tensor], config: ModelConfig):
    """Of a file with Hugging Face's names: (Meta's name, tensor in Meta's order of rows), one after
    the other. A name of another scheme is a UserError."""
    for key, tensor in tensors.items():
        name = meta_name(key)
        if key.endswith("rotary_emb.inv_freq"):
            continue
        if name is None:
            raise UserError(f"{path}: surplus tensor {key:.80}, which a LLaMA by Hugging Face's "
                            f"names does not have; other names of the file are theirs")
        heads = turned_heads(name, config)
        if heads and tensor.shape[:1] != (heads * config.head_dim,):
            raise UserError(f"{path}: {key} is {list(tensor.shape)}, expected "
                            f"{[heads * config.head_dim, config.dim]}")
        yield name, reorder(name, tensor, config, from_hf=True)


def to_hf(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights, or LoRA's A and B, by Hugging Face's names and with its order of rows in q and k."""
    names, out = {ours: theirs for theirs, ours in NAMES.items()}, {}
    for name, tensor in tensors.items():
        tensor = reorder(name, tensor, config, from_hf=False)
        if part := re.fullmatch(r"(layers\.\d+)\.(.+)\.(weight|lora_A|lora_B)", name):
            name = f"model.{part[1]}.{names[part[2]]}.{part[3]}"
        out[names.get(name, name)] = tensor
    return out


# ---- safetensors --------------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_safetensors(path: Path, tensors: dict[str, Tensor]):
    """Tensors of DTYPES by name, on any device."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape),
                        "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                                     # the data begin aligned

    def fill(file):
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    write_file(path, fill)


def read_header(path: Path) -> tuple[int, list]:
    """Where the tensors' bytes begin, and (name, dtype, shape, start, end) of each, as claimed."""
    with open_file(path) as file:
        size, length = os.path.getsize(path), int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise UserError(f"{path}: the header's length {length} does not fit a file of {size} "
                            f"bytes (truncated?)")
        header = parse_json(file.read(length), path, "a safetensors header")
    with expecting("a safetensors header; download it again", path):
        entries = [(name, str(e["dtype"]), [*e["shape"]], *e["data_offsets"])
                   for name, e in header.items() if name != "__metadata__"]
        if not all(len(e) == 5 and {*map(type, [*e[2], *e[3:]])} == {int} for e in entries):
            raise ValueError("sizes and offsets that are no integers")
    return 8 + length, entries


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The format: 8 bytes (the header's length), a JSON header, the tensors' bytes. All mapped.
    Strict: the tensors lie one behind the other and fill the file."""
    begin, entries = read_header(path)
    data = torch.from_file(str(path), shared=False, size=os.path.getsize(path),
                           dtype=torch.uint8)[begin:]
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
        raw = raw if (begin + start) % width == 0 else raw.clone()      # view() needs alignment
        tensors[name], end = raw.view(DTYPES[dtype]).view(shape), stop
    if end != len(data):
        raise UserError(f"{path}: {len(data) - end} bytes behind the last tensor; expected none")
    return tensors


# ---- weight files -------------------------------------------------------------------------------

SHARD = re.compile(r"(.+?)[-_.](\d+)-of-(\d+)\.(safetensors|bin)")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
USUAL = ("model", "pytorch_model", "consolidated")      # how the names of a model's files begin


def weight_files(folder: Path) -> list[Path]:
    """A folder's .safetensors and .bin files with weights; each tensor stands whole in one.

    A folder may have the model twice, for example as safetensors and as .bin. Then each set must
    hold all of it; `load_weights` compares their numbers.
    """
    names = sorted(path.name for path in folder.glob("[!.]*"))
    meta = [name for name in names if re.fullmatch(r"consolidated\..*pth", name)]
    sets = [meta] if meta else []
    sets += [indexed(folder / name) for name in INDICES if name in names]
    rest = [name for name in names if name.endswith((".safetensors", ".bin"))
            and not any(name in files for files in sets)]
    sets += numbered(folder, [name for name in rest if name.startswith(USUAL)])
    sets = sets or ([rest] if rest else [])
    for files in sets if len(sets) > 1 else []:
        check_complete(folder, files)
    return [folder / name for files in sets for name in files if files is not meta]


def indexed(index: Path) -> list[str]:
    """The files that Hugging Face's index names; each must be one of its own folder."""
    content = read_json(index, "a JSON object with a weight_map")
    with expecting("a JSON object with a weight_map", index):
        names = sorted(set(content["weight_map"].values()))
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not os.path.isfile(index.parent / name):
            raise UserError(f"{index}: names {name!r:.80}, which is not a file of this folder; "
                            f"is the download complete?")
    return names


def numbered(folder: Path, names: list[str]) -> list[list[str]]:
    """Files by the set that they belong to: one alone, or all of …-00001-of-00003 and so on."""
    sets = {}
    for name in sorted(names, key=lambda name: name.endswith(".bin")):
        part = SHARD.fullmatch(name)
        sets.setdefault((part[1], int(part[3]), part[4]) if part else name, []).append(name)
    for key, files in sets.items():
        if isinstance(key, tuple) and len(files) != key[1]:
            raise UserError(f"{folder}: expected {key[1]} files {key[0]}-….{key[2]}, found "
                            f"{len(files)}: {', '.join(files):.120}; is the download complete?")
    return list(sets.values())


def check_complete(folder: Path, files: list[str]):
    """One of two sets of weights must hold every tensor: two halves are not one model."""
    config, held = replace(ModelConfig.read(folder), vocab_size=1), set()   # names are all it takes
    for path in (folder / name for name in files):
        read = read_safetensors if path.suffix == ".safetensors" else read_pickle
        held |= {meta_name(name) or name for name in read(path)}
    with torch.device("meta"):
        missing = dict(LM.empty(config).named_parameters()).keys() - held
    if missing:
        raise UserError(f"{folder}: has two sets of weights, and {', '.join(files):.120} lack "
                        f"{len(missing)} tensors such as {min(missing)}; remove one of the two")


# ---- export -------------------------------------------------------------------------------------

KEPT = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "chat_template.json", "chat_template.jinja")


def to_params(config: ModelConfig) -> dict:
    """The inverse of from_params, with a multiplier where `multiple_of` 256 would not do."""
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")
    p = {name: getattr(config, name) for name in keys} | {"multiple_of": 256}
    if ModelConfig.from_params(p).hidden_dim != config.hidden_dim:
        multiplier = (config.hidden_dim + 0.5) / int(8 * config.dim / 3)
        p |= {"multiple_of": 1, "ffn_dim_multiplier": multiplier}
    return p


def to_config(c: ModelConfig) -> dict:
    """The inverse of from_config, as transformers 4 and 5 read it."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": c.dim, "num_hidden_layers": c.n_layers,
            "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
            "vocab_size": c.vocab_size, "intermediate_size": c.hidden_dim,
            "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "head_dim": c.head_dim,
            "tie_word_embeddings": c.tied}


def facts(path: Path) -> dict:
    """A JSON object that the source has, or {}."""
    content = read_json(path, "a JSON object") if os.path.isfile(path) else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def special_tokens(tokenizer) -> dict:
    """What tokenizer_config.json says where the source does not say it, as Meta's."""
    piece = tokenizer.pieces.id_to_piece
    spaced = tokenizer.pieces.encode("a", out_type=str)[0].startswith("\u2581")    # before a text
    return {"tokenizer_class": "LlamaTokenizer", "bos_token": piece(tokenizer.bos),
            "eos_token": piece(tokenizer.eos), "unk_token": piece(tokenizer.pieces.unk_id()),
            "add_bos_token": True, "add_eos_token": False, "add_prefix_space": spaced,
            "legacy": False, "clean_up_tokenization_spaces": False}


def write_hf(folder: Path, state: dict[str, Tensor], config: ModelConfig, source: Path):
    """The source's own facts, with what the model and its tokenizer say in place of theirs."""
    tokenizer = Tokenizer(source / "tokenizer.model", end_ids(source))
    theirs = facts(source / "config.json")
    ends = list(tokenizer.ends) if len(tokenizer.ends) > 1 else tokenizer.eos
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": ends}
    length = facts(source / "params.json").get("max_seq_len") or 4096       # LLaMA 2's
    dtype = str(state["layers.0.attention.wq.weight"].dtype).removeprefix("torch.")
    theirs = {"max_position_embeddings": length} | theirs | to_config(config) | ids
    theirs.pop("layer_types", None)                             # one a layer, of the source's
    theirs.pop("dtype", None)                                   # transformers 5's name of the next
    write_json(folder / "config.json", theirs | {"torch_dtype": dtype})
    write_json(folder / "generation_config.json", facts(source / "generation_config.json") | ids)
    if not os.path.isfile(source / "tokenizer.json"):           # which knows all of it itself
        about, own = facts(source / "tokenizer_config.json"), special_tokens(tokenizer)
        theirs = {name: about[name] for name in about if about[name] != ""}     # old ones: no token
        made_with = {name: own[name] for name in ("tokenizer_class", "add_bos_token",
                                                  "add_eos_token")}
        write_json(folder / "tokenizer_config.json", own | theirs | made_with)
    own = {name: t for name, t in state.items() if name != "output.weight" or not config.tied}
    write_safetensors(folder / "model.safetensors", to_hf(own, config))


def write_meta(folder: Path, state: dict[str, Tensor], config: ModelConfig, source: Path):
    more = facts(source / "params.json")
    more = {name: more[name] for name in ("max_seq_len", "max_batch_size") if name in more}
    write_json(folder / "params.json", to_params(config) | more)
    write_file(folder / "consolidated.00.pth", lambda file: torch.save(
        {name: t.cpu() for name, t in state.items()}, file))


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


def export(lm, folder: Path, form: str, source):
    """A model as a folder for other tools, which appears once all of it is written.

    form: "hf" or "meta" (the merged weights), "peft" (the LoRA alone). `source`: the checkpoint
    that the model was made from; its tokenizer and what else it says of itself go along.
    """
    state, config, source = {}, None, Path(source)
    if isinstance(lm, LM):                                              # FedPT's proxy is two
        state, config = merged(lm), replace(lm.config, n_layers=len(lm.layers))
    with torch.device("meta"):
        if not config or state.keys() != LM.empty(config).state_dict().keys():
            raise UserError("--export: this method's result is not a LLaMA's weights, so no other "
                            "tool could load it")
    folder = folder.absolute()  # "." has no name
    if os.path.isfile(folder) or os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"--export {folder}: exists already; choose another name")
    if form == "peft":
        from extras.peft import write_peft
        return write_peft(folder, lm, str(source))

    with replacing(folder) as part:
        part.mkdir()
        (write_hf if form == "hf" else write_meta)(part, state, config, source)
        for name in KEPT if form == "hf" else ("tokenizer.model",):
            if os.path.isfile(source / name) and not os.path.exists(part / name):
                write_file(part / name, lambda file: file.write(read_bytes(source / name)))
    print(f"{folder}: written as {form}", file=sys.stderr)
