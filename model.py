"""A LLaMA decoder by hand: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), with Meta's names.

In order: UserError; files (checked reading, writing whole or not at all); ModelConfig; RMSNorm,
rotate, KVCache, Attention, FeedForward, Block, LM; Tokenizer; load (checkpoint folders: mapped,
strict, only the layers asked for); generate (greedy or sampled, batched, preallocated cache).

Shapes: B sequences, T tokens, D dim, H query heads, G key/value heads, d = D / H, V vocabulary.

    from model import load
    lm, tokenizer = load("tiny/llama")
"""
import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
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


def room(name: str):
    """The module `name` of a folder beside the core files, which a fork may have deleted."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):
            raise
        raise UserError(f"this needs {name.replace('.', '/')}.py, which is not in this copy of the "
                        f"project; add it again, or do without") from None


# ---- files --------------------------------------------------------------------------------------

def list_folder(folder) -> list[str]:
    """Names in a folder, sorted, without hidden ones such as a Mac's `._model.safetensors`."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: expected a folder that can be read, found: "
                        f"{error.strerror}") from None


@contextlib.contextmanager
def open_file(path):
    """A regular file to read bytes from. Any OSError in the block is a UserError."""
    try:
        with open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):       # a FIFO would wait forever
                raise OSError("it is no regular file")
            if file.peek(24).startswith(b"version https://git-lfs"):
                raise OSError("a pointer of Git LFS; fetch the file itself with git lfs pull")
            yield file
    except OSError as error:
        raise UserError(f"{path}: expected a file that can be read, found: "
                        f"{error.strerror or error}") from None


def read_bytes(path, most: int = 2**31) -> bytes:
    """The whole content of a regular file that has at most `most` bytes."""
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise UserError(f"{path}: expected at most {most:,} bytes, found {size:,}; "
                            f"is it the right file?")
        return file.read()


def parse_json(text: str | bytes, where, what: str = "JSON"):
    """One JSON text, as bytes in UTF-8; `where` it stands and `what` it is are for the error."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return json.loads(text, parse_constant=int)         # int("NaN") is a ValueError
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected {what}, found: {error!s:.160}") from None


def read_json(path, what: str = "JSON"):
    """A small JSON file."""
    return parse_json(read_bytes(path, 2**26), path, what)


@contextlib.contextmanager
def replacing(path: Path):
    """A new name beside `path`; what the block writes there takes `path`'s place when the block
    ends, and is removed when it fails."""
    part = path.parent / f"{path.name[:50]}.part-{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.rename(path)                                   # never over a folder that is not empty
        folder = os.open(path.parent, os.O_RDONLY)          # the name must outlive a power cut too
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:                # RuntimeError: torch.save, disk full
        raise UserError(f"{path}: cannot be written ({error}); "
                        f"what was there before is unchanged") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)             # a folder
        with contextlib.suppress(OSError):                  # or a file
            part.unlink()


def write_file(path, fill):
    """`fill(binary file)`, synced, in the place of `path`: the old stays until the new is whole."""
    with replacing(Path(path)) as part, open(part, "xb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def write_json(path, content):
    write_file(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def write_folder(path, fill):
    """`fill(folder)`: all of it appears at `path`, or none. A folder there must be empty."""
    with replacing(Path(path)) as part:
        part.mkdir()
        fill(part)


def read_saved(path):
    """What torch.save wrote in a run: no code in it is run, and no damaged byte passes."""
    blob = io.BytesIO(read_bytes(path))
    try:
        with zipfile.ZipFile(blob) as archive:              # torch.load leaves the checksums alone
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        blob.seek(0)
        return torch.load(blob, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: expected a file that a run has saved, found: "
                        f"{str(error).splitlines()[0]:.120}") from None


def fingerprint(path) -> str:
    """sha256 of a file's size and bytes; above 64 MiB of 32 evenly spread samples of 64 KiB."""
    with open_file(path) as file:
        size, length = os.fstat(file.fileno()).st_size, 2**16
        samples = [i * (size - length) // 31 for i in range(32)]
        digest = hashlib.sha256(str(size).encode())
        for start in range(0, size, length) if size <= 2**26 else samples:
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def clean_text(text: str) -> str:
    """Text that UTF-8 can hold: paired surrogates become their character, lone ones U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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
        folder = Path(folder)
        if os.path.isfile(folder / "config.json"):          # Hugging Face's, perhaps both
            return room("extras.huggingface").read_config(folder)
        if os.path.isfile(folder / "params.json"):
            return cls.parsed(folder / "params.json", cls.from_params)
        raise UserError(f"--ckpt {folder}: expected a folder with params.json (Meta) or "
                        f"config.json (Hugging Face)")

    @classmethod
    def parsed(cls, path: Path, parse) -> "ModelConfig":
        content = read_json(path, "a LLaMA's configuration")
        try:
            return parse(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ArithmeticError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: expected a LLaMA's configuration as a JSON object; "
                            f"{error!r:.120}") from None

    @classmethod
    def from_params(cls, p: dict) -> "ModelConfig":
        """Meta's params.json: the feed-forward's width is 8/3 dim, times a factor, rounded up."""
        odd = [k for k in p if k not in PARAMS_KEYS and not (k in IGNORABLE_IF_FALSE and not p[k])]
        if odd:
            raise UserError(f"{odd[0]!r} is not part of a plain LLaMA 1 or 2; only that is read")
        hidden = int(2 * 4 * p["dim"] / 3)
        if p.get("ffn_dim_multiplier") is not None:
            hidden = int(p["ffn_dim_multiplier"] * hidden)
        hidden = p["multiple_of"] * math.ceil(hidden / p["multiple_of"])
        return cls(p["dim"], p["n_layers"], p["n_heads"], p.get("n_kv_heads") or p["n_heads"],
                   p.get("vocab_size", -1), hidden, p["norm_eps"], p.get("rope_theta") or 10000.0)


# ---- the decoder --------------------------------------------------------------------------------

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps), made in fp32 and rounded *before* the gain, as Meta's code does."""

    def forward(self, x: Tensor) -> Tensor:                        # (..., D) -> (..., D)
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, d), Meta's layout: neighbours (2i, 2i+1) are one complex
    number, turned by its position's angle: on the CPU ten times faster than cos and sin apart."""
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))    # (B, T, H, d/2)
    return torch.view_as_real(z * torch.view_as_complex(rope)).flatten(-2).to(x.dtype)


def remember(cache: Tensor, k: Tensor, v: Tensor, slots, mask):
    """Writes keys and values (B, G, T, d) to a block's cache (2, B, G, S, d); returns all to look
    at. A slot is an absolute position, so a row's padding lies after its prompt and is overwritten
    by what the row generates."""
    T = k.shape[2]
    if slots is None:                                              # the prompts, from slot 0 on
        cache[0, :, :, :T], cache[1, :, :, :T] = k, v
        return k, v
    rows = torch.arange(len(slots), device=slots.device)
    cache[0, rows, :, slots], cache[1, rows, :, slots] = k[:, :, 0], v[:, :, 0]
    return cache[:, :, :, :mask.shape[-1]]


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
        if past is not None:
            k, v = remember(past[0], k, v, *past[1:])              # (B, G, S, d)
        if past is None or past[2] is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               enable_gqa=q.shape[1] != k.shape[1])
        else:   # one token a row: the heads of a group become the query's length, (B, G, H / G, d)
            q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=past[2]).flatten(1, 2)[:, :, None]
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
    same thing at any depth. `past` is (its cache, slots, mask), see LM.hidden. `rows` (N,), where
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
        self.stored = None                  # the dtype of the matrices in a checkpoint

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
        lm = LM(self.config, layers, self.tok_embeddings, self.norm, self.output)
        lm.stored = self.stored
        return lm

    def caches(self, batch: int, slots: int) -> list[Tensor]:
        """Of each block the keys and values to come, (2, B, G, S, d)."""
        shape = (2, batch, self.config.n_kv_heads, slots, self.config.head_dim)
        return [self.tok_embeddings.weight.new_zeros(shape) for _ in self.layers]

    def rope(self, positions: Tensor) -> Tensor:
        """Cosine and sine of every position's angles, fp32: (T,) -> (T, 1, d/2, 2)."""
        d = self.config.head_dim
        exponents = torch.arange(0, d, 2, device=positions.device).float() / d
        freqs = self.config.rope_theta ** -exponents
        angles = positions.float()[..., None, None] * freqs
        return torch.stack((angles.cos(), angles.sin()), -1)

    def hidden(self, tokens, caches=None, slots=None, mask=None, rows=None, tap=None):
        """tokens (B, T) -> (B, T, D) after the final norm, or (N, D) at positions b T + t = rows.
        With `caches` (one a block): the prompts if `slots` is None, else one token a row at
        position slots (B,), mask (B, 1, 1, S) over the cache. With `tap`, an index of `layers`:
        the pair of what enters that layer at `rows` and of the above."""
        T, device = tokens.shape[1], tokens.device
        rope = self.rope(torch.arange(T, device=device) if slots is None else slots[:, None])
        x, *_, last = self.tok_embeddings(tokens), *self.layers         # (B, T, D)
        for n, (i, block) in enumerate(self.layers.items()):
            if tap is not None and int(i) == tap:
                tapped = x if rows is None else x.flatten(0, 1)[rows]
            x = block(x, rope, caches and (caches[n], slots, mask), rows if i == last else None)
        return self.norm(x) if tap is None else (tapped, self.norm(x))

    def forward(self, tokens: Tensor) -> Tensor:                        # (B, T) -> (B, T, V)
        return self.output(self.hidden(tokens))

# ---- tokenizer ----------------------------------------------------------------------------------

class Tokenizer:
    """The sentencepiece model of LLaMA 1 and 2: text <-> ids."""

    def __init__(self, path, ends=()):
        """`ends`: ids that end a text, beside the model's own EOS."""
        from sentencepiece import SentencePieceProcessor       # here: --plan needs no tokenizer
        content = read_bytes(path)
        try:
            self.pieces = SentencePieceProcessor()
            self.pieces.LoadFromSerializedProto(content)
        except (RuntimeError, OSError):
            raise UserError(f"{path}: not a sentencepiece model (LLaMA 3's tiktoken file is not "
                            f"supported)") from None
        self.vocab_size = self.pieces.vocab_size()
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        if min(self.bos, self.eos) < 0:
            raise UserError(f"{path}: expected pieces for the begin and the end of a text, found "
                            f"BOS {self.bos}, EOS {self.eos} (-1: none); take a LLaMA's tokenizer")
        self.ends = tuple(dict.fromkeys((self.eos, *ends)))

    def encode(self, text: str) -> list[int]:
        """No BOS, no EOS: data.py places each once."""
        return self.pieces.encode(text)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each, on all cores."""
        return self.pieces.encode(texts)

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def vocabulary(self) -> list[str]:
        return [self.pieces.id_to_piece(i) for i in range(self.vocab_size)]


def load_tokenizer(folder, config: ModelConfig) -> Tokenizer:
    """tokenizer.model of a checkpoint folder, of the model's vocabulary."""
    path, ends = Path(folder) / "tokenizer.model", ()
    if not path.is_file():
        above = path.resolve().parent.parent / path.name
        there = f"{above} is one: copy it here" if above.is_file() else "download it"
        raise UserError(f"{path}: no such file; a checkpoint folder needs its sentencepiece "
                        f"tokenizer.model; {there}")
    if (path.parent / "config.json").is_file():
        ends = room("extras.huggingface").end_ids(path.parent)
    tokenizer = Tokenizer(path, ends)
    more = config.vocab_size - tokenizer.vocab_size
    if config.vocab_size != -1 and more:
        why = "added pieces, as for padding, are not supported: take the model without them" if (
            0 < more <= 64) else "they do not belong together"
        raise UserError(f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces, the model's "
                        f"vocab_size is {config.vocab_size}; {why}")
    return tokenizer


# ---- checkpoints --------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_records(file):
    """A mapped archive is trusted to say itself where a record's bytes begin, unlike one that is
    read: a damaged length there would shift a tensor. torch.save aligns each record to 64 bytes and
    lets no more than its 0, 16 or 24 bytes of trailer follow."""
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda r: r.header_offset)
        ends = [r.header_offset for r in records[1:]] + [archive.start_dir]
    for record, end in zip(records, ends):
        file.seek(record.header_offset + 26)
        lengths = (int.from_bytes(file.read(2), "little") for _ in range(2))        # name, extra
        start = record.header_offset + 30 + sum(lengths)
        trailer = end - start - record.file_size
        if start % 64 or trailer not in (0, 16, 24) or record.compress_type:
            raise ValueError(f"{record.filename} is not where torch.save would have put it")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .pth or .bin file, mapped where its format allows. weights_only: no code in it is run."""
    try:
        with open_file(path) as file:
            if mapped := zipfile.is_zipfile(file):
                check_records(file)
        tensors = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except UserError:
        raise
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


def weight_sets(folder: Path) -> list[list[Path]]:
    """The folder's sets of weight files: each holds the model. Meta's, then Hugging Face's."""
    names = list_folder(folder)
    meta = [name for name in names if re.fullmatch(r"consolidated\..*pth", name)]
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(meta))]
    if meta != wanted:
        raise UserError(f"{folder}: expected shards {wanted[0]}..{wanted[-1]}, found "
                        f"{', '.join(meta)}")
    sets = [[folder / name for name in meta]] if meta else []
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        sets += room("extras.huggingface").weight_sets(folder, names)
    if not sets:
        raise UserError(f"--ckpt {folder}: found no consolidated.00.pth, *.safetensors or "
                        f"pytorch_model*.bin")
    return sets


def named_tensors(path: Path, config: ModelConfig):
    """(name in the file, Meta's name, tensor) of a file, by whose naming scheme it may be."""
    read = read_pickle if path.suffix != ".safetensors" else (
        room("extras.huggingface").read_safetensors)
    tensors = read(path)
    if any(name.startswith(("model.", "lm_head.")) for name in tensors):
        yield from room("extras.huggingface").translated(path, tensors, config)
    else:
        yield from ((name, name, t) for name, t in tensors.items() if name != "rope.freqs")


def part_of(path: Path, name: str, shape, shard: int, parts: int) -> tuple[list, tuple]:
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

    Strict: every tensor of the architecture, in its shape, and nothing else; what stands twice (in
    two sets of files, or as a tied head) must be equal; else UserError. `dtype` None: as stored.
    One shard is mapped at a time, and copied tensor by tensor. Device "meta": nothing is read.
    """
    with torch.device("meta"):
        lm, whole = LM.empty(config, layer_ids), LM.empty(config)
    if str(device) == "meta":
        return lm.to(dtype).requires_grad_(False)
    shapes = {name: p.shape for name, p in whole.named_parameters()}    # a tied head is not in it
    state, filled, wanted = {}, Counter(), lm.state_dict().keys()
    for files in weight_sets(Path(folder)):
        parts = len(files) if files[0].suffix == ".pth" else 1
        for shard, path in enumerate(files):
            for key, name, tensor in named_tensors(path, config):
                if config.tied and name == "output.weight":
                    name = "tok_embeddings.weight"
                if name not in shapes:
                    raise UserError(f"{path}: surplus tensor {key}, which a LLaMA of "
                                    f"{config.n_layers} layers does not have")
                shape, where = part_of(path, name, shapes[name], shard, parts)
                if list(tensor.shape) != shape or tensor.dtype not in FLOATS:
                    raise UserError(f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, "
                                    f"expected floats of shape {shape}")
                new = filled[name] < shapes[name].numel()
                if new:
                    filled[name] += tensor.numel()
                if name in wanted and name not in state:
                    state[name] = torch.empty(shapes[name], dtype=dtype or tensor.dtype,
                                              device=device)
                if name in wanted and new:
                    state[name][where].copy_(tensor)
                    lm.stored = tensor.dtype if tensor.dim() > 1 else lm.stored
                elif name in wanted and not torch.equal(state[name][where],
                                                        tensor.to(state[name])):
                    raise UserError(f"{path}: {key} stands twice in {folder}, with other numbers; "
                                    f"remove one of the two sets of weights")
            tensor = None                               # unmaps this shard before the next
        missing = [name for name in shapes if filled[name] != shapes[name].numel()]
        if missing:
            raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is "
                            f"{missing[0]}")
    return lm.take(state)


def load(folder, layer_ids=None, dtype=torch.float32, device="cpu") -> tuple[LM, Tokenizer]:
    """The model and the tokenizer of a checkpoint folder, Meta's or Hugging Face's."""
    config = ModelConfig.read(folder)
    tokenizer = load_tokenizer(folder, config)
    if config.vocab_size == -1:
        config = replace(config, vocab_size=tokenizer.vocab_size)
    return load_weights(folder, config, layer_ids, dtype, device), tokenizer


# ---- generation ---------------------------------------------------------------------------------

CACHE_BYTES = 2**32         # 4 GiB of cache leave a card of 24 GB room beside a model of 7B


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator) -> Tensor:
    """Next tokens (B,) from logits (B, V): the best, or drawn within the top k and the top p."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    p, ids = p.sort(dim=-1, descending=True, stable=True)
    if top_k:
        p[:, top_k:] = 0
    beyond = p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True)
    beyond[:, 0] = False                                            # the first piece always stays
    p = p.masked_fill(beyond, 0)
    # torch.multinomial draws likewise, but has a GPU waited for: the largest p / Exp(1) wins
    draw = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return ids.gather(1, draw)[:, 0]


def generate_batch(lm: LM, prompts, max_new_tokens: int, ends: tuple, pick) -> list[list[int]]:
    """One batch of `generate`. Finished rows leave the batch once they are a quarter of it."""
    device = lm.tok_embeddings.weight.device
    longest = max(map(len, prompts))
    caches = lm.caches(len(prompts), longest + max_new_tokens)
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (B, T)
    slots = torch.tensor([len(p) for p in prompts], device=device)  # where a row's next token goes
    rows, last = torch.arange(len(prompts), device=device), torch.tensor(ends, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    output = torch.full((len(prompts), max_new_tokens), ends[0], device=device)
    x = lm.hidden(tokens, caches, rows=rows * longest + slots - 1)  # (B, D): each prompt's last
    look_every = 1 if device.type == "cpu" else 16                  # reading stalls a GPU
    for step in range(max_new_tokens):
        z = lm.output(x)                                            # (B, V)
        fine = z.isfinite()
        finite = finite & fine.all()
        token = pick(z.where(fine, 0)).masked_fill(done, ends[0])   # (B,)
        output[rows, step] = token
        done = done | (token[:, None] == last).any(1)
        if step % look_every == 0 or step + 1 == max_new_tokens:
            *over, fine = torch.cat((done, finite[None])).tolist()
            if not fine:
                raise UserError("the model's output is not finite (an overflow, if --dtype is "
                                "fp16); try --dtype bf16 or fp32")
            if all(over):
                break
            if sum(over) * 4 >= len(over):
                keep = torch.tensor([i for i, end in enumerate(over) if not end], device=device)
                rows, slots, token, done = rows[keep], slots[keep], token[keep], done[keep]
                for n, cache in enumerate(caches):                  # one more copy at a time
                    caches[n] = cache[:, keep]
        if step + 1 < max_new_tokens:
            mask = torch.arange(longest + step + 1, device=device) <= slots[:, None]    # (B, S)
            x = lm.hidden(token[:, None], caches, slots, mask[:, None, None])[:, 0]
            slots = slots + 1
    return output.tolist()


@torch.inference_mode()
def generate(lm: LM, prompts: list[list[int]], max_new_tokens: int, eos, batch_size=0,
             temperature=0.0, top_k=0, top_p=1.0, generator=None, stop: int | None = None,
             progress: str | None = None) -> list[list[int]]:
    """New token ids of each prompt, without EOS (an id or several), in the prompts' order.

    Greedy at temperature 0, else sampled with `generator` (on the model's device). Prompts are
    sorted by length so that a batch wastes little padding; batch_size 0: up to 64 whose caches take
    CACHE_BYTES. A text also ends behind the piece `stop`; `progress` names a progress bar.
    """
    assert all(prompts), "generate: an empty prompt; begin with BOS"
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    ends = eos if stop is None else (*eos, stop)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_slot = sum(cache.nbytes for cache in lm.caches(1, 1))
    outputs, start, most = [None] * len(prompts), 0, batch_size or 64
    bar = tqdm(total=len(prompts), desc=progress, disable=None if progress else True, leave=False)
    while start < len(order):
        batch = order[start:start + most]
        if not batch_size:
            slots = [n * (len(prompts[i]) + max_new_tokens) for n, i in enumerate(batch, 1)]
            batch = batch[:max(sum(n * per_slot <= CACHE_BYTES for n in slots), 1)]
        try:
            texts = generate_batch(lm, [prompts[i] for i in batch], max_new_tokens, ends,
                                   lambda z: choose(z, temperature, top_k, top_p, generator))
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise UserError(f"one prompt of {len(prompts[batch[0]])} pieces does not fit into "
                                f"memory: {error!s:.100}") from None
            texts = None
        if texts is None:                       # here the failed batch's tensors are gone
            most = len(batch) // 2
            print(f"note: out of memory; now {most} sequences at a time", file=sys.stderr)
            continue
        for i, text in zip(batch, texts):
            end = next((n for n, token in enumerate(text) if token in eos), len(text))
            outputs[i] = text[:end]
        start += len(batch)
        bar.update(len(batch))
    bar.close()
    return outputs
