"""A partition by label: Rosetta's programming languages, Dolly's categories (section 4.1)."""
import sys


def by_label(labels: list[str], order: list[int], clients: int) -> list[list[int]]:
    """Index lists, one a client, every row of `order` in exactly one. One label a client; more
    labels than clients share (the smallest join up), fewer are split (the largest first)."""
    groups: dict[str, list[int]] = {}
    for i in order:
        groups.setdefault(labels[i], []).append(i)
    parts = sorted(groups.values(), key=len, reverse=True)
    if len(parts) > clients:
        print(f"note: {len(parts)} labels for {clients} clients: the smallest share a client; no "
              f"row is left out", file=sys.stderr)
    while len(parts) > clients:
        parts[-2:] = [parts[-2] + parts[-1]]
        parts.sort(key=len, reverse=True)
    while len(parts) < clients:
        largest = parts.pop(0)
        parts += [largest[::2], largest[1::2]]
        parts.sort(key=len, reverse=True)
    return parts
