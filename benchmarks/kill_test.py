"""kill -9 at random moments, twenty times in a row: does the run still end in the same bits?

    python benchmarks/kill_test.py [--kills 20] [--processes 1] [--seed 0] [-- flags of train.py]

A whole run first; then the same run, killed with all its processes at a random moment and resumed,
until it has been killed that often; at last it is left to end. The moment is drawn by progress, so
that no machine is too fast or too slow: half of the lives end at a random time before the first new
round, half a random part of a round after it. Compares lora.pt, emulator.pt and the columns of
log.csv that are no times. Exit status 0 = the same bits. tests/test_attacks.py calls
`killed_and_whole` too.
"""
import argparse
import contextlib
import csv
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SHORT = ("--local-steps 4 --batch-size 4 --align-init 4 --align-steps 2 --eval-limit 2 "
         "--eval-every 10 --threads 1").split()


def execute(argv: list[str]):
    """What a process becomes: the command, silent."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.execv(argv[0], argv)


def descendants(pid: int) -> list[int]:
    """A process and all below it, from /proc: torchrun gives its workers sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):                  # it may just have ended
            parent = path.read_text().rpartition(")")[2].split()[1]
            parents[int(path.parent.name)] = int(parent)
    found = [pid]
    for parent in found:                                    # grows while it is read
        found += [p for p in parents if parents[p] == parent]
    return found


def rows(out: Path) -> list[dict]:
    """The rows of a run's log, without their times."""
    if not (out / "log.csv").exists():
        return []
    with open(out / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def until(job, reached, seconds: float = float("inf")):
    """Waits until `reached()`, for so many seconds at most, or until the job ends by itself."""
    end = time.perf_counter() + seconds
    while not reached() and time.perf_counter() < end and job.is_alive():
        time.sleep(0.005)


def whole_run(begin, out: Path) -> tuple[float, float]:
    """Seconds to the end of the first round, and of a later round, of a run that is left alone."""
    began, job = time.perf_counter(), begin(out)
    until(job, lambda: rows(out))
    first = time.perf_counter() - began
    job.join()
    total, done = time.perf_counter() - began, len(rows(out))
    if job.exitcode or not done:
        sys.exit(f"the run ended with status {job.exitcode} after {done} rounds")
    print(f"never stopped: {done} rounds in {total:.0f} s", flush=True)
    return first, (total - first) / max(done - 1, 1)


def life(begin, out: Path, first: float, later: float, rng: random.Random) -> bool:
    """One start and its kill; false where the run ended by itself."""
    done, job = len(rows(out)), begin(out)
    if rng.random() < 0.5:
        until(job, lambda: len(rows(out)) > done, rng.uniform(0, first))
    else:
        until(job, lambda: len(rows(out)) > done)
        until(job, lambda: False, rng.uniform(0, later))
    for pid in descendants(job.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.join()
    return job.exitcode == -signal.SIGKILL


def killed_and_whole(begin, folder: Path, kills: int, rng: random.Random) -> tuple[int, bool]:
    """(kills, the same bits at the end) of a run in folder/killed, against one in folder/whole.

    `begin(out)` starts a run, or resumes it, and gives a multiprocessing.Process.
    """
    whole, killed = folder / "whole", folder / "killed"
    first, later = whole_run(begin, whole)
    for kill in range(1, kills + 1):
        began = time.perf_counter()
        if not life(begin, killed, first, later, rng):
            print("the run ended by itself; give it more --rounds", flush=True)
            kills = kill - 1
            break
        lived = time.perf_counter() - began
        print(f"kill {kill} after {lived:.2f} s, {len(rows(killed))} rounds in the log", flush=True)
    last = begin(killed)
    last.join()
    a, b = ({path.name: path.read_bytes() for path in run.glob("[le]*.pt")}
            for run in (killed, whole))
    same = last.exitcode == 0 and rows(killed) == rows(whole) and a == b and "lora.pt" in a
    print(f"{kills} kills in a row, then left to end: status {last.exitcode}, "
          f"the same bits: {same}")
    return kills, same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    command = [sys.executable, str(TRAIN)]
    if args.processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                        str(args.processes)]
    # A life makes two rounds at most before its kill is due, and another while it is under way.
    command += [*SHORT, "--rounds", str(3 * args.kills), *args.flags, "--resume", "--out"]

    def begin(out: Path) -> multiprocessing.Process:
        job = multiprocessing.Process(target=execute, args=([*command, str(out)],))
        job.start()
        return job
    with tempfile.TemporaryDirectory() as folder:
        rng = random.Random(args.seed)
        kills, same = killed_and_whole(begin, Path(folder), args.kills, rng)
    return 0 if same and kills == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
