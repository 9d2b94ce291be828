"""A model's programs, kept apart: run_sandboxed(command, files, box) -> (error, output)."""
import contextlib
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from model import UserError

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64",
          "/etc/alternatives", "/etc/ld.so.cache")
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
PROCESSES, FILE_MB, OUTPUT_MB = 128, 64, 4      # time and memory are the caller's to say
# What bwrap does, by hand. Arguments: the new root, the program's folder, how many folders to show,
# these, the command.
UNSHARE = """
root=$1 folder=$2 n=$3; shift 3
mount -t tmpfs -o mode=755,size=1m tmpfs "$root"; cd "$root"; mkdir -p proc old dev
show() {
    if [ -d "$1" ]; then mkdir -p ".$1"; else mkdir -p ".${1%/*}"; : > ".$1"; fi
    mount --rbind "$1" ".$1"
}
while [ $n -gt 0 ]; do
    if [ -L "$1" ]; then ln -s "$(readlink "$1")" ".$1"
    else show "$1"; mount -o remount,bind,ro ".$1"; fi
    shift; n=$((n - 1))
done
for device in null zero random urandom; do show /dev/$device; done
ln -s /proc/self/fd dev/fd; mount -t proc proc proc; show "$folder"
mount -o remount,bind,ro "$root"; pivot_root . old; cd /; umount -l /old; exec "$@"
"""
# In a chroot a program cannot make a user namespace, in which it could mount memory without end.
JAIL = 'mount --rbind / /old && exec chroot /old sh -c \'cd "$HOME" && exec "$@"\' sh "$@"'

# Tries again while processes that were killed with us still write.
CLEAN = ('read line; for i in 1 2 3 4 5 6 7 8 9; do '
         'chmod -R u+rwX "$1"; rm -rf "$1" && exit; sleep 1; done')


class Box(NamedTuple):
    """How a program is kept apart, and what it is given."""
    kind: str                   # bwrap, unshare or none
    shown: tuple = ()           # folders that it may read, besides the system's
    env: tuple = ()             # its environment: (name, value) pairs


def make_box(unsafe: bool = False) -> Box:
    """The first isolation that works here; none at all only where the user accepts that."""
    for kind in ("bwrap", "unshare"):
        if shutil.which(kind) and not run_sandboxed(["true"], {}, Box(kind))[0]:
            return Box(kind)
    if not unsafe:
        raise UserError("--run-code: expected bwrap or unshare to keep a model's programs apart, "
                        "neither works here; install bubblewrap, or accept the risk with "
                        "--unsafe-no-sandbox")
    print("note: no sandbox: the programs can reach your files and the network", file=sys.stderr)
    return Box("none")


@contextlib.contextmanager
def scratch(name: str):
    """A temporary folder that goes at the end, also if we are killed: the cleaner then reads its
    pipe's end. Not shutil.rmtree: it recurses, so a deep tree would stop it."""
    base = Path(tempfile.mkdtemp(prefix=f"fedbiot-{name}-")).resolve()
    cleaner = subprocess.Popen(["sh", "-c", CLEAN, "sh", base], stdin=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    try:
        yield base
    finally:
        cleaner.communicate(b"\n")


def run_sandboxed(command: list, files: dict, box: Box, seconds=10.0, memory_mb=1024,
                  address_mb=12288) -> tuple[str, str]:
    """Runs `command` in a fresh folder with `files`. ("", a limit or "exit status N"; output).

    It has PID, mount, network and IPC namespaces of its own, reads the toolchain's folders and
    nothing else, has no capability and, under root, a user id of its own. Resident memory is
    bounded for all its processes together.
    """
    with scratch("sandbox") as base, tempfile.TemporaryFile() as output:
        folder = base / "work"
        # Limits on processes do not bind root. systemd's dynamic users: no account has these.
        root = os.getuid() == 0 and box.kind != "none"
        uid = 61184 + base.stat().st_ino % 4336 if root else None
        env = {"PATH": SYSTEM_PATH, "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8",
               **dict(box.env)}
        folder.mkdir(), (base / "root").mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", errors="replace")
        for path in (folder, *folder.iterdir()) if uid else ():
            os.chown(path, uid, uid)
        argv = isolate(base, box) + restrict(uid, box, seconds, address_mb) + command
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   cwd=folder, env=env, start_new_session=True)
        try:
            why = watch(process, output, folder, seconds, memory_mb)
        finally:
            stop(process)
        output.seek(max(0, output.seek(0, os.SEEK_END) - 10000))
        text = output.read().decode(errors="replace")
    return why or (f"exit status {process.returncode}" if process.returncode else ""), text


def isolate(base: Path, box: Box) -> list:
    """What stands in front of a program to give it namespaces and a file tree of its own."""
    folder, shown = str(base / "work"), [p for p in SYSTEM if os.path.lexists(p)] + list(box.shown)
    if box.kind == "unshare":
        user = [] if os.getuid() == 0 else ["--map-root-user"]
        return ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--net", "--ipc",
                "--uts", "--fork", "--kill-child", *user, "sh", "-ec", UNSHARE, "sh",
                str(base / "root"), folder, str(len(shown)), *shown, "sh", "-c", JAIL, "sh"]
    if box.kind == "none":
        return []
    argv = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            "--die-with-parent", "--as-pid-1"]
    for path in [*shown, folder]:       # --dir: parents that bwrap makes unasked, only root may use
        for above in reversed(Path(path).parents[:-1]):
            argv += ["--dir", str(above)]
        how = "--symlink" if os.path.islink(path) else "--bind" if path == folder else "--ro-bind"
        argv += [how, os.readlink(path) if how == "--symlink" else path, path]
    if os.getuid():                         # JAIL needs rights that only root has here
        known = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
        argv += ["--unshare-user", "--disable-userns"] if "--disable-userns" in known else []
    return argv + ["--proc", "/proc", "--dev", "/dev", "--dir", "/old", "--remount-ro", "/dev",
                   "--remount-ro", "/", "--chdir", folder, "--",
                   *([] if os.getuid() else ["sh", "-c", JAIL, "sh"])]


def restrict(uid: int | None, box: Box, seconds: float, address_mb: int) -> list:
    """What limits a program and takes its rights. `timeout` is the namespace's init: nothing inside
    can kill it, and what is left when it ends is killed with it, even if we were killed before."""
    argv = ["timeout", "-s", "KILL", str(seconds + 5), "prlimit"]
    for name, value in (("nproc", PROCESSES), ("fsize", FILE_MB << 20), ("as", address_mb << 20),
                        ("nofile", 512), ("core", 0)):
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        argv.append(f"--{name}={value if hard == resource.RLIM_INFINITY else min(value, hard)}")
    user = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"] if uid else []
    if uid or box.kind == "unshare":
        argv += ["setpriv", *user, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    return argv


def watch(process, output, folder: Path, seconds: float, memory_mb: int) -> str:
    """Waits for the program's end ("") or for it to go over a limit (which)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            process.wait(0.05)
            return ""
        except subprocess.TimeoutExpired:
            resident = tree(process.pid)
        if sum(resident.values()) > memory_mb << 20:
            return "memory"
        if len(resident) > PROCESSES + 4:
            return "processes"
        if os.fstat(output.fileno()).st_size > OUTPUT_MB << 20:
            return "output"
        if disk_use(folder) > FILE_MB << 22:
            return "files"
    return "time"


def tree(root: int) -> dict[int, int]:
    """Process id -> resident bytes, of a process and all below it. An orphan falls to its
    namespace's init, so it stays."""
    above, resident = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # a program's name may hold anything
            stat = path.read_text(errors="replace").rsplit(")", 1)[1].split()
        except OSError:                     # it ended in between
            continue
        above[int(path.parent.name)] = int(stat[1])
        resident[int(path.parent.name)] = int(stat[21]) * resource.getpagesize()
    found, new = set(), {root}
    while new:
        found |= new
        new = {pid for pid, parent in above.items() if parent in found} - found
    return {pid: resident.get(pid, 0) for pid in found}


def disk_use(folder) -> float:
    """Bytes of all files below; what cannot be looked into counts as too much."""
    total, folders = 0, [folder]
    while folders:
        try:
            for entry in os.scandir(folders.pop()):
                total += 512 * entry.stat(follow_symlinks=False).st_blocks + 512
                folders += [entry.path] if entry.is_dir(follow_symlinks=False) else []
        except FileNotFoundError:           # deleted in between
            continue
        except OSError:
            return math.inf
    return total


def stop(process):
    """Kills what is left: the namespace's init and all else below, then what stood in front."""
    for pid in tree(process.pid).keys() - {process.pid} if process.poll() is None else ():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
