"""The test sets beside GSM8K, one file each: what eval.py does for --task rosetta and --task dolly."""


def accuracy(predicted: list, gold: list) -> dict:
    correct = sum(p is not None and p == g for p, g in zip(predicted, gold, strict=True))
    return {"correct": correct, "total": len(gold), "accuracy": correct / len(gold) if gold else 0.0}
