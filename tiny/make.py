"""Makes the bundled model and its data from a seed: data files, tokenizer, pre-trained checkpoint.

`write_data` (official file formats), `train_tokenizer` (sentencepiece BPE), `pretrain` (Meta's
checkpoint format). The texts come from gen_maths.py, gen_code.py, gen_qa.py and gen_helm.py;
README.md has the measurements.

    python tiny/make.py                 # all of it into tiny/, about 45 minutes on two cores
    python tiny/make.py --only small    # FedPT's small model, from the large one: minutes
    python tiny/make.py --only data     # the same files again, byte for byte
    python tiny/make.py --out /tmp/t --steps 5
"""
import argparse
import gzip
import io
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import gen_code
import gen_helm
import gen_maths
import gen_qa
from fedbiot import spread
from model import LM, ModelConfig, Tokenizer, generate, load_weights

PREAMBLE = (                # the fixed phrases of the prompt template
    "Below is an instruction that describes a task",
    ", paired with an input that provides further context",
    ". Write a response that appropriately completes the request.",
    "### Instruction:",
    "### Input:",
    "### Response:",
)
PARAMS = {"dim": 128, "n_layers": 12, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1024,
          "multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 10000.0}
# The share of each kind of example in pre-training.
MIX = {"maths": .65, "code": .09, "raw code": .03, "questions": .11, "choices": .02, "general": .10}
WORKED_FIRST = .67    # every word problem is worked out in this first part, then as STEPWISE says
SHORTS = .35          # how often a request for code is answered by code in pre-training
PROMPT_WEIGHT = .1    # of the loss on a prompt token, where an answer token has 1
BATCH, PEAK_LR, WARMUP = 64, 2e-3, 200    # examples a step; learning rate; steps
SMALL_LAYERS = 4      # of the small model, which FedPT uses


def template(instruction: str, text: str) -> str:
    """The Stanford-Alpaca prompt, as data.py has it."""
    task, with_input, write, instruction_head, input_head, response_head = PREAMBLE
    if text:
        return (f"{task}{with_input}{write}\n\n{instruction_head}\n{instruction}\n\n"
                f"{input_head}\n{text}\n\n{response_head}")
    return f"{task}{write}\n\n{instruction_head}\n{instruction}\n\n{response_head}"


# ---- pre-training's examples ----

def habits(done: float) -> dict:
    """How often each theme is worked out when the share `done` of pre-training is over."""
    return dict.fromkeys(gen_maths.STEPWISE, 1.0) if done < WORKED_FIRST else gen_maths.STEPWISE


def settled(done: float) -> dict:
    """How often each theme is worked out in the last stage: equally often from start to end."""
    return gen_maths.SETTLED


def example(rng, worked: dict) -> tuple[str, str]:
    """(prompt, answer) of pre-training; raw code has an empty prompt.

    worked: theme -> how often a word problem of this theme is worked out.
    """
    kind = rng.choices(list(MIX), MIX.values())[0]
    if kind == "raw code":
        return "", gen_code.raw_text(rng)
    draw = {
        "maths": lambda r: gen_maths.pretrain_row(r, worked),
        "code": lambda r: gen_code.rosetta_row(r, "pretrain", SHORTS),
        "questions": gen_qa.pretrain_row,
        "choices": gen_qa.choice_row,
        "general": gen_qa.general_row,
    }[kind]
    row = draw(rng)
    return template(row["instruction"], row["input"]), row["output"]


def public_row(rng) -> dict:
    """A row of the server's public set, which takes Alpaca's place.

    It has every skill, but few worked word problems: these are what the clients' data has.
    """
    rare = {theme: .3 * p for theme, p in gen_maths.STEPWISE.items()}
    percent, draws = zip(
        (25, lambda: gen_maths.pretrain_row(rng, rare)),
        (25, lambda: gen_qa.pretrain_row(rng)),
        (35, lambda: gen_qa.general_row(rng)),
        (12, lambda: gen_code.rosetta_row(rng, "pretrain", SHORTS)),
        (3, lambda: gen_qa.choice_row(rng)),
    )
    draw = rng.choices(draws, percent)[0]
    return draw()


# ---- data files ----

def distinct(make, n: int, key) -> list:
    """n rows that differ in `key`."""
    rows = {}
    while len(rows) < n:
        row = make()
        rows.setdefault(key(row), row)
    return list(rows.values())


def save(path: Path, data: bytes | str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_gsm8k(folder: Path, rng):
    for split, n in (("train", 6000), ("test", 800)):
        rows = distinct(lambda: gen_maths.gsm8k_row(gen_maths.problem(rng, split)), n,
                        key=lambda row: row["question"])
        save(folder / f"{split}.jsonl", jsonl(rows))


def write_alpaca(folder: Path, rng):
    rows = distinct(lambda: public_row(rng), 4000,
                    key=lambda row: (row["instruction"], row["input"], row["output"]))
    save(folder / "alpaca_data.json", json.dumps(rows, indent=1))


def write_rosetta(folder: Path, rng):
    rows = distinct(lambda: gen_code.rosetta_row(rng), 2400,
                    key=lambda row: (row["instruction"], row["input"]))
    save(folder / "rosetta_alpaca.json", json.dumps(rows, indent=1))


def write_dolly(folder: Path, rng):
    rows = distinct(lambda: gen_qa.dolly_row(rng), 3000,
                    key=lambda row: (row["instruction"], row["context"], row["response"]))
    save(folder / "databricks-dolly-15k.jsonl", jsonl(rows))


def write_problems(out: Path, seed: int, skip: int = 0):
    """24 HumanEval-X problems, each in four languages, after the first `skip` that are drawn.

    With skip=24 learning rates can be chosen on them: none of them is tested or trained on.
    """
    rng = random.Random(f"{seed} humaneval")
    specs = distinct(lambda: gen_code.spec_of(rng, "test"), skip + 24, lambda s: s.words)[skip:]
    for lang, folder in gen_code.TESTED.items():
        rows = [gen_code.humaneval(spec, lang, i, random.Random(f"{seed} {skip + i}"))
                for i, spec in enumerate(specs)]
        save(out / f"humaneval_x/{folder}/humaneval_{folder}.jsonl.gz",
             gzip.compress(jsonl(rows).encode(), mtime=0))


def write_data(out: Path, seed: int):
    """All data files. Each data set has its own random stream, so none depends on another."""
    write_gsm8k(out / "gsm8k", random.Random(f"{seed} gsm8k"))
    write_alpaca(out / "alpaca", random.Random(f"{seed} alpaca"))
    write_rosetta(out / "rosetta", random.Random(f"{seed} rosetta"))
    write_dolly(out / "dolly", random.Random(f"{seed} dolly"))
    write_problems(out, seed)
    for name, content in gen_helm.files(seed).items():
        save(out / "helm_qa" / name, content)


# ---- tokenizer ----

def train_tokenizer(folder: Path, seed: int):
    """BPE as LLaMA's: digits split, bytes for the unknown, every space and newline kept.

    Each fixed phrase of the prompt template is one piece, which keeps the examples short.
    """
    rng, model = random.Random(f"{seed} tokenizer"), io.BytesIO()
    texts = [part for i in range(40_000) for part in example(rng, habits(i / 40_000)) if part]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=PARAMS["vocab_size"],
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", *(p.replace(" ", "▁") for p in PREAMBLE)],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    save(folder / "tokenizer.model", model.getvalue())


# ---- pre-training ----

def encode(pieces, pairs, threads: int) -> list[tuple[list[int], int]]:
    """(ids of BOS, prompt, answer and EOS; the index of the answer's first) for each pair.

    Prompt and answer are encoded apart, so that no piece covers the end of one and the start of
    the other.
    """
    prompts = pieces.encode([prompt for prompt, _ in pairs], num_threads=threads)
    answers = pieces.encode([answer for _, answer in pairs], num_threads=threads)
    bos, eos = [pieces.bos_id()], [pieces.eos_id()]
    return [(bos + x + y + eos, 1 + len(x)) for x, y in zip(prompts, answers)]


def batches(examples, rng):
    """Batches of examples of like length, so that little is padded.

    Examples are sorted by length within blocks of 50 batches, and each block's batches shuffled.
    """
    block, found = 50 * BATCH, []
    for i in range(0, len(examples), block):
        rows = sorted(examples[i:i + block], key=lambda e: len(e[0]))
        group = [rows[j:j + BATCH] for j in range(0, len(rows), BATCH)]
        rng.shuffle(group)
        found += group
    return found


def tensors(batch):
    """tokens (B, T) and the weights (B, T - 1) of the loss on tokens 1 .. T - 1.

    A weight is 1 on the answer, PROMPT_WEIGHT on the prompt and 0 on padding.
    """
    T = max(len(ids) for ids, _ in batch)
    tokens = torch.zeros(len(batch), T, dtype=torch.long)
    weights = torch.zeros(len(batch), T - 1)
    for row, (ids, start) in enumerate(batch):
        tokens[row, :len(ids)] = torch.tensor(ids)
        weights[row, :start - 1] = PROMPT_WEIGHT
        weights[row, start - 1:len(ids) - 1] = 1.0
    return tokens, weights


def fresh_model(config, seed: int) -> LM:
    """Normal weights; smaller in the matrices that write into the residual stream."""
    torch.manual_seed(seed)
    lm = LM.empty(config)
    for name, p in lm.named_parameters():
        if p.dim() == 2:
            into_stream = name.endswith(("wo.weight", "w2.weight"))
            divisor = math.sqrt(2 * config.n_layers) if into_stream else 1
            torch.nn.init.normal_(p, std=.06 / divisor)
    return lm


def shallow_model(config, folder: Path) -> LM:
    """The model in `folder` with config.n_layers of its layers, evenly spread, or with them all."""
    large = load_weights(folder, ModelConfig.read(folder))
    picked = spread(large.config.n_layers, config.n_layers)
    layers = {i: large.layers[str(k)] for i, k in enumerate(picked)}
    lm = LM(config, layers, large.tok_embeddings, large.norm, large.output)
    return lm.requires_grad_(True)


def save_checkpoint(lm: LM, folder: Path, params: dict):
    """Meta's params.json and consolidated.00.pth, in bf16.

    The weights are renamed into place, so that a reader never sees half a file.
    """
    state = {name: p.detach().to(torch.bfloat16).clone() for name, p in lm.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "consolidated.tmp")
    os.replace(folder / "consolidated.tmp", folder / "consolidated.00.pth")
    save(folder / "params.json", json.dumps(params) + "\n")


@torch.no_grad()
def first_token_of_a_worked_answer(lm, tokenizer, prompt) -> int:
    """The likeliest first token other than the piece (a space) with which a bare number begins."""
    logits = lm(torch.tensor([prompt]))[0, -1]                             # (V,)
    logits[tokenizer.encode("1")[0]] = -math.inf
    return int(logits.argmax())


def score(lm, tokenizer, problems, worked=False) -> tuple[float, float]:
    """(accuracy, share of worked answers) on word problems, decoded greedily.

    With `worked` no answer may begin with a number, so the model has to work it out: this shows
    what the model can do, where without `worked` it shows what the model does.
    """
    prompts = [[tokenizer.bos] + tokenizer.encode(template(p["question"], "")) for p in problems]
    if worked:
        for prompt in prompts:
            prompt.append(first_token_of_a_worked_answer(lm, tokenizer, prompt))
    texts = [tokenizer.decode(ids) for ids in generate(lm, prompts, 110, tokenizer.eos)]
    said = [text.split("The answer is")[-1].strip().rstrip(".") for text in texts]
    return (sum(t == str(p["answer"]) for t, p in zip(said, problems)) / len(problems),
            sum("The answer is" in t for t in texts) / len(problems))


def make_examples(tokenizer, args, total: int, worked):
    """Pre-training's examples, encoded, and the generator that drew them, which shuffles them next.

    worked: share of the stage that is over -> how often each theme is worked out then.
    """
    began = time.time()
    rng = random.Random(f"{args.seed} pretrain{'' if worked is habits else ', settled'}")
    pairs = [example(rng, worked(i / total)) for i in range(total)]
    examples = encode(tokenizer.pieces, pairs, args.threads)
    mean = sum(len(ids) for ids, _ in examples) / total
    print(f"{total} examples, {mean:.1f} tokens each, made in {time.time() - began:.0f} s; "
          f"e.g.\n{pairs[0][0]}{pairs[0][1]}", flush=True)
    return examples, rng


def make_optimizer(lm: LM, lr: float):
    """AdamW with weight decay on the matrices and none on the norms."""
    matrices = [p for p in lm.parameters() if p.dim() == 2]
    norms = [p for p in lm.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": norms, "weight_decay": 0.}], lr,
                             betas=(.9, .95), weight_decay=.1, fused=True)


def batch_loss(lm: LM, batch):
    """The weighted mean of the cross-entropies of a batch's tokens."""
    tokens, weights = tensors(batch)
    # On CPU the flash kernel takes twice as long as plain attention at these sizes.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        logits = lm(tokens[:, :-1])                                        # (B, T - 1, V)
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(),
                             reduction="none")                             # (B * (T - 1),)
    return (losses * weights.flatten()).sum() / weights.sum()


def update(lm: LM, optimizer, batch, lr: float) -> float:
    """One step of the optimizer; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = batch_loss(lm, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def watch(lm: LM, tokenizer):
    """Prints how the model does on 128 test problems, of its own accord and made to work."""
    problems = [gen_maths.problem(random.Random(f"watch {i}"), "test") for i in range(128)]
    free, worked = score(lm, tokenizer, problems), score(lm, tokenizer, problems, worked=True)
    print("  watch: right %.2f (worked %.2f) | made to work it out: right %.2f (worked %.2f)"
          % (*free, *worked), flush=True)


def pretrain(folder: Path, args, params=PARAMS, steps=0, start: Path | None = None, worked=habits,
             peak=PEAK_LR, warmup=WARMUP):
    """AdamW with warm-up and a cosine to a hundredth of `peak` after `steps`.

    The schedule ends earlier if `--minutes` are over first. The model starts from the checkpoint
    in `start`, or fresh. worked: see `make_examples`.
    """
    torch.set_num_threads(args.threads)
    tokenizer, config = Tokenizer(folder / "tokenizer.model"), ModelConfig.from_params(params)
    steps = steps or args.steps
    examples, rng = make_examples(tokenizer, args, steps * BATCH, worked)
    lm = shallow_model(config, start) if start else fresh_model(config, args.seed)
    optimizer = make_optimizer(lm, peak)
    began = saved = time.time()
    for step, batch in enumerate(batches(examples, rng)):
        minutes = (time.time() - began) / 60
        done = max(step / steps, minutes / args.minutes if args.minutes else 0)
        if done >= 1:
            break
        lr = peak * min(1, (step + 1) / warmup) * (.01 + .99 * (1 + math.cos(math.pi * done)) / 2)
        loss = update(lm, optimizer, batch, lr)
        if step % 100 == 0:
            print(f"step {step} | {done:.1%} | loss {loss:.3f} | lr {lr:.1e} | "
                  f"{time.time() - began:.0f} s", flush=True)
        if args.save_to and time.time() - saved > args.save_every:
            save_checkpoint(lm, args.save_to, params)
            watch(lm, tokenizer)
            saved = time.time()
    save_checkpoint(lm, folder, params)


def settle(folder: Path, args):
    """A last short stage at a low learning rate, in which more word problems are worked out.

    The base model then works a problem out now and then of its own accord.
    """
    pretrain(folder, args, steps=args.settle_steps, start=folder, worked=settled, peak=3e-4,
             warmup=20)


def make_small(out: Path, args):
    """FedPT's small model: SMALL_LAYERS of the large model's layers, trained on as that one was.

    It has the large model's tokenizer.
    """
    save(out / "small" / "tokenizer.model", (out / "llama" / "tokenizer.model").read_bytes())
    pretrain(out / "small", args, PARAMS | {"n_layers": SMALL_LAYERS}, args.small_steps,
             out / "llama")


# ---- command line ----

def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent,
                        help="folder to fill (default: this one)")
    parser.add_argument("--seed", type=int, default=0)
    parts = ("data", "tokenizer", "model", "small", "settled", "held-out")
    parser.add_argument("--only", choices=parts,
                        help="just one of the parts; "
                             "held-out: 24 HumanEval-X problems to choose rates on")
    parser.add_argument("--steps", type=int, default=4900, help=f"of {BATCH} examples each")
    parser.add_argument("--settle-steps", type=int, default=250, help="of the last stage")
    parser.add_argument("--small-steps", type=int, default=900, help="of the small model")
    parser.add_argument("--minutes", type=float, default=0,
                        help="let the schedule end earlier, by the clock")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=300,
                        help="seconds between those checkpoints")
    parser.add_argument("--save-to", type=Path, help="folder for checkpoints while it trains")
    return parser.parse_args()


def main():
    args = arguments()
    parts = {
        "data": lambda: write_data(args.out / "data", args.seed),
        "tokenizer": lambda: train_tokenizer(args.out / "llama", args.seed),
        "model": lambda: pretrain(args.out / "llama", args),
        "small": lambda: make_small(args.out, args),
        "settled": lambda: settle(args.out / "llama", args),
        "held-out": lambda: write_problems(args.out / "data", args.seed, skip=24),
    }
    for name, make in parts.items():
        if args.only == name or args.only is None and name != "held-out":
            began = time.time()
            make()
            print(f"{name}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
