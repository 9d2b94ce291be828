"""A model's programs, kept apart: run_sandboxed(command, files, box) -> (error, output).

In order: what isolates (Box, make_box, isolate), what takes rights and sets limits (restrict; the
system calls that are refused), what is counted while a program runs (watch).
"""
import contextlib
import math
import os
import platform
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
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

# System calls by number, for each machine (its number in <linux/audit.h>). HIDDEN ones keep memory
# where `watch` cannot count it: add_key, io_uring_setup, memfd_create, memfd_secret, mq_open,
# msgget, semget, sendmmsg, sendmsg (a file on its way), shmget, socket, unshare (a thread's own
# table of files). FORK: fork, vfork and clone3, whose ENOSYS makes the C library call clone.
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HIDDEN = {"x86_64": (248, 425, 319, 447, 240, 68, 64, 307, 46, 29, 41, 272),
          "aarch64": (217, 425, 279, 447, 180, 186, 190, 269, 211, 194, 198, 97)}
FORK = {"x86_64": (57, 58, 435), "aarch64": (435,)}
CLONE, THREAD = {"x86_64": 56, "aarch64": 220}, 0x10400     # CLONE_THREAD | CLONE_FILES
# Takes the filter (prctl's PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP) and becomes the command. Without
# ctypes, or on a kernel without seccomp, the command runs without the filter.
LAUNCH = """
import os, struct, sys
try:
    import ctypes
    code = ctypes.create_string_buffer(bytes.fromhex(sys.argv[1]))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = 5 * [ctypes.c_ulong]
    listed = struct.pack("HP", len(code) // 8, ctypes.addressof(code))
    listed = ctypes.create_string_buffer(listed)
    prctl(38, 1, 0, 0, 0), prctl(22, 2, ctypes.addressof(listed), 0, 0)
except (ImportError, OSError, AttributeError):
    pass
os.execvp(sys.argv[2], sys.argv[2:])
"""

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
    patience = 60
    try:
        yield base
    except KeyboardInterrupt:
        patience = 0.1                      # the cleaner finishes alone
        raise
    finally:
        cleaner.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            cleaner.wait(patience)


def run_sandboxed(command: list, files: dict, box: Box, seconds=10.0, memory_mb=1024,
                  address_mb=12288, cancel: threading.Event | None = None) -> tuple[str, str]:
    """Runs `command` in a fresh folder with `files`. ("", a limit or "exit status N"; output).

    It has PID, mount, network and IPC namespaces of its own, reads the toolchain's and Python's
    folders and nothing else, has no capability and, under root, a user id of its own. Memory,
    resident or in files without a name, is bounded for all its processes together, and so is the
    output, all of which is returned. `cancel` set from another thread ends it ("stopped").
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
        argv = isolate(base, box) + restrict(uid, box, seconds, address_mb) + guard() + command
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   cwd=folder, env=env, start_new_session=True)
        try:
            why = watch(process, output, folder, seconds, memory_mb, cancel or threading.Event())
        finally:
            stop(process)
        output.seek(0)
        text = output.read(OUTPUT_MB << 20).decode(errors="replace")
    return why or (f"exit status {process.returncode}" if process.returncode else ""), text


def python_folders() -> set | None:
    """What a program must be shown to run this Python; None where the home folder is in it."""
    folders = {p for p in (sys.prefix, sys.base_prefix) if not f"{p}/".startswith("/usr/")}
    return None if any(Path.home().is_relative_to(p) for p in folders) else folders


def guard(fork: bool = True) -> list:
    """What stands in front of a command to have the system calls refused that could hide memory;
    without `fork` also those that start a process (threads stay). Nothing on other machines."""
    machine = platform.machine()
    if machine not in MACHINES or sys.maxsize < 2**32 or python_folders() is None:
        return []

    def step(code, value, yes=0, no=0):
        return struct.pack("HBBI", code, yes, no, value)
    load, equal, least, both, end = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, refuse = step(end, 0x7FFF0000), step(end, 0x00050000 | 38)       # 38: ENOSYS
    code = step(load, 4) + step(equal, MACHINES[machine], 1) + refuse
    code += step(load, 0) + step(least, 0x40000000, 0, 1) + refuse          # x86's other table
    for number in HIDDEN[machine] + (() if fork else FORK[machine]):
        code += step(equal, number, 0, 1) + refuse
    if not fork:
        code += step(equal, CLONE[machine], 0, 4) + step(load, 16)          # its first argument
        code += step(both, THREAD) + step(equal, THREAD, 1) + refuse
    python = os.path.realpath(sys.executable)
    return [python, "-I", "-S", "-c", LAUNCH, (code + allow).hex()]


def isolate(base: Path, box: Box) -> list:
    """What stands in front of a program to give it namespaces and a file tree of its own."""
    folder, shown = str(base / "work"), [p for p in SYSTEM if os.path.lexists(p)]
    shown = list(dict.fromkeys([*shown, *box.shown, *(python_folders() or ())]))
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


def watch(process, output, folder: Path, seconds: float, memory_mb: int, cancel) -> str:
    """Waits for the program's end ("") or for it to go over a limit (which)."""
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        if os.fstat(output.fileno()).st_size > OUTPUT_MB << 20:     # also where it has ended
            return "output"
        if process.returncode is not None:
            return ""
        if cancel.is_set():
            return "stopped"
        resident = tree(process.pid)
        held = unnamed(resident.keys() - {process.pid})
        if math.isinf(held) and time.monotonic() < start + 1:       # bwrap, before its command
            held = 0
        if sum(resident.values()) + held > memory_mb << 20:
            return "memory"
        if len(resident) > PROCESSES + 4:
            return "processes"
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


def unnamed(processes) -> float:
    """Bytes of the files without a name (memfd, deleted, shared memory) that these processes have
    open or mapped, and the most that their sockets can hold: `tree` and `disk_use` count neither.
    What cannot be looked into counts as too much."""
    sizes = {}
    for pid in processes:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            for key, size in [*opened(os.listdir(f"/proc/{pid}/fd"), pid), *mapped(maps)]:
                sizes[key] = max(size, sizes.get(key, 0))
        except PermissionError:
            return math.inf
        except OSError:                     # it ended in between
            continue
    return sum(sizes.values())


def opened(descriptors: list[str], pid: int):
    """((device, inode), bytes) of a process's open files without a name, and of its sockets."""
    for number in descriptors:
        with contextlib.suppress(FileNotFoundError):            # closed in between
            found = os.stat(f"/proc/{pid}/fd/{number}")
            if stat.S_ISSOCK(found.st_mode):
                yield (found.st_dev, found.st_ino), 1 << 19
            elif not found.st_nlink:
                yield (found.st_dev, found.st_ino), 512 * found.st_blocks


def mapped(maps: str):
    """((device, inode), bytes mapped) of the files without a name in a process's memory map."""
    sizes = Counter()
    for line in maps.split("\n"):
        if line.endswith(" (deleted)"):
            extent, _, _, device, inode, *_ = line.split()
            first, last = (int(number, 16) for number in extent.split("-"))
            major, minor = (int(number, 16) for number in device.split(":"))
            sizes[os.makedev(major, minor), int(inode)] += last - first
    return sizes.items()


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
