"""GSM8K beside a default run: worked examples in the prompt, a file of predictions."""
from dataclasses import replace
from pathlib import Path

from data import accuracy, read_rows, texts_of
from eval import HERE, EvalConfig, extract_number, read_gold
from model import UserError


def worked_examples(shots: int) -> str:
    """Worked examples in front of the question: `Q: …  A: …`, written for this project."""
    path = HERE / "tiny" / "gsm8k_shots.jsonl"
    pairs = texts_of(read_rows(path), path, ("question", "answer"))
    if shots > len(pairs):
        raise UserError(f"--shots {shots}: {len(pairs)} worked examples are at hand, so choose "
                        f"0..{len(pairs)}")
    told = [(q, a.replace("####", "The answer is")) for q, a in pairs[:shots]]
    return "".join(f"Q: {q}\nA: {a}.\n\n" for q, a in told)


def score_predictions(cfg: EvalConfig) -> dict:
    """A file of {"index": row of test.jsonl, "text": …} -> accuracy over the file's rows."""
    path, (_, gold) = Path(cfg.predictions), read_gold(replace(cfg, validate=0))
    rows = read_rows(path)
    texts, indices, seen = texts_of(rows, path, ("text",)), [r.get("index") for r in rows], set()
    for i, index in enumerate(indices, 1):
        if type(index) is not int or not 0 <= index < len(gold) or index in seen:
            raise UserError(f"{path}, row {i}: expected an index in 0..{len(gold) - 1}, each once, "
                            f"found {index!r:.80}")
        seen.add(index)
    return accuracy([extract_number(text) for text, in texts], [gold[i] for i in indices])
