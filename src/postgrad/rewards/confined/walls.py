"""The walls around a process that runs code nobody has read.

Kernel interfaces are called by ctypes, so that no tool has to be installed and a sandbox starts as
fast as a fork. Three walls stand behind each other: namespaces (what there is to see), limits (how
much may be used) and a filter of system calls (what may be asked of the kernel).
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

NOBODY = 65534
FOLDER = "/tmp"  # the only one that can be written to
# Besides the interpreter's own: shared libraries and where they are found, time zones, devices.
_SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/nix/store",
    "/etc/ld.so.cache",
    "/usr/share/zoneinfo",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_NEW_MOUNTS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = (
    1, 2, 4, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_DETACH = 2
_CAPABILITY_HEADER = struct.pack("Ii", 0x20080522, 0)
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _LANDLOCK = 442, 444  # the same on both


def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(returned: int, what: str) -> int:
    if returned < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return returned


def readable() -> list[str]:
    """The files and folders that Python and its libraries need, as they are named here."""
    own = [os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(os.__file__))]
    found = [*own, *sys.path, *_SYSTEM]
    # a folder within another one is there with it
    there = sorted({os.path.normpath(path) for path in found if os.path.lexists(path)})
    return [path for path in there if not _within(path, there)]


def _within(path: str, folders: Iterable[str]) -> bool:
    return any(path.startswith(f"{folder}/") for folder in folders)


def devices() -> list[str]:
    return [device for device in _DEVICES if os.path.exists(device)]


def is_real_root() -> bool:
    """Whether this process may make namespaces without one for users.

    Root of a container usually may not; inside it then stays who it is, without any power.
    """
    return os.getuid() == 0 and bool(_capabilities()[0] & 1 << 21)


def _capabilities() -> tuple[int, ...]:
    """Effective, permitted and inheritable capabilities, in two parts."""
    found = ctypes.create_string_buffer(24)
    _check(_library().capget(_CAPABILITY_HEADER, found), "capget")
    return struct.unpack("6I", found.raw)


def separate(size: int, *, real_root: bool) -> None:
    """Move this process into namespaces of its own; its children see a new root.

    There are the interpreter's files, read-only, and an empty folder in memory of `size` bytes; no
    network, no /proc, no other process. The caller has to fork: its child is the first process.
    """
    library = _library()
    spaces = _NEW_MOUNTS | _NEW_CGROUP | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET
    user, group = os.getuid(), os.getgid()
    _check(library.unshare(spaces if real_root else spaces | _NEW_USER), "namespaces")
    if not real_root:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _new_root(library, size)


def _new_root(library: Any, size: int) -> None:
    def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
        of_kind = None if kind is None else kind.encode()
        returned = library.mount(
            source.encode(), target.encode(), of_kind, ctypes.c_ulong(flags), options.encode()
        )
        _check(returned, f"mount {target}")

    safe = _NO_SUID | _NO_DEVICES
    shown = [*readable(), *devices()]
    mount("none", "/", None, _RECURSIVE | _PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", safe, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    pivot = _PIVOT_ROOT[platform.machine()]
    _check(library.syscall(pivot, b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    os.mkdir(FOLDER)
    mount("tmpfs", FOLDER, "tmpfs", safe, f"size={size},nr_inodes=4096,mode=1777")
    # only now is a source below /tmp uncovered again
    for path in shown:
        source = f"/old{path}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), path)
            continue
        if os.path.isdir(source):
            os.mkdir(path)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        mount(source, path, None, _BIND | _RECURSIVE)
        _read_only(library, path)  # a device can be written to all the same
    _check(library.umount2(b"/old", _DETACH), "umount")
    os.rmdir("/old")
    mount("none", "/", None, _REMOUNT | _BIND | _READ_ONLY | safe)
    os.chdir(FOLDER)


def _read_only(library: Any, path: str) -> None:
    """Everything mounted below `path`, too, which a plain remount would leave writable."""
    attributes = struct.pack("4Q", _READ_ONLY | _NO_SUID, 0, 0, 0)
    recursive = 0x8000
    _check(
        library.syscall(
            _MOUNT_SETATTR, -100, path.encode(), recursive, attributes, len(attributes)
        ),
        f"read-only {path}",
    )


def restrict(limits: dict[str, Any]) -> None:
    """Set the kernel's limits on this process, which no descendant can raise."""
    for name, value in (
        ("AS", limits["memory"]),
        ("FSIZE", limits["disk"]),
        ("CORE", 0),
        ("NOFILE", 64),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        if hasattr(resource, f"RLIMIT_{name}"):
            # no Python calls these limits by anything but their numbers
            with contextlib.suppress(ValueError):  # macOS refuses some
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if limits["cpu"] is not None:
        # the signal names the limit; code that ignores it is killed a second later
        resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1))


def give_up_privileges(*, become_nobody: bool) -> None:
    """Give up every power over the kernel, those in an own user namespace too; for good.

    Real root also becomes nobody: it owns too many files.
    """
    library = _library()
    library.prctl(47, 4, 0, 0, 0)  # ambient: clear all
    capability = 0
    while library.prctl(24, capability, 0, 0, 0) == 0:  # the bounding set
        capability += 1
    if become_nobody:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _check(library.capset(_CAPABILITY_HEADER, bytes(24)), "capset")


def die_with(parent: int) -> None:
    """End this process as soon as `parent` does, which started it."""
    _check(_library().prctl(1, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() not in (parent, 0):  # 0: in a process namespace the parent is outside
        os._exit(1)


def files_only_in(folder: str) -> bool:
    """Refuse, by Landlock, all files but those of Python (to read) and of `folder`.

    False where the kernel has no Landlock.
    """
    library = _library()
    version = library.syscall(_LANDLOCK, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    every = (1 << 13) - 1
    every |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    write_file, read_file, read_folder = 2, 4, 8
    rules = [(path, read_file | read_folder) for path in readable()]
    rules += [(path, read_file | write_file) for path in devices()]
    rules += [(folder, every & ~1)]  # all but execution
    handled = struct.pack("Q", every)
    ruleset = _check(library.syscall(_LANDLOCK, handled, ctypes.c_size_t(8), 0), "landlock")
    for path, allowed in rules:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            allowed &= ~read_folder
        rule = struct.pack("=Qi", allowed, place)
        _check(library.syscall(_LANDLOCK + 1, ruleset, 1, rule, 0), f"landlock {path}")
        os.close(place)
    _no_new_privileges(library)
    _check(library.syscall(_LANDLOCK + 2, ruleset, 0), "landlock")
    os.close(ruleset)
    return True


def _no_new_privileges(library: Any) -> None:
    _check(library.prctl(38, 1, 0, 0, 0), "no new privileges")


# Refused system calls by their numbers on (x86_64, aarch64); None where there is no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # processes and programs: none can be started, so none can be left behind
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # other processes: not read, written, signalled or given other limits
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # network of every family
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442),
    # memory that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189),
    "semget": (64, 190), "semop": (65, 193), "mq_open": (240, 180), "mq_unlink": (241, 181),
    # rarely needed doors into the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "personality": (135, 92), "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42), "vhangup": (153, 58), "uselib": (134, None), "ustat": (136, None),
    "sysfs": (139, None), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
}  # fmt: skip
# Changes of files that Landlock does not know, nor bubblewrap for devices; refused with either.
_CHANGES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "truncate": (76, 45),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
_OWN_ONLY = {"kill": (62, 129), "tgkill": (234, 131)}  # first argument: this process
_OWN_LIMITS = (302, 261)  # prlimit64: this process, or 0, which is the same
_UNKNOWN = 451  # calls from here on are newer than these lists
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def can_filter() -> bool:
    return sys.platform == "linux" and platform.machine() in _ARCHITECTURES


def filter_calls(*, also_changes: bool) -> None:
    """From here on the kernel refuses this process what `_REFUSED` lists; for good."""
    machine, architecture = _ARCHITECTURES[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, absent = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    number, architecture_at, first_argument = 0, 4, 16

    program: list[tuple[int, int, int, int]] = [
        (load, 0, 0, architecture_at),
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, number),
    ]

    def answer(test: int, value: int, with_: int) -> None:
        program.extend([(test, 0, 1, value), (give, 0, 0, with_)])

    def unless(call: int, test: int, *values: int) -> None:
        """Refuse the call unless its first argument passes the test with one of the values."""
        checks = [(test, len(values) - i, 0, value) for i, value in enumerate(values)]
        block = [(load, 0, 0, first_argument), *checks, (give, 0, 0, refuse), (give, 0, 0, allow)]
        program.extend([(equal, 0, len(block), call), *block])

    answer(at_least, 0x40000000, kill)  # the other numbering of x86_64
    answer(equal, _CLONE3[machine], absent)  # its flags cannot be seen; libraries then use clone
    answer(at_least, _UNKNOWN, absent)
    for numbers in (*_REFUSED.values(), *(_CHANGES.values() if also_changes else ())):
        call = numbers[machine]
        if call is not None:
            answer(equal, call, refuse)
    thread = 0x00010000
    unless(_CLONE[machine], any_bit, thread)
    for both in _OWN_ONLY.values():
        unless(both[machine], equal, os.getpid())
    unless(_OWN_LIMITS[machine], equal, 0, os.getpid())
    program.append((give, 0, 0, allow))
    _install(program)


def _install(program: Sequence[tuple[int, int, int, int]]) -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    library = _library()
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    whole = Program(len(program), code)
    _no_new_privileges(library)
    _check(library.prctl(22, 2, ctypes.byref(whole), 0, 0), "filter of system calls")


def bubblewrap(job: dict[str, Any], modules: str, start: str) -> list[str]:
    """The command that has `bwrap` put up the namespaces and start Python in them with the job.

    `modules` is the folder of these modules, `start` the statement that runs them.
    """
    command = [
        job["bwrap"],
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
        *("--unshare-cgroup-try", "--new-session", "--die-with-parent", "--cap-drop", "ALL"),
    ]
    if job["real_root"]:  # to become nobody, and to give up the rest
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            command += ["--cap-add", capability]
    else:
        command += ["--unshare-user"]
    command += ["--perms", "1777", "--size", str(job["limits"]["disk"]), "--tmpfs", FOLDER]
    python = os.path.realpath(sys.executable)
    shown = [*readable(), *devices(), *([python] if not _within(python, readable()) else [])]
    above = {str(folder) for path in shown for folder in PurePath(path).parents[:-1]}
    for folder in sorted({*above, "/code"} - {FOLDER}):
        command += ["--perms", "0755", "--dir", folder]
    for path in shown:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--dev-bind" if path in _DEVICES else "--ro-bind", path, path]
    command += ["--ro-bind", modules, f"/code/{os.path.basename(modules)}", "--remount-ro", "/"]
    command += ["--chdir", FOLDER, "--clearenv", "--setenv", "PYTHONHASHSEED", "0", "--", python]
    command += ["-s", "-P", "-S", "-X", "utf8", "-c", start, "/code", "inside", json.dumps(job)]
    return command
