"""A LLaMA decoder by hand (Touvron et al. 2023, arXiv 2302.13971, 2307.09288), Meta's names.
B sequences, T tokens, D dim, H query heads, G key/value heads, d = D / H, V vocabulary.

    lm, tokenizer = load("tiny/llama")
"""
import contextlib
import hashlib
import importlib
import json
import math
import os
import stat
import sys
import tempfile
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

class UserError(ValueError):
    """A user's mistake in one line: what was expected, what was found, what to try."""
def room(name: str):
    """A module of a folder beside the core files, which a fork may have deleted."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"this needs {name}: {error} in this copy") from None

# ---- files --------------------------------------------------------------------------------------
@contextlib.contextmanager
def expecting(what: str, where):
    """What goes wrong in the block becomes one line about `where`, if it is none yet."""
    try:
        yield
    except Exception as error:  # a damaged file raises nearly anything
        text = repr(error) if isinstance(error, LookupError) else str(error) or repr(error)
        text = getattr(error, "strerror", None) or " ".join(text.split())
        if isinstance(error, UserError) and text.startswith(str(where)):
            raise
        raise UserError(f"{where}: expected {what}, found: {text:.300}") from None

def open_file(path):
    """A regular file, open for reading bytes."""
    with expecting("a file that can be read", path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # open() would wait for a FIFO
            raise OSError("no regular file")
        file = open(path, "rb")
        if file.peek(24).startswith(b"version https://git-lfs"):
            raise OSError("a pointer of Git LFS; run `git lfs pull`")
        return file

def read_bytes(path, most: int = 2**31) -> bytes:
    with open_file(path) as file:
        if (size := os.path.getsize(path)) > most:
            raise UserError(f"{path}: expected at most {most:,} bytes, found {size:,}")
        return file.read()

def parse_json(text: str | bytes, where, what: str = "JSON"):
    """A JSON text, without NaN and Infinity; `where` and `what` it is are for the error."""
    with expecting(what, where):
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(text, parse_constant=int)  # int("NaN") is a ValueError

def read_json(path, what: str = "JSON"):
    return parse_json(read_bytes(path, 2**26), path, what)

def read_saved(path, mapped=False):
    """What torch.save wrote. No code in it is run, and its checksums are compared."""
    with open_file(path) as file, expecting("tensors as torch.save writes them", path):
        if is_zip := zipfile.is_zipfile(file):  # else the format before 2020
            archive = zipfile.ZipFile(file)  # torch.load ignores checksums
            if archive.testzip() or any(r.compress_type for r in archive.infolist()):
                raise ValueError("a record that is damaged or compressed")
        return torch.load(path, map_location="cpu", mmap=mapped and is_zip, weights_only=True)

def read_pickle(path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's .pth or .bin file by name, mapped."""
    tensors = read_saved(path, mapped=True)
    with expecting("a dict of plain tensors by name", path):
        for name, t in tensors.items():
            plain = t.layout == torch.strided and t.device.type == "cpu"
            if type(name) is not str or not plain:
                raise ValueError(f"{name!r:.80}, {t!r:.80}")
    return tensors

@contextlib.contextmanager
def replacing(path: Path):
    """A path to write to, which takes the place of `path` if the block ends without error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as own:
            yield Path(own) / path.name
            os.rename(Path(own) / path.name, path)  # over a folder: only an empty one
        folder = os.open(path.parent, os.O_RDONLY)  # the name must outlive a power cut
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's
        reason = getattr(error, "strerror", "") or error
        raise UserError(f"{path}: cannot be written ({reason}); it is as before") from None

def write_file(path, fill):
    """`fill(binary file)`, whole or not at all."""
    with replacing(Path(path)) as part, open(part, "xb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())

def write_json(path, content):
    write_file(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))

def fingerprint(path) -> str:
    """sha256 of a file's content."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def clean_text(text: str) -> str:
    """Text for UTF-8: two surrogates become their character, a lone one U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

# ---- configuration ------------------------------------------------------------------------------
PARAMS_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps",
               "ffn_dim_multiplier", "rope_theta", "max_seq_len", "max_batch_size"}
IGNORABLE_IF_FALSE = {"use_scaled_rope", "attention_bias", "mlp_bias"}

@dataclass(frozen=True)
class ModelConfig:
    """The architecture, from params.json (Meta) or config.json (Hugging Face)."""
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int  # -1 in old params.json: the tokenizer's
    hidden_dim: int  # of the feed-forward
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = False  # output.weight is tok_embeddings.weight

    def __post_init__(self):
        most = {"n_layers": 2**10, "rope_theta": 1e18}
        for f in fields(self):
            name, value = f.name, getattr(self, f.name)
            right = type(value) in ((int, float) if f.type is float else (f.type,))
            known = f.type is bool or (name, value) == ("vocab_size", -1)
            if not right or not (known or 0 < value <= most.get(name, 2**22)):
                raise UserError(f"{name} {value!r:.80}; expected a number above 0, up to "
                                f"{most.get(name, 2**22)}")
        if self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise UserError(f"dim {self.dim}, not a multiple of 2 x n_heads {self.n_heads}, or "
                            f"n_heads not one of n_kv_heads {self.n_kv_heads}")

    head_dim = property(lambda self: self.dim // self.n_heads)

    @classmethod
    def read(cls, folder) -> "ModelConfig":
        """Reads `folder`/params.json or config.json; nothing else is opened."""
        if os.path.isfile(Path(folder) / "config.json"):  # Hugging Face's
            return room("extras.huggingface").read_config(Path(folder))
        path = Path(folder) / "params.json"
        if not os.path.lexists(path):
            found = "neither" if os.path.isdir(folder) else "no such folder"
            raise UserError(f"{folder}: expected params.json (Meta) or config.json, found {found}")
        with expecting("the architecture of a LLaMA", path):
            return cls.from_params(read_json(path))

    @classmethod
    def from_params(cls, p: dict) -> "ModelConfig":
        odd = [k for k in p if k not in PARAMS_KEYS and not (k in IGNORABLE_IF_FALSE and not p[k])]
        if odd:
            raise UserError(f"{odd[0]!r}, which LLaMA 1 and 2 do not have")
        hidden = int(2 * 4 * p["dim"] / 3)
        if p.get("ffn_dim_multiplier") is not None:
            hidden = int(p["ffn_dim_multiplier"] * hidden)
        hidden = p["multiple_of"] * math.ceil(hidden / p["multiple_of"])
        return cls(p["dim"], p["n_layers"], p["n_heads"], p.get("n_kv_heads") or p["n_heads"],
                   p.get("vocab_size", -1), hidden, p["norm_eps"], p.get("rope_theta") or 10000.0)

# ---- the decoder --------------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps), in fp32 and rounded before the gain, as in Meta's code."""
    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight

def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, d), Meta's layout: neighbours (2i, 2i+1) are one complex
    number, turned by its position's angle."""
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, H, d/2)
    return torch.view_as_real(z * torch.view_as_complex(rope)).flatten(-2).to(x.dtype)

def remember(cache: Tensor, k: Tensor, v: Tensor, slots, mask):
    """Writes keys and values (B, G, T, d) into a block's cache (2, B, G, S, d); returns those to
    attend to. A slot is an absolute position: new tokens overwrite the prompt's padding."""
    if torch.is_tensor(slots):  # one token a row
        rows = torch.arange(len(slots), device=slots.device)
        cache[0, rows, :, slots], cache[1, rows, :, slots] = k[:, :, 0], v[:, :, 0]
        return cache[:, :, :, :mask.shape[-1]]
    end = slots + k.shape[2]  # tokens of the prompts
    cache[0, :, :, slots:end], cache[1, :, :, slots:end] = k, v
    return cache[:, :, :, :end]

class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, past=None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim))
                   for w in (self.wq, self.wk, self.wv))  # (B, T, H or G, d)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rope), rotate(k, rope), v))
        cache, slots, mask = past or (None, None, None)
        if cache is not None:
            k, v = remember(cache, k, v, slots, mask)
        if mask is None:  # q (B, H, T, d), k (B, G, T, d)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               enable_gqa=q.shape[1] != k.shape[1])
        else:  # heads that share a key are further tokens: q (B, G, (H/G) T, d)
            T, group = q.shape[2], q.shape[1] // k.shape[1]
            q = q.unflatten(1, (-1, group)).flatten(2, 3)
            y = F.scaled_dot_product_attention(q, k, v, mask if T == 1 else mask.tile(group, 1))
            y = y.unflatten(2, (group, T)).flatten(1, 2)
        return self.wo(y.transpose(1, 2).flatten(2))  # (B, T, D)

class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # SwiGLU

class Block(nn.Module):
    """One pre-norm decoder layer: what FedBiOT drops, freezes, ships and averages. It does not
    know its index. `past`: (its cache, slots, mask), see LM.hidden. `rows` (N,): the wanted
    positions b T + t; the feed-forward is spared the others."""
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attention = Attention(c)
        self.feed_forward = FeedForward(c)
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, past=None, rows=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, past)  # tokens look at each other
        if rows is not None:
            x = x.flatten(0, 1)[rows]  # (B, T, D) -> (N, D)
        return x + self.feed_forward(self.ffn_norm(x))  # each token on its own

class LM(nn.Module):
    """Embeddings, some blocks, final norm and head. `layers` is keyed by the *full* model's
    indices, so a compressed model's tensors keep their names of the checkpoint."""
    def __init__(self, config, layers: dict, tok_embeddings, norm, output, stored=None):
        super().__init__()
        self.config = config
        self.tok_embeddings = tok_embeddings
        self.layers = nn.ModuleDict({str(i): layers[i] for i in sorted(layers, key=int)})
        self.norm = norm
        self.output = output
        self.stored = stored  # the matrices' dtype in the checkpoint

    @classmethod
    def empty(cls, config: ModelConfig, layer_ids=None) -> "LM":
        """A model with PyTorch's initialisation; without under torch.device("meta")."""
        V, D = config.vocab_size, config.dim
        ids = range(config.n_layers) if layer_ids is None else layer_ids
        # the numbers of nn.Embedding(V, D), which takes most of a second on "meta"
        embeddings = nn.Embedding.from_pretrained(torch.randn(V, D), freeze=False)
        lm = cls(config, {i: Block(config) for i in ids}, embeddings, RMSNorm(D, config.norm_eps),
                 nn.Linear(D, V, bias=False))
        if config.tied:
            lm.output.weight = lm.tok_embeddings.weight
        return lm

    def take(self, state: dict) -> "LM":
        """`state`'s tensors, frozen, in the place of those on "meta"; a tied one once."""
        state = {name: nn.Parameter(t) for name, t in state.items()}
        if self.config.tied:
            state["output.weight"] = state["tok_embeddings.weight"]
        self.load_state_dict(state, assign=True)
        return self.requires_grad_(False)

    def with_layers(self, layers: dict) -> "LM":
        """The same embeddings, norm and head around other blocks. Nothing is copied."""
        return LM(self.config, layers, self.tok_embeddings, self.norm, self.output, self.stored)

    def caches(self, batch: int, slots: int) -> list[Tensor]:
        """Each block's keys and values, (2, B, G, S, d)."""
        shape = (2, batch, self.config.n_kv_heads, slots, self.config.head_dim)
        return [self.tok_embeddings.weight.new_zeros(shape) for _ in self.layers]

    def rope(self, positions: Tensor) -> Tensor:
        """Cosine and sine of every position's angles, fp32: (T,) -> (T, 1, d/2, 2)."""
        d = self.config.head_dim
        exponents = torch.arange(0, d, 2, device=positions.device).float() / d
        freqs = self.config.rope_theta ** -exponents
        angles = positions.float()[..., None, None] * freqs
        return torch.stack((angles.cos(), angles.sin()), -1)

    def hidden(self, tokens, caches=None, slots=0, mask=None, rows=None, tap=None):
        """tokens (B, T) -> (B, T, D) after the final norm, or (N, D) at positions b T + t = rows.
        With `caches` (one a block): the prompts from slot `slots` on, behind others with mask
        (T, S); or one token a row at position slots (B,), mask (B, 1, 1, S) over the cache. With
        `tap`, a key of `layers`: the pair of what enters that layer at `rows` and of the above."""
        ahead = torch.arange(tokens.shape[1], device=tokens.device)
        rope = self.rope(slots[:, None] if torch.is_tensor(slots) else slots + ahead)
        x, *_, last = self.tok_embeddings(tokens), *self.layers  # (B, T, D)
        for n, (i, block) in enumerate(self.layers.items()):
            if tap is not None and int(i) == tap:
                tapped = x if rows is None else x.flatten(0, 1)[rows]
            x = block(x, rope, caches and (caches[n], slots, mask), rows if i == last else None)
        return self.norm(x) if tap is None else (tapped, self.norm(x))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        return self.output(self.hidden(tokens))

# ---- checkpoints --------------------------------------------------------------------------------
class Tokenizer:
    """The sentencepiece model of LLaMA 1 and 2: text <-> ids. `ends`: EOS and others."""
    def __init__(self, path, ends=()):
        from sentencepiece import SentencePieceProcessor  # here: --plan needs no tokenizer
        self.pieces, content = SentencePieceProcessor(), read_bytes(path)
        with expecting("a sentencepiece model (LLaMA 3's tiktoken file is none)", path):
            self.pieces.LoadFromSerializedProto(content)
        self.vocab_size = self.pieces.vocab_size()
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        if min(self.bos, self.eos) < 0:
            raise UserError(f"{path}: expected pieces that begin and end a text, found BOS "
                            f"{self.bos}, EOS {self.eos} (-1: none)")
        self.ends = tuple(dict.fromkeys((self.eos, *ends)))
        # Ids of a text, or of several on all cores; and back. No BOS, no EOS: data.py adds them.
        self.encode, self.decode = self.pieces.encode, self.pieces.decode

def load_tokenizer(folder, config: ModelConfig) -> Tokenizer:
    """A folder's tokenizer.model. In Hugging Face's, further ids may end a text."""
    is_hf = os.path.isfile(Path(folder) / "config.json")
    ends = room("extras.huggingface").end_ids(Path(folder)) if is_hf else ()
    path = Path(folder) / "tokenizer.model"
    if not os.path.lexists(path):
        raise UserError(f"{path}: expected LLaMA's sentencepiece file, found none; "
                        f"in Meta's downloads it is one folder up")
    tokenizer = Tokenizer(path, ends)
    if config.vocab_size not in (-1, tokenizer.vocab_size):
        raise UserError(f"{path}: expected {config.vocab_size} pieces, as many as embeddings "
                        f"(no added pad token), found {tokenizer.vocab_size}")
    return tokenizer

def weight_files(folder: Path) -> list[tuple[Path, int]]:
    """(file, of how many shards with a part of every matrix each) of a folder's weights."""
    meta = sorted(folder.glob("consolidated.*.pth"))
    files = [(path, len(meta)) for path in meta]
    if any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*")):
        files += [(path, 1) for path in room("extras.huggingface").weight_files(folder)]
    if not files:
        raise UserError(f"{folder}: expected weights (.pth, .safetensors, .bin), found none")
    return files

def named_tensors(path: Path, config: ModelConfig):
    """A file's tensors by Meta's names, in Meta's layout; its names tell whose it is."""
    is_safe = path.suffix == ".safetensors"
    read = room("extras.huggingface").read_safetensors if is_safe else read_pickle
    tensors = read(path)
    if any(name.startswith(("model.", "lm_head.")) for name in tensors):
        return room("extras.huggingface").translated(path, tensors, config)
    return ((name, tensor) for name, tensor in tensors.items() if name != "rope.freqs")

@torch.no_grad()
def load_weights(folder, config: ModelConfig, layer_ids=None, dtype=torch.float32,
                 device="cpu") -> LM:
    """An LM from a folder's weights, frozen, with `layer_ids` (default: all) of its layers.
    Strict: every tensor of the architecture, in its shape, no other weights; what stands twice
    must be equal; else UserError. `dtype` None: as stored. Device "meta": nothing is read."""
    with torch.device("meta"):
        lm, part = LM.empty(config), LM.empty(config, layer_ids)
    if torch.device(device).type == "meta":
        return part.to(dtype).requires_grad_(False)
    kept, known = part.state_dict().keys(), lm.state_dict()
    state, parts = {}, {}
    for path, shards in weight_files(Path(folder)):
        for name, tensor in named_tensors(path, config):
            if name not in known or not tensor.is_floating_point() or tensor.itemsize < 2:
                raise UserError(f"{path}: surplus tensor {name:.80} of {tensor.dtype}, not of a "
                                f"LLaMA of {config.n_layers} layers")
            axis = 1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0
            if name not in parts:  # a norm is whole in each shard
                whole = torch.empty(known[name].shape, dtype=dtype or tensor.dtype,
                                    device=device if name in kept else "meta")
                parts[name] = whole, [*whole.chunk(shards if whole.dim() == 2 else 1, axis)]
            whole, (view, *rest) = parts[name]
            with expecting(f"{[*view.shape]}, with all shards ({shards})", f"{path}: {name:.80}"):
                if view.shape != tensor.shape:
                    raise ValueError([*tensor.shape])
                view.copy_(tensor)
            parts[name] = whole, rest
            if rest:
                continue
            key = "tok_embeddings.weight" if config.tied and name == "output.weight" else name
            first = state.setdefault(key, whole)
            if first is not whole and name in kept and not torch.equal(first.to(whole), whole):
                raise UserError(f"{path}: {name}: other numbers than {key} had; remove one")
            del parts[name]
            lm.stored = tensor.dtype if name.endswith("wq.weight") else lm.stored
        tensor = None  # unmaps this shard before the next
    with expecting(f"all tensors of {config.n_layers} layers, from all shards", folder):
        lm.take(state)
    return lm if layer_ids is None else lm.with_layers({i: lm.layers[str(i)] for i in layer_ids})

def load(folder, layer_ids=None, dtype=torch.float32, device="cpu") -> tuple[LM, Tokenizer]:
    """The model and the tokenizer of a checkpoint folder, Meta's or Hugging Face's."""
    config = ModelConfig.read(folder)
    tokenizer = load_tokenizer(folder, config)
    config = replace(config, vocab_size=tokenizer.vocab_size)
    return load_weights(folder, config, layer_ids, dtype, device), tokenizer

# ---- generation ---------------------------------------------------------------------------------
CACHE_BYTES = 2**32  # leaves a card of 24 GB room beside a model of 7B

def generate_batch(lm: LM, prompts, max_new_tokens: int, ends: tuple, pick) -> list[list[int]]:
    """A batch of `generate`. Finished rows leave it once they are a quarter of it."""
    device, longest = lm.tok_embeddings.weight.device, max(map(len, prompts))
    caches = lm.caches(len(prompts), longest + max_new_tokens)
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (B, T)
    slots = torch.tensor([len(p) for p in prompts], device=device)  # of the next tokens
    rows = torch.arange(len(prompts), device=device)
    last = torch.tensor(ends, device=device)
    done, finite = torch.zeros_like(rows).bool(), torch.ones_like(rows[:1]).bool()
    output = rows.new_full((len(prompts), max_new_tokens), ends[0])
    mask, n = None, len(os.path.commonprefix([p[:-1] for p in prompts]))
    n = n if n >= max(128, longest // 2) else 0
    if n:  # few-shot prompts begin alike: computed once
        lm.hidden(tokens[:1, :n], [cache[:, :1] for cache in caches])
        for cache in caches:
            cache[:, 1:, :, :n] = cache[:, :1, :, :n]
        mask = torch.ones(longest - n, longest, dtype=torch.bool, device=device).tril(n)
    x = lm.hidden(tokens[:, n:], caches, n, mask, rows * (longest - n) + slots - n - 1)  # (B, D)
    look_every = 1 if device.type == "cpu" else 16  # reading stalls a GPU
    for step in range(max_new_tokens):
        logits = lm.output(x)  # (B, V)
        finite = finite & logits.isfinite().all()
        token = pick(logits).masked_fill(done, ends[0])  # (B,)
        output[rows, step] = token
        done = done | (token[:, None] == last).any(-1)
        if step % look_every == 0 or step + 1 == max_new_tokens:
            *over, fine = torch.cat((done, finite)).tolist()
            if not fine:
                raise UserError("the model's numbers are not finite; fp16 may be too narrow: "
                                "try --dtype bf16 or fp32")
            if all(over):
                break
            if sum(over) * 4 >= len(over):
                keep = torch.tensor([i for i, end in enumerate(over) if not end], device=device)
                rows, slots, token, done = rows[keep], slots[keep], token[keep], done[keep]
                for n, cache in enumerate(caches):
                    caches[n] = cache[:, keep]
        if step + 1 < max_new_tokens:
            mask = torch.arange(longest + step + 1, device=device) <= slots[:, None]  # (B, S)
            x = lm.hidden(token[:, None], caches, slots, mask[:, None, None])[:, 0]
            slots = slots + 1
    return output.tolist()

@torch.inference_mode()
def generate(lm: LM, prompts: list[list[int]], max_new_tokens: int, eos, batch_size=0,
             temperature=0.0, top_k=0, top_p=1.0, generator=None, stop: int | None = None,
             progress: str | None = None) -> list[list[int]]:
    """New token ids of each prompt, without `eos` (an id or several), in the prompts' order.
    Greedy at temperature 0, else sampled with `generator` (on the model's device). Batches
    have similar lengths; batch_size 0: up to 64 prompts whose caches take CACHE_BYTES.
    A text also ends behind the piece `stop`; `progress` names a progress bar."""
    assert all(prompts), "generate: an empty prompt; begin with BOS"
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    ends = eos if stop is None else (*eos, stop)
    pick = lambda logits: logits.argmax(-1)
    if temperature:
        pick = room("extras.sampling").sampler(temperature, top_k, top_p, generator)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    slot = sum(cache.nbytes for cache in lm.caches(1, 1))  # bytes of a token's cache
    outputs, most = [None] * len(prompts), batch_size or 64
    bar = tqdm(total=len(prompts), desc=progress, disable=not progress or None, leave=False)
    while order:
        batch = order[:most]
        while not batch_size and len(batch) > 1 and CACHE_BYTES < (
                len(batch) * slot * (len(prompts[batch[-1]]) + max_new_tokens)):
            batch.pop()
        try:
            texts = generate_batch(lm, [prompts[i] for i in batch], max_new_tokens, ends, pick)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise UserError(f"a prompt of {len(prompts[batch[0]])} tokens does not fit into "
                                f"the GPU's memory beside the model") from None
            most = len(batch) // 2
            print(f"note: out of memory; now {most} sequences at a time", file=sys.stderr)
            continue
        for i, text in zip(batch, texts):
            outputs[i] = text[:next((n for n, token in enumerate(text) if token in eos), None)]
        order = order[len(batch):]
        bar.update(len(batch))
    bar.close()
    return outputs
