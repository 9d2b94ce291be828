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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


class UserError(ValueError):
    """A mistake of the user's: one line that says what was expected, what was found, what to try."""


# ---- configuration ------------------------------------------------------------------------------

PARAMS_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps",
               "ffn_dim_multiplier", "rope_theta", "max_seq_len", "max_batch_size"}
IGNORABLE_IF_FALSE = {"use_scaled_rope", "attention_bias", "mlp_bias"}


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
        for name, most in (("dim", 2**20), ("n_layers", 2**10), ("n_heads", 2**16), ("n_kv_heads", 2**16),
                           ("hidden_dim", 2**22), ("vocab_size", 2**22)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most and (name, value) != ("vocab_size", -1):
                raise UserError(f"model configuration: {name} must be an integer in 1..{most}, found {value!r:.80}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise UserError(f"model configuration: {name} must be a number above 0, found {value!r:.80}")
        if self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise UserError(f"model configuration: dim {self.dim} must be a multiple of 2 x n_heads {self.n_heads}, "
                            f"and n_heads of n_kv_heads {self.n_kv_heads}")

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
                    fields = json.loads(path.read_text())
                    return parse(fields)
                except UserError as error:
                    raise UserError(f"{path}: {error}") from None
                except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(f"{path}: expected a LLaMA's configuration as a JSON object; {error!r:.120}") from None
        raise UserError(f"--ckpt {folder}: expected a folder with params.json (Meta) or config.json (Hugging Face)")

    @classmethod
    def from_params(cls, p: dict) -> "ModelConfig":
        odd = [k for k in p if k not in PARAMS_KEYS and not (k in IGNORABLE_IF_FALSE and not p[k])]
        if odd:
            raise UserError(f"{odd[0]!r} is not part of a plain LLaMA 1 or 2, and this code has nothing for it")
        hidden = int(2 * 4 * p["dim"] / 3)
        if p.get("ffn_dim_multiplier") is not None:
            hidden = int(p["ffn_dim_multiplier"] * hidden)
        hidden = p["multiple_of"] * math.ceil(hidden / p["multiple_of"])
        return cls(p["dim"], p["n_layers"], p["n_heads"], p.get("n_kv_heads") or p["n_heads"],
                   p.get("vocab_size", -1), hidden, p["norm_eps"], p.get("rope_theta") or 10000.0)

    def to_params(self) -> dict:
        """The inverse of from_params, exactly: a multiplier where `multiple_of` 256 misses hidden_dim."""
        p = {"dim": self.dim, "n_layers": self.n_layers, "n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads,
             "vocab_size": self.vocab_size, "multiple_of": 256, "norm_eps": self.norm_eps, "rope_theta": self.rope_theta}
        if self.from_params(p).hidden_dim != self.hidden_dim:
            p |= {"multiple_of": 1, "ffn_dim_multiplier": (self.hidden_dim + 0.5) / int(8 * self.dim / 3)}
        return p

    @classmethod
    def from_hf(cls, c: dict) -> "ModelConfig":
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}      # transformers 5, 4
        plain = {"model_type": c.get("model_type") == "llama",
                 "hidden_act": c.get("hidden_act", "silu") == "silu",
                 "rope type": rope.get("rope_type", rope.get("type", "default")) == "default",
                 "head_dim": c.get("head_dim") in (None, c["hidden_size"] // c["num_attention_heads"]),
                 "attention_bias": not c.get("attention_bias"), "mlp_bias": not c.get("mlp_bias"),
                 "quantization_config": not c.get("quantization_config")}
        odd = [name for name, fine in plain.items() if not fine]
        if odd:
            raise UserError(f"only a plain LLaMA is supported, and here {odd[0]} is not one's")
        theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
        return cls(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
                   c.get("num_key_value_heads") or c["num_attention_heads"], c["vocab_size"],
                   c["intermediate_size"], c["rms_norm_eps"], theta, bool(c.get("tie_word_embeddings")))

    def to_hf(self) -> dict:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "hidden_size": self.dim, "num_hidden_layers": self.n_layers, "num_attention_heads": self.n_heads,
                "num_key_value_heads": self.n_kv_heads, "vocab_size": self.vocab_size,
                "intermediate_size": self.hidden_dim, "rms_norm_eps": self.norm_eps, "rope_theta": self.rope_theta,
                "max_position_embeddings": 4096, "tie_word_embeddings": self.tied}      # 4096: LLaMA 2's


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
    """Rotary embedding of x (B, T, H, d), Meta's layout: neighbours (2i, 2i+1) are one complex number,
    which is turned by its position's angle: ten times faster on the CPU than writing cos and sin out."""
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
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rope), rotate(k, rope), v))  # (B, H|G, T, d)
        mask = None
        if past is not None:
            cache, slots, mask = past
            k, v = cache.write(k, v, slots, mask)
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

    def forward(self, x: Tensor, rope: Tensor, past=None, rows=None):   # (B, T, D) -> (B, T, D) or (N, D)
        x = x + self.attention(self.attention_norm(x), rope, past)      # tokens look at each other
        if rows is not None:
            x = x.flatten(0, 1)[rows]
        return x + self.feed_forward(self.ffn_norm(x))                  # each token on its own


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
        """A model with PyTorch's default initialisation (make it under torch.device("meta") for none)."""
        ids = range(config.n_layers) if layer_ids is None else layer_ids
        # the same numbers as nn.Embedding(V, D), which under torch.device("meta") takes most of a second
        embeddings = nn.Embedding.from_pretrained(torch.randn(config.vocab_size, config.dim), freeze=False)
        lm = cls(config, {i: Block(config) for i in ids}, embeddings, RMSNorm(config.dim, config.norm_eps),
                 nn.Linear(config.dim, config.vocab_size, bias=False))
        if config.tied:
            lm.output.weight = lm.tok_embeddings.weight
        return lm

    def with_layers(self, layers: dict) -> "LM":
        """The same embeddings, norm and head around other blocks. Nothing is copied."""
        return LM(self.config, layers, self.tok_embeddings, self.norm, self.output)

    def caches(self, batch: int, slots: int) -> list[KVCache]:
        return [KVCache(self.config, batch, slots, self.tok_embeddings.weight) for _ in self.layers]

    def rope(self, positions: Tensor) -> Tensor:
        """Cosine and sine of every position's angles, fp32: (T,) -> (T, 1, d/2, 2)."""
        d = self.config.head_dim
        freqs = self.config.rope_theta ** -(torch.arange(0, d, 2, device=positions.device).float() / d)
        angles = positions.float()[..., None, None] * freqs
        return torch.stack((angles.cos(), angles.sin()), -1)

    def hidden(self, tokens: Tensor, caches=None, slots=None, mask=None, rows=None) -> Tensor:
        """tokens (B, T) -> (B, T, D) after the final norm, or (N, D) at positions b T + t = rows (N,).
        With `caches` (one a block): the prompts if `slots` is None, else one token a row at position
        slots (B,), mask (B, 1, 1, S) over the cache."""
        rope = self.rope(torch.arange(tokens.shape[1], device=tokens.device) if slots is None else slots[:, None])
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
            raise UserError(f"{path}: no such file; a checkpoint folder needs its sentencepiece tokenizer.model")
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: not a sentencepiece model (LLaMA 3's tiktoken file is not supported)") from None
        self.vocab_size, self.bos, self.eos = self.pieces.vocab_size(), self.pieces.bos_id(), self.pieces.eos_id()

    def encode(self, text: str) -> list[int]:
        """No BOS, no EOS: data.py places each once."""
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def vocabulary(self) -> list[str]:
        return [self.pieces.id_to_piece(i) for i in range(self.vocab_size)]


# ---- checkpoints --------------------------------------------------------------------------------

HF_NAMES = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
            "lm_head.weight": "output.weight", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
            "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
            "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
            "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def from_hf_name(name: str) -> str:
    if name in HF_NAMES:
        return HF_NAMES[name]
    part = re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.weight", name)
    return f"{part[1]}.{HF_NAMES[part[2]]}.weight" if part and part[2] in HF_NAMES else name


def to_meta_rows(weight: Tensor, heads: int) -> Tensor:
    """Hugging Face keeps a head's pairs as (first half, second half); Meta as neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_hf(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights, or LoRA's A and B, under Hugging Face's names and with its order of rows in q and k."""
    names, heads = {ours: theirs for theirs, ours in HF_NAMES.items()}, {"wq": config.n_heads, "wk": config.n_kv_heads}
    out = {}
    for name, tensor in tensors.items():
        if part := re.fullmatch(r"(layers\.\d+)\.(.+)\.(weight|lora_A|lora_B)", name):
            n = heads.get(part[2].split(".")[-1])
            if n and part[3] != "lora_A":                              # the inverse of to_meta_rows
                tensor = tensor.unflatten(0, (n, -1, 2)).transpose(1, 2).flatten(0, 2)
            name = f"model.{part[1]}.{names[part[2]]}.{part[3]}"
        out[names.get(name, name)] = tensor
    return out


def write_safetensors(path: Path, tensors: dict[str, Tensor]):
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                                     # the data begin aligned
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            t.cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(file)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The format: 8 bytes little-endian header length, a JSON header, the tensors' bytes. All mapped."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise UserError(f"{path}: the header's length {length} does not fit a file of {size} bytes (truncated?)")
        try:
            header = json.loads(file.read(length))
            entries = [(name, str(e["dtype"]), [*e["shape"]], *e["data_offsets"])
                       for name, e in header.items() if name != "__metadata__"]
            if not all(len(e) == 5 and all(type(n) is int for n in e[2] + [*e[3:]]) for e in entries):
                raise ValueError("sizes and offsets must be integers")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: the safetensors header is damaged; download the file again") from None
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    tensors, end = {}, 0
    for name, dtype, shape, start, stop in sorted(entries, key=lambda e: e[3:]):
        if dtype not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name:.80} is {dtype:.80}; expected one of {', '.join(SAFETENSORS_DTYPES)}")
        width = SAFETENSORS_DTYPES[dtype].itemsize
        if start != end or min(shape, default=1) < 0 or stop - start != math.prod(shape) * width or stop > len(data):
            raise UserError(f"{path}: {name:.80} claims bytes {start!s:.20}..{stop!s:.20} for shape {shape!s:.80} in a "
                            f"file with {len(data)} bytes of data; truncated or damaged, download it again")
        raw = data[start:stop]
        raw = raw if (8 + length + start) % width == 0 else raw.clone()        # view() needs alignment
        tensors[name], end = raw.view(SAFETENSORS_DTYPES[dtype]).view(shape), stop
    if end != len(data):
        raise UserError(f"{path}: {len(data) - end} bytes behind the last tensor; expected none")
    return tensors


def check_records(path: Path):
    """A mapped archive is trusted to say itself where a record's bytes begin, unlike one that is read: a damaged
    length there would shift a tensor. torch.save aligns each record to 64 and lets no more than its 0, 16 or
    24 bytes of trailer follow."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = sorted(archive.infolist(), key=lambda r: r.header_offset)
        for record, end in zip(records, [r.header_offset for r in records[1:]] + [archive.start_dir]):
            file.seek(record.header_offset)
            header = file.read(30)
            start = record.header_offset + 30 + sum(int.from_bytes(header[i:i + 2], "little") for i in (26, 28))
            if start % 64 or end - start - record.file_size not in (0, 16, 24) or record.compress_type:
                raise ValueError(f"{record.filename} does not lie where torch.save would have put it")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .pth or .bin file, mapped where its format allows; weights_only: code in it is never run."""
    try:
        if zipfile.is_zipfile(path):
            check_records(path)
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            print(f"note: {path.name} is in the old format that cannot be mapped; reading all of it", file=sys.stderr)
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError on a bad file
        raise UserError(f"{path}: not a readable checkpoint of plain tensors (truncated?): "
                        f"{(str(error) or repr(error)).splitlines()[0][:120]}") from None
    if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(t, Tensor) and (t.layout, t.device.type) == (torch.strided, "cpu")
            for name, t in tensors.items()):
        raise UserError(f"{path}: expected a dict of plain tensors by name, found a {type(tensors).__name__}")
    return tensors


def read_saved(path: Path):
    """What torch.save wrote in a run: no code in it is run, and no damaged byte passes."""
    with zipfile.ZipFile(path) as archive:              # torch.load leaves the checksums alone
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def shard_files(folder: Path) -> tuple[list[Path], bool]:
    """The weight files of a folder in order, and whether they are Meta's (else Hugging Face's)."""
    meta = sorted(folder.glob("consolidated.*.pth"))
    if meta:
        wanted = [f"consolidated.{i:02d}.pth" for i in range(len(meta))]
        if [p.name for p in meta] != wanted:
            raise UserError(f"{folder}: expected shards {wanted[0]}..{wanted[-1]}, found {', '.join(p.name for p in meta)}")
        return meta, True
    for index, pattern in (("model.safetensors.index.json", "*.safetensors"),
                           ("pytorch_model.bin.index.json", "pytorch_model*.bin")):
        if (folder / index).is_file():
            try:
                names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{folder / index}: expected a JSON object with a weight_map") from None
            for name in names:
                if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                    raise UserError(f"{folder / index}: names {name!r}, which is not a file of this folder")
            return [folder / name for name in names], False
        if found := sorted(folder.glob(pattern)):
            return found, False
    raise UserError(f"--ckpt {folder}: found no consolidated.00.pth, *.safetensors or pytorch_model*.bin")


def split_dim(name: str) -> int | None:
    """The dimension over which Meta's model-parallel shards split a tensor; None: each has it whole."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0


@torch.no_grad()
def load_weights(folder, config: ModelConfig, layer_ids=None, dtype=torch.float32, device="cpu") -> LM:
    """An LM from a folder's weights, frozen; only `layer_ids` (default: all) are read.

    Strict: every tensor of the architecture once, in its shape, and nothing else; UserError otherwise.
    `dtype` None: as stored.
    One shard is mapped at a time, and copied tensor by tensor.
    """
    folder = Path(folder)
    files, is_meta = shard_files(folder)
    with torch.device("meta"):
        lm = LM.empty(config, layer_ids).requires_grad_(False)
        shapes = {name: tuple(p.shape) for name, p in LM.empty(config).state_dict().items()}
    wanted, parts = set(lm.state_dict()), len(files) if is_meta else 1
    if config.tied:
        del shapes["output.weight"]                      # some files carry a copy of it all the same
        wanted.remove("output.weight")
    state, seen = {}, {}
    for shard, path in enumerate(files):
        tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        for key, tensor in tensors.items():
            name = key if is_meta else from_hf_name(key)
            if name == "rope.freqs" or name.endswith("rotary_emb.inv_freq") or name == "output.weight" and config.tied:
                continue
            if name not in shapes:
                raise UserError(f"{path}: surplus tensor {key}, which a LLaMA of {config.n_layers} layers does not have")
            dim = split_dim(name) if parts > 1 else None
            if dim is not None and shapes[name][dim] % parts:
                raise UserError(f"{path}: {key} of shape {list(shapes[name])} does not split into {parts} shards")
            shape = [n // parts if i == dim else n for i, n in enumerate(shapes[name])]
            if list(tensor.shape) != shape or tensor.dtype not in SAFETENSORS_DTYPES.values():
                raise UserError(f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, expected floats of shape {shape}")
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > (parts if is_meta else 1):
                raise UserError(f"{path}: {key} stands in two files; remove one of the two sets of weights")
            if name not in wanted:
                continue
            if not is_meta and name.endswith(("wq.weight", "wk.weight")):
                tensor = to_meta_rows(tensor, config.n_heads if name.endswith("wq.weight") else config.n_kv_heads)
            if name not in state:
                state[name] = torch.empty(shapes[name], dtype=dtype or tensor.dtype, device=device)
            here = state[name] if dim is None else state[name].narrow(dim, shard * shape[dim], shape[dim])
            here.copy_(tensor)
        tensors = tensor = None                          # unmaps this shard before the next is opened
    missing = [name for name in shapes if seen.get(name, 0) != parts]
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if config.tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    lm.load_state_dict(state, assign=True)
    if config.tied:
        lm.output.weight = lm.tok_embeddings.weight      # one parameter again: shipped once
    return lm.requires_grad_(False)


def load_tokenizer(folder, config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer(Path(folder) / "tokenizer.model")
    if config.vocab_size not in (-1, tokenizer.vocab_size):
        raise UserError(f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces, "
                        f"the model's vocab_size is {config.vocab_size}; they do not belong together")
    return tokenizer


def load(folder, layer_ids=None, dtype=torch.float32, device="cpu") -> tuple[LM, Tokenizer]:
    """The model and the tokenizer of a checkpoint folder, Meta's or Hugging Face's."""
    config = ModelConfig.read(folder)
    tokenizer = load_tokenizer(folder, config)
    if config.vocab_size == -1:
        config = ModelConfig(**{**vars(config), "vocab_size": tokenizer.vocab_size})
    return load_weights(folder, config, layer_ids, dtype, device), tokenizer


def write_checkpoint(folder: Path, state: dict[str, Tensor], config: ModelConfig, source: Path, form: str):
    """Weights by Meta's names as a checkpoint folder, `form` meta or hf, with the tokenizer of `source`."""
    if form == "meta":
        torch.save({name: t.cpu() for name, t in state.items()}, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(config.to_params(), indent=1))
    else:
        tokens = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                  "add_bos_token": True, "legacy": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens, indent=1))
        dtype = {"torch_dtype": str(state["norm.weight"].dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config.to_hf() | dtype, indent=1))
        write_safetensors(folder / "model.safetensors", to_hf(
            {name: t for name, t in state.items() if not (config.tied and name == "output.weight")}, config))
    for path in source.glob("tokenizer*" if form == "hf" else "tokenizer.model"):
        shutil.copyfile(path, folder / path.name)


# ---- generation ---------------------------------------------------------------------------------

def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator) -> Tensor:
    """Next tokens (B,) from logits (B, V): the best one, or drawn within the top k and the top p."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    p, ids = p.sort(dim=-1, descending=True, stable=True)
    if top_k:
        p[:, top_k:] = 0
    beyond = p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True)
    p[:, 1:][beyond[:, 1:]] = 0                                         # the first piece always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


def generate_batch(lm: LM, prompts: list[list[int]], max_new_tokens: int, eos: int, stop: int, pick) -> list[list[int]]:
    """One batch of `generate`. Finished rows leave the batch once they are a quarter of it."""
    device = lm.tok_embeddings.weight.device
    longest = max(map(len, prompts))
    caches = lm.caches(len(prompts), longest + max_new_tokens)
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)    # (B, T)
    slots = torch.tensor([len(p) for p in prompts], device=device)      # where a row's next token goes
    rows = torch.arange(len(prompts), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    output = torch.full((len(prompts), max_new_tokens), eos, device=device)
    x = lm.hidden(tokens, caches, rows=rows * longest + slots - 1)      # (B, D): the head on one position only
    look_every = 1 if device.type == "cpu" else 16                      # reading `done` stalls a GPU
    for step in range(max_new_tokens):
        token = pick(lm.output(x)).masked_fill(done, eos)               # (B,)
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
            mask = torch.arange(longest + step + 1, device=device) <= slots[:, None]         # (B, S)
            x = lm.hidden(token[:, None], caches, slots, mask[:, None, None])[:, 0]
            slots = slots + 1
    return [ids[:ids.index(eos)] if eos in ids else ids for ids in output.tolist()]


@torch.inference_mode()
def generate(lm: LM, prompts: list[list[int]], max_new_tokens: int, eos: int, batch_size: int = 64, temperature=0.0,
             top_k=0, top_p=1.0, generator=None, stop: int | None = None, progress: str | None = None) -> list[list[int]]:
    """New token ids of each prompt, without EOS, in the prompts' order.

    Greedy at temperature 0, else sampled with `generator` (on the model's device). Prompts are
    sorted by length so that a batch wastes little padding; a text also ends behind the piece `stop`;
    `progress` names a progress bar.
    """
    assert all(prompts), "generate: an empty prompt; begin with BOS"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outputs: list = [None] * len(prompts)
    bar = tqdm(total=len(prompts), desc=progress, disable=None if progress else True, leave=False)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        texts = generate_batch(lm, [prompts[i] for i in batch], max_new_tokens, eos, eos if stop is None else stop,
                               lambda z: choose(z, temperature, top_k, top_p, generator))
        for i, text in zip(batch, texts):
            outputs[i] = text
        bar.update(len(batch))
    bar.close()
    return outputs
