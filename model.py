"""A LLaMA decoder by hand: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), with Meta's names.

In order: UserError, ModelConfig; RMSNorm, rotate, KVCache, Attention, FeedForward, Block, LM;
Tokenizer; load (Meta's and Hugging Face's folders, mapped, strict, only the layers asked for) and
write_checkpoint (either of them); generate (greedy or sampled, batched, preallocated cache).

Shapes: B sequences, T tokens, D dim, H query heads, G key/value heads, d = D / H, V vocabulary.

    from model import load
    lm, tokenizer = load("tiny/llama")
"""
import json
import math
import re
import shutil
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


class UserError(ValueError):
    """A mistake of the user's, in one line: what was expected, what was found, what to try."""


# ---- configuration ------------------------------------------------------------------------------

PARAMS_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps",
               "ffn_dim_multiplier", "rope_theta", "max_seq_len", "max_batch_size"}
IGNORABLE_IF_FALSE = {"use_scaled_rope", "attention_bias", "mlp_bias"}
LARGEST = {"dim": 2**20, "n_layers": 2**10, "n_heads": 2**16, "n_kv_heads": 2**16,
           "hidden_dim": 2**22, "vocab_size": 2**22}


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, as params.json (Meta) or config.json (Hugging Face) gives it."""
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int                # -1 in old params.json: the tokenizer's
    hidden_dim: int                # of the feed-forward
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = False             # output.weight is tok_embeddings.weight

    def __post_init__(self):
        for name, most in LARGEST.items():
            value = getattr(self, name)
            ours = (name, value) == ("vocab_size", -1)
            if not ours and not (type(value) is int and 1 <= value <= most):
                raise UserError(f"{name} must be an integer in 1..{most}, found {value!r:.80}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise UserError(f"{name} must be a number above 0, found {value!r:.80}")
        if self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise UserError(f"dim {self.dim} must be a multiple of 2 x n_heads {self.n_heads}, and "
                            f"n_heads of n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    @classmethod
    def read(cls, folder) -> "ModelConfig":
        """Reads `folder`/params.json or config.json; nothing else is opened."""
        for name, parse in (("params.json", cls.from_params), ("config.json", cls.from_hf)):
            path = Path(folder) / name
            if path.is_file():
                try:
                    return parse(json.loads(path.read_text()))
                except UserError as error:
                    raise UserError(f"{path}: {error}") from None
                except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(f"{path}: expected a LLaMA's configuration as a JSON object; "
                                    f"{error!r:.120}") from None
        raise UserError(f"--ckpt {folder}: expected a folder with params.json (Meta) or "
                        f"config.json (Hugging Face)")

    @classmethod
    def from_params(cls, p: dict) -> "ModelConfig":
        odd = [k for k in p if k not in PARAMS_KEYS and not (k in IGNORABLE_IF_FALSE and not p[k])]
        if odd:
            raise UserError(f"{odd[0]!r} is not part of a plain LLaMA 1 or 2; only that is read")
        hidden = int(2 * 4 * p["dim"] / 3)
        if p.get("ffn_dim_multiplier") is not None:
            hidden = int(p["ffn_dim_multiplier"] * hidden)
        hidden = p["multiple_of"] * math.ceil(hidden / p["multiple_of"])
        return cls(p["dim"], p["n_layers"], p["n_heads"], p.get("n_kv_heads") or p["n_heads"],
                   p.get("vocab_size", -1), hidden, p["norm_eps"], p.get("rope_theta") or 10000.0)

    def to_params(self) -> dict:
        """The inverse of from_params, with a multiplier where `multiple_of` 256 would not do."""
        p = {name: value for name, value in vars(self).items() if name in PARAMS_KEYS}
        p["multiple_of"] = 256
        if self.from_params(p).hidden_dim != self.hidden_dim:
            multiplier = (self.hidden_dim + 0.5) / int(8 * self.dim / 3)
            p |= {"multiple_of": 1, "ffn_dim_multiplier": multiplier}
        return p

    @classmethod
    def from_hf(cls, c: dict) -> "ModelConfig":
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}      # transformers 5, 4
        dim, heads = c["hidden_size"], c["num_attention_heads"]
        plain = {"model_type": c.get("model_type") == "llama",
                 "hidden_act": c.get("hidden_act", "silu") == "silu",
                 "rope type": rope.get("rope_type", rope.get("type", "default")) == "default",
                 "head_dim": c.get("head_dim") in (None, dim // heads),
                 "attention_bias": not c.get("attention_bias"), "mlp_bias": not c.get("mlp_bias"),
                 "quantization_config": not c.get("quantization_config")}
        odd = [name for name, fine in plain.items() if not fine]
        if odd:
            raise UserError(f"only a plain LLaMA is supported, and here {odd[0]} is not one's")
        theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
        return cls(dim, c["num_hidden_layers"], heads, c.get("num_key_value_heads") or heads,
                   c["vocab_size"], c["intermediate_size"], c["rms_norm_eps"], theta,
                   bool(c.get("tie_word_embeddings")))

    def to_hf(self) -> dict:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "hidden_size": self.dim, "num_hidden_layers": self.n_layers,
                "num_attention_heads": self.n_heads, "num_key_value_heads": self.n_kv_heads,
                "vocab_size": self.vocab_size, "intermediate_size": self.hidden_dim,
                "rms_norm_eps": self.norm_eps, "rope_theta": self.rope_theta,
                "max_position_embeddings": 4096,                            # LLaMA 2's
                "tie_word_embeddings": self.tied}


# ---- the decoder --------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:                        # (..., D) -> (..., D)
        z = x.float()                                              # squares overflow in fp16
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
        return z.to(x.dtype) * self.weight


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, d), Meta's layout: neighbours (2i, 2i+1) are one complex
    number, turned by its position's angle: on the CPU ten times faster than cos and sin apart."""
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))    # (B, T, H, d/2)
    return torch.view_as_real(z * torch.view_as_complex(rope)).flatten(-2).to(x.dtype)


class KVCache:
    """One block's keys and values, preallocated as (B, G, S, d). A slot is an absolute position,
    so a row's padding lies after its prompt and is overwritten by what it generates."""

    def __init__(self, config: ModelConfig, batch: int, slots: int, like: Tensor):
        shape = (batch, config.n_kv_heads, slots, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)

    def write(self, k: Tensor, v: Tensor, slots, mask):            # k, v: (B, G, T, d)
        if slots is None:                                          # the prompts, from slot 0 on
            self.k[:, :, :k.shape[2]], self.v[:, :, :k.shape[2]] = k, v
            return k, v
        rows, seen = torch.arange(len(slots), device=slots.device), mask.shape[-1]
        self.k[rows, :, slots], self.v[rows, :, slots] = k[:, :, 0], v[:, :, 0]
        return self.k[:, :, :seen], self.v[:, :, :seen]

    def keep(self, rows: Tensor):
        self.k, self.v = self.k[rows], self.v[rows]


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, past=None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rope), rotate(k, rope), v))
        mask = None
        if past is not None:
            cache, slots, mask = past
            k, v = cache.write(k, v, slots, mask)
        # q (B, H, T, d), k and v (B, G, S, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.wo(y.transpose(1, 2).flatten(2))               # (B, T, D)


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))            # SwiGLU


class Block(nn.Module):
    """One pre-norm decoder layer: the unit that FedBiOT drops, freezes, ships and averages.

    It does not know its own index: an emulator has fewer blocks, and each must compute the
    same thing at any depth. `past` is (its KVCache, slots, mask), see LM.hidden. `rows` (N,), where
    given, are the positions b T + t that are wanted: the feed-forward is spared the others.
    """
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attention = Attention(c)
        self.feed_forward = FeedForward(c)
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, past=None, rows=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, past)  # tokens look at each other
        if rows is not None:
            x = x.flatten(0, 1)[rows]                               # (B, T, D) -> (N, D)
        return x + self.feed_forward(self.ffn_norm(x))              # each token on its own


class LM(nn.Module):
    """Embeddings, some blocks, final norm and head. `layers` is keyed by the *full* model's layer
    index, so a compressed model's tensors keep the names that they have in the checkpoint."""

    def __init__(self, config, layers: dict, tok_embeddings, norm, output):
        super().__init__()
        self.config = config
        self.tok_embeddings = tok_embeddings
        self.layers = nn.ModuleDict({str(i): layers[i] for i in sorted(layers)})
        self.norm = norm
        self.output = output

    @classmethod
    def empty(cls, config: ModelConfig, layer_ids=None) -> "LM":
        """A model with PyTorch's default initialisation; none under torch.device("meta")."""
        V, D = config.vocab_size, config.dim
        ids = range(config.n_layers) if layer_ids is None else layer_ids
        # the numbers of nn.Embedding(V, D), which under torch.device("meta") takes most of a second
        embeddings = nn.Embedding.from_pretrained(torch.randn(V, D), freeze=False)
        lm = cls(config, {i: Block(config) for i in ids}, embeddings, RMSNorm(D, config.norm_eps),
                 nn.Linear(D, V, bias=False))
        if config.tied:
            lm.output.weight = lm.tok_embeddings.weight
        return lm

    def take(self, state: dict) -> "LM":
        """`state`'s tensors in place of its own, made on meta: frozen, and tied ones stay one."""
        if self.config.tied:
            state = state | {"output.weight": state["tok_embeddings.weight"]}
        self.load_state_dict(state, assign=True)
        if self.config.tied:
            self.output.weight = self.tok_embeddings.weight     # shipped and walked once
        return self.requires_grad_(False)

    def with_layers(self, layers: dict) -> "LM":
        """The same embeddings, norm and head around other blocks. Nothing is copied."""
        return LM(self.config, layers, self.tok_embeddings, self.norm, self.output)

    def caches(self, batch: int, slots: int) -> list[KVCache]:
        return [KVCache(self.config, batch, slots, self.tok_embeddings.weight) for _ in self.layers]

    def rope(self, positions: Tensor) -> Tensor:
        """Cosine and sine of every position's angles, fp32: (T,) -> (T, 1, d/2, 2)."""
        d = self.config.head_dim
        exponents = torch.arange(0, d, 2, device=positions.device).float() / d
        freqs = self.config.rope_theta ** -exponents
        angles = positions.float()[..., None, None] * freqs
        return torch.stack((angles.cos(), angles.sin()), -1)

    def hidden(self, tokens: Tensor, caches=None, slots=None, mask=None, rows=None) -> Tensor:
        """tokens (B, T) -> (B, T, D) after the final norm, or (N, D) at positions b T + t = rows.
        With `caches` (one a block): the prompts if `slots` is None, else one token a row at
        position slots (B,), mask (B, 1, 1, S) over the cache."""
        T, device = tokens.shape[1], tokens.device
        rope = self.rope(torch.arange(T, device=device) if slots is None else slots[:, None])
        x = self.tok_embeddings(tokens)                                 # (B, T, D)
        for i, block in enumerate(self.layers.values()):
            last = i + 1 == len(self.layers)
            x = block(x, rope, caches and (caches[i], slots, mask), rows if last else None)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:                        # (B, T) -> (B, T, V)
        return self.output(self.hidden(tokens))


# ---- tokenizer ----------------------------------------------------------------------------------

class Tokenizer:
    """The sentencepiece model of LLaMA 1 and 2: text <-> ids."""

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor       # here: --plan needs no tokenizer
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; a checkpoint folder needs its sentencepiece "
                            f"tokenizer.model")
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: not a sentencepiece model (LLaMA 3's tiktoken file is not "
                            f"supported)") from None
        self.vocab_size = self.pieces.vocab_size()
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()

    def encode(self, text: str) -> list[int]:
        """No BOS, no EOS: data.py places each once."""
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def vocabulary(self) -> list[str]:
        return [self.pieces.id_to_piece(i) for i in range(self.vocab_size)]


# ---- checkpoints --------------------------------------------------------------------------------

HF_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def from_hf_name(name: str) -> str:
    if name in HF_NAMES:
        return HF_NAMES[name]
    part = re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.weight", name)
    return f"{part[1]}.{HF_NAMES[part[2]]}.weight" if part and part[2] in HF_NAMES else name


def reorder(name: str, tensor: Tensor, config: ModelConfig, from_hf: bool) -> Tensor:
    """The rows of q and k, and of their LoRA's B, as the other format has them: Meta keeps a head's
    pairs as neighbours, Hugging Face as (first half, second half)."""
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
    if heads is None or name.endswith("lora_A"):
        return tensor
    pairs = (heads, 2, -1) if from_hf else (heads, -1, 2)
    return tensor.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)


def to_hf(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights, or LoRA's A and B, by Hugging Face's names and with its order of rows in q and k."""
    names, out = {ours: theirs for theirs, ours in HF_NAMES.items()}, {}
    for name, tensor in tensors.items():
        tensor = reorder(name, tensor, config, from_hf=False)
        if part := re.fullmatch(r"(layers\.\d+)\.(.+)\.(weight|lora_A|lora_B)", name):
            name = f"model.{part[1]}.{names[part[2]]}.{part[3]}"
        out[names.get(name, name)] = tensor
    return out


def write_safetensors(path: Path, tensors: dict[str, Tensor]):
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape),
                        "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                                     # the data begin aligned
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            t.cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(file)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The format: 8 bytes (the header's length), a JSON header, the tensors' bytes. All mapped."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise UserError(f"{path}: the header's length {length} does not fit a file of {size} "
                            f"bytes (truncated?)")
        try:
            header = json.loads(file.read(length))
            entries = [(name, str(e["dtype"]), [*e["shape"]], *e["data_offsets"])
                       for name, e in header.items() if name != "__metadata__"]
            if not all(len(e) == 5 and {*map(type, [*e[2], *e[3:]])} == {int} for e in entries):
                raise ValueError("sizes and offsets must be integers")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: its header is damaged; download it again") from None
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    tensors, end = {}, 0
    for name, dtype, shape, start, stop in sorted(entries, key=lambda e: e[3:]):
        if dtype not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name:.80} is {dtype:.80}; expected one of "
                            f"{', '.join(SAFETENSORS_DTYPES)}")
        width = SAFETENSORS_DTYPES[dtype].itemsize
        plausible = start == end and stop <= len(data) and min(shape, default=1) >= 0
        if not plausible or stop - start != math.prod(shape) * width:
            raise UserError(f"{path}: {name:.80} claims bytes {start!s:.20}..{stop!s:.20} for "
                            f"shape {shape!s:.80} in a file with {len(data)} bytes of data; "
                            f"truncated or damaged, download it again")
        raw = data[start:stop]
        raw = raw if (8 + length + start) % width == 0 else raw.clone()     # view() needs alignment
        tensors[name], end = raw.view(SAFETENSORS_DTYPES[dtype]).view(shape), stop
    if end != len(data):
        raise UserError(f"{path}: {len(data) - end} bytes behind the last tensor; expected none")
    return tensors


def check_records(path: Path):
    """A mapped archive is trusted to say itself where a record's bytes begin, unlike one that is
    read: a damaged length there would shift a tensor. torch.save aligns each record to 64 bytes and
    lets no more than its 0, 16 or 24 bytes of trailer follow."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = sorted(archive.infolist(), key=lambda r: r.header_offset)
        ends = [r.header_offset for r in records[1:]] + [archive.start_dir]
        for record, end in zip(records, ends):
            file.seek(record.header_offset + 26)
            lengths = (int.from_bytes(file.read(2), "little") for _ in range(2))    # name, extra
            start = record.header_offset + 30 + sum(lengths)
            trailer = end - start - record.file_size
            if start % 64 or trailer not in (0, 16, 24) or record.compress_type:
                raise ValueError(f"{record.filename} is not where torch.save would have put it")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .pth or .bin file, mapped where its format allows. weights_only: no code in it is run."""
    try:
        if mapped := zipfile.is_zipfile(path):
            check_records(path)
        tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
        raise UserError(f"{path}: not a readable checkpoint of plain tensors (truncated?): "
                        f"{(str(error) or repr(error)).splitlines()[0][:120]}") from None
    if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided
            and t.device.type == "cpu" for name, t in tensors.items()):
        raise UserError(f"{path}: expected a dict of plain tensors by name, found a "
                        f"{type(tensors).__name__}")
    if not mapped:
        print(f"note: {path.name} is in the old format that cannot be mapped; it was read whole",
              file=sys.stderr)
    return tensors


def read_saved(path: Path):
    """What torch.save wrote in a run: no code in it is run, and no damaged byte passes."""
    with zipfile.ZipFile(path) as archive:              # torch.load leaves the checksums alone
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def shard_files(folder: Path) -> tuple[list[Path], bool]:
    """The weight files of a folder in order, and whether they are Meta's (else Hugging Face's)."""
    if meta := sorted(folder.glob("consolidated.*.pth")):
        wanted = [f"consolidated.{i:02d}.pth" for i in range(len(meta))]
        if [p.name for p in meta] != wanted:
            raise UserError(f"{folder}: expected shards {wanted[0]}..{wanted[-1]}, found "
                            f"{', '.join(p.name for p in meta)}")
        return meta, True
    for index, pattern in (("model.safetensors.index.json", "*.safetensors"),
                           ("pytorch_model.bin.index.json", "pytorch_model*.bin")):
        if (folder / index).is_file():
            return indexed_files(folder / index), False
        if found := sorted(folder.glob(pattern)):
            return found, False
    raise UserError(f"--ckpt {folder}: found no consolidated.00.pth, *.safetensors or "
                    f"pytorch_model*.bin")


def indexed_files(index: Path) -> list[Path]:
    """The files that Hugging Face's index names; each must be one of its own folder."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: expected a JSON object with a weight_map") from None
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not (index.parent / name).is_file():
            raise UserError(f"{index}: names {name!r}, which is not a file of this folder")
    return [index.parent / name for name in names]


def part_of(path: Path, name: str, shape: tuple, shard: int, parts: int) -> tuple[list, tuple]:
    """(shape, place in the whole tensor) of what one of Meta's model-parallel shards has of it:
    columns of wo, w2 and the embedding, rows of the other matrices, all of a norm."""
    if parts == 1 or name.endswith("norm.weight"):
        return list(shape), (slice(None),)
    dim = 1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0
    size, rest = divmod(shape[dim], parts)
    if rest:
        raise UserError(f"{path}: {name} of shape {list(shape)} does not split into {parts} shards")
    where = (slice(None),) * dim + (slice(shard * size, (shard + 1) * size),)
    return [size if i == dim else n for i, n in enumerate(shape)], where


@torch.no_grad()
def load_weights(folder, config: ModelConfig, layer_ids=None, dtype=torch.float32,
                 device="cpu") -> LM:
    """An LM from a folder's weights, frozen; only `layer_ids` (default: all) are read.

    Strict: every tensor of the architecture once, in its shape, and nothing else; else UserError.
    `dtype` None: as stored. One shard is mapped at a time, and copied tensor by tensor.
    """
    folder = Path(folder)
    files, is_meta = shard_files(folder)
    parts = len(files) if is_meta else 1
    with torch.device("meta"):
        lm = LM.empty(config, layer_ids)
        shapes = {name: tuple(p.shape) for name, p in LM.empty(config).state_dict().items()}
    if config.tied:
        del shapes["output.weight"]
    state, seen, wanted = {}, Counter(), shapes.keys() & lm.state_dict().keys()
    for shard, path in enumerate(files):
        tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        for key, tensor in tensors.items():
            name = key if is_meta else from_hf_name(key)
            if name == "rope.freqs" or name.endswith("rotary_emb.inv_freq"):
                continue
            if name == "output.weight" and config.tied:         # some files carry a copy of it
                continue
            if name not in shapes:
                raise UserError(f"{path}: surplus tensor {key}, which a LLaMA of {config.n_layers} "
                                f"layers does not have")
            shape, where = part_of(path, name, shapes[name], shard, parts)
            is_float = tensor.dtype in SAFETENSORS_DTYPES.values()
            if list(tensor.shape) != shape or not is_float:
                raise UserError(f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, expected "
                                f"floats of shape {shape}")
            seen[name] += 1
            if seen[name] > parts:
                raise UserError(f"{path}: {key} stands in two files; remove one of the two sets of "
                                f"weights")
            if name in wanted:
                if name not in state:
                    kind = dtype or tensor.dtype
                    state[name] = torch.empty(shapes[name], dtype=kind, device=device)
                tensor = tensor if is_meta else reorder(name, tensor, config, from_hf=True)
                state[name][where].copy_(tensor)
        tensors = tensor = None                         # unmaps this shard before the next
    if missing := [name for name in shapes if seen[name] != parts]:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return lm.take(state)


def load_tokenizer(folder, config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer(Path(folder) / "tokenizer.model")
    if config.vocab_size not in (-1, tokenizer.vocab_size):
        raise UserError(f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces, the model's "
                        f"vocab_size is {config.vocab_size}; they do not belong together")
    return tokenizer


def load(folder, layer_ids=None, dtype=torch.float32, device="cpu") -> tuple[LM, Tokenizer]:
    """The model and the tokenizer of a checkpoint folder, Meta's or Hugging Face's."""
    config = ModelConfig.read(folder)
    tokenizer = load_tokenizer(folder, config)
    if config.vocab_size == -1:
        config = replace(config, vocab_size=tokenizer.vocab_size)
    return load_weights(folder, config, layer_ids, dtype, device), tokenizer


def write_checkpoint(folder: Path, state: dict[str, Tensor], config: ModelConfig, source: Path,
                     form: str):
    """Weights by Meta's names as a folder of `form` meta or hf, with the tokenizer of `source`."""
    if form == "meta":
        torch.save({name: t.cpu() for name, t in state.items()}, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(config.to_params(), indent=1))
    else:
        tokens = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                  "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens, indent=1))
        dtype = {"torch_dtype": str(state["norm.weight"].dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config.to_hf() | dtype, indent=1))
        own = {name: t for name, t in state.items() if name != "output.weight" or not config.tied}
        write_safetensors(folder / "model.safetensors", to_hf(own, config))
    for path in source.glob("tokenizer*" if form == "hf" else "tokenizer.model"):
        shutil.copyfile(path, folder / path.name)


# ---- generation ---------------------------------------------------------------------------------

def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator) -> Tensor:
    """Next tokens (B,) from logits (B, V): the best, or drawn within the top k and the top p."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    p, ids = p.sort(dim=-1, descending=True, stable=True)
    if top_k:
        p[:, top_k:] = 0
    beyond = p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True)
    p[:, 1:][beyond[:, 1:]] = 0                                     # the first piece always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


def generate_batch(lm: LM, prompts, max_new_tokens: int, eos: int, stop: int, pick):
    """One batch of `generate`. Finished rows leave the batch once they are a quarter of it."""
    device = lm.tok_embeddings.weight.device
    longest = max(map(len, prompts))
    caches = lm.caches(len(prompts), longest + max_new_tokens)
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (B, T)
    slots = torch.tensor([len(p) for p in prompts], device=device)  # where a row's next token goes
    rows = torch.arange(len(prompts), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    output = torch.full((len(prompts), max_new_tokens), eos, device=device)
    x = lm.hidden(tokens, caches, rows=rows * longest + slots - 1)  # (B, D): each prompt's last
    look_every = 1 if device.type == "cpu" else 16                  # reading `done` stalls a GPU
    for step in range(max_new_tokens):
        token = pick(lm.output(x)).masked_fill(done, eos)           # (B,)
        output[rows, step] = token
        done = done | (token == eos) | (token == stop)
        if step % look_every == 0 and (finished := int(done.sum())) * 4 >= len(rows):
            if finished == len(rows):
                break
            keep = (~done).nonzero()[:, 0]
            rows, slots, token, done = rows[keep], slots[keep], token[keep], done[keep]
            for cache in caches:
                cache.keep(keep)
        if step + 1 < max_new_tokens:
            mask = torch.arange(longest + step + 1, device=device) <= slots[:, None]    # (B, S)
            x = lm.hidden(token[:, None], caches, slots, mask[:, None, None])[:, 0]
            slots = slots + 1
    return [ids[:ids.index(eos)] if eos in ids else ids for ids in output.tolist()]


@torch.inference_mode()
def generate(lm: LM, prompts: list[list[int]], max_new_tokens: int, eos: int, batch_size=64,
             temperature=0.0, top_k=0, top_p=1.0, generator=None, stop: int | None = None,
             progress: str | None = None) -> list[list[int]]:
    """New token ids of each prompt, without EOS, in the prompts' order.

    Greedy at temperature 0, else sampled with `generator` (on the model's device). Prompts are
    sorted by length so that a batch wastes little padding; a text also ends behind the piece
    `stop`; `progress` names a progress bar.
    """
    assert all(prompts), "generate: an empty prompt; begin with BOS"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outputs: list = [None] * len(prompts)
    bar = tqdm(total=len(prompts), desc=progress, disable=None if progress else True, leave=False)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        texts = generate_batch(lm, [prompts[i] for i in batch], max_new_tokens, eos,
                               eos if stop is None else stop,
                               lambda z: choose(z, temperature, top_k, top_p, generator))
        for i, text in zip(batch, texts):
            outputs[i] = text
        bar.update(len(batch))
    bar.close()
    return outputs
