"""Code that nobody has read: what it may not do, what it may use, and what its verdict is worth."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from postgrad.errors import PostgradError
from postgrad.rewards import load_rewards, sandbox
from postgrad.rewards.confined import walls
from postgrad.rewards.sandbox import ISOLATIONS, STRONG, Interpreter, Limits, Sandbox
from postgrad.rewards.unit_tests import extract

HERE = [name for name in ISOLATIONS if sandbox.why_not(name) is None]
BEST = next((name for name in STRONG if name in HERE), None)
pytestmark = pytest.mark.skipif(BEST is None, reason="no strong isolation here")
FILTERED = walls.can_filter()


@pytest.fixture(scope="module", params=HERE)
def box(request):
    with Sandbox(request.param, Limits(wall=60)) as made:
        yield made


@pytest.fixture(scope="module")
def best():
    with Sandbox(limits=Limits(wall=60)) as made:
        yield made


# Each is run by itself and has got out if it raises nothing. They must get out where there is no
# sandbox: that is tested, too.
ESCAPES = {
    "reads /etc/passwd": "open('/etc/passwd').read()",
    "reads a file of its user": "open(SECRET).read()",
    "reads the repository": "open(REPOSITORY).read()",
    "lists a folder": "os.listdir(os.path.dirname(SECRET))",
    "follows a symbolic link out": """
        os.symlink(SECRET, 'link')
        open('link').read()
    """,
    "writes a file outside": "open(SECRET + '.new', 'w').write('x')",
    "changes a file outside": "open(SECRET, 'a').write('x')",
    "renames a file outside": """
        os.rename(SECRET, SECRET + '.moved')
        os.rename(SECRET + '.moved', SECRET)
    """,
    "changes permissions outside": "os.chmod(SECRET, 0o644)",
    "cuts a file outside": "os.truncate(SECRET, 3)",
    "makes a folder outside": "os.mkdir(SECRET + '.folder')",
    "connects to a port of this machine": "socket.create_connection(('127.0.0.1', PORT), 5)",
    "makes a socket": "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "connects to a socket in a file": """
        s = socket.socket(socket.AF_UNIX)
        s.connect(SOCKET)
    """,
    "reads the environment": "os.environ['POSTGRAD_SECRET']",
    "reads the environment of C": """
        libc.getenv.restype = ctypes.c_char_p
        assert libc.getenv(b'POSTGRAD_SECRET')
    """,
    "reads an inherited file": "os.pread(DESCRIPTOR, 1, 0)",
    "signals its parent": "os.kill(os.getppid(), 0)",
    "signals the trainer": "os.kill(TRAINER, signal.SIGUSR1)",
    "signals everybody": "os.kill(-1, 0)",
    "opens a handle of the trainer": "os.pidfd_open(TRAINER)",
    "reads the trainer's environment": "open(f'/proc/{TRAINER}/environ', 'rb').read()",
    "reads the trainer's command": "open(f'/proc/{TRAINER}/cmdline', 'rb').read()",
    "lists processes": "os.listdir('/proc')",
    "forks": """
        if os.fork() == 0:
            os._exit(0)
    """,
    "starts a program": "subprocess.run([PYTHON, '-c', '0'], check=True)",
    "replaces itself": "os.posix_spawn(PYTHON, [PYTHON, '-c', '0'], {})",
    "makes memory that no limit counts": "os.memfd_create('x')",
    "takes more time": "resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))",
    "opens more files": "files = [open('/dev/null') for _ in range(100)]",
}  # fmt: skip


def attempts(which, **places):
    """A program that prints the names of those escapes that succeed."""
    lines = ["import ctypes, os, resource, signal, socket, subprocess", "libc = ctypes.CDLL(None)"]
    lines += [f"{name} = {value!r}" for name, value in places.items()]
    lines += ["out = []"]
    for name in which:
        code = textwrap.dedent(ESCAPES[name]).strip()
        lines += ["try:", textwrap.indent(code, "    "), f"    out.append({name!r})"]
        lines += ["except Exception: pass"]
    return "\n".join([*lines, "print(out)"])


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """What there is to reach: a file, a listening port and socket, a variable, an open file."""
    secret = tmp_path / "secret"
    secret.write_text("for nobody")
    secret.chmod(0o600)
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    monkeypatch.setenv("POSTGRAD_SECRET", "x")
    # a short path, as sockets need
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as named,
        secret.open() as file,
    ):
        named.bind(f"{folder}/s")
        named.listen()
        os.set_inheritable(file.fileno(), True)
        yield {
            "SECRET": str(secret),
            "REPOSITORY": __file__,
            "PORT": server.getsockname()[1],
            "SOCKET": f"{folder}/s",
            "DESCRIPTOR": file.fileno(),
            "TRAINER": os.getpid(),
            "PYTHON": sys.executable,
        }
    signal.signal(signal.SIGUSR1, before)


def test_no_escape_gets_out(box, outside):
    if box.isolation == "process" and not FILTERED:
        pytest.skip("the weak form promises this only on Linux")
    result = box.run(attempts(ESCAPES, **outside))
    assert (result.output, result.errors) == ("[]\n", "")
    secret = Path(outside["SECRET"])
    assert secret.read_text() == "for nobody"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in secret.parent.iterdir()) == ["secret"]


def test_every_escape_gets_out_where_there_is_no_sandbox(outside, tmp_path):
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", attempts(ESCAPES, **outside)]
    descriptor = outside["DESCRIPTOR"]
    run = subprocess.run(
        command, cwd=tmp_path / "work", pass_fds=[descriptor], capture_output=True, check=True
    )
    assert run.stdout.decode() == f"{list(ESCAPES)}\n"


def test_in_a_strong_form_nothing_is_there(best, outside):
    program = """
    import os
    print(sorted(os.listdir(".")), os.path.exists("/proc"), os.path.exists("/home"))
    print(os.path.exists("/bin/sh"), os.getppid(), os.environ)
    print([name for name in ("/", "/usr", "/usr/lib", "/etc", "/dev", os.path.dirname(os.__file__))
           if os.access(name, os.W_OK)])
    """
    printed = best.run(textwrap.dedent(program)).output.splitlines()
    assert printed == ["[] False False", "False 1 environ({})", "[]"]


@pytest.mark.parametrize("isolation", [name for name in STRONG if name in HERE])
def test_devices_can_be_used_but_not_changed(isolation):
    program = """
    import errno, os
    print(open("/dev/null", "w").write("x"), len(open("/dev/urandom", "rb").read(4)))
    for change in (lambda: os.chmod("/dev/null", 0), lambda: os.fchmod(os.open("/dev/null", 2), 0)):
        try:
            change()
        except OSError as error:  # whose device it is depends on who runs this
            print(error.errno in (errno.EROFS, errno.EPERM))
    """
    with Sandbox(isolation) as box:
        assert box.run(textwrap.dedent(program)).output == "1 4\nTrue\nTrue\n"
        nowhere = (
            "import os\nreason = ''\ntry: os.fchmod(1, 0)\nexcept OSError as e: reason = e.errno"
        )
        assert box.test(nowhere, ["import errno\nassert reason in (errno.EROFS, errno.EPERM)"]) == [
            True
        ]


@pytest.mark.parametrize("isolation", [name for name in STRONG if name in HERE])
def test_in_a_strong_form_no_capability_is_left(isolation):
    program = """
    import ctypes
    libc = ctypes.CDLL(None)
    capabilities = (ctypes.c_uint32 * 6)()
    libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), capabilities)
    bounding = [libc.prctl(23, capability, 0, 0, 0) for capability in range(64)]
    print(list(capabilities), 1 in bounding, libc.prctl(39, 0, 0, 0, 0))
    """
    with Sandbox(isolation) as box:
        # and none can be had by starting a program: 1 is "no new privileges"
        assert box.run(textwrap.dedent(program)).output == f"{[0] * 6} False 1\n"


@pytest.mark.skipif(
    not (FILTERED and walls.is_real_root()), reason="only root can become somebody else"
)
def test_root_is_nobody_inside_for_good(best):
    program = """
    import os
    print(os.getresuid(), os.getresgid(), os.getgroups())
    for become in (os.setuid, os.setgid, os.seteuid):
        try:
            become(0)
        except PermissionError:
            print("refused")
    """
    ids = (walls.NOBODY,) * 3
    assert best.run(textwrap.dedent(program)).output == f"{ids} {ids} []\n" + "refused\n" * 3


@pytest.mark.skipif(not FILTERED, reason="there is no filter here")
def test_the_kernel_refuses_every_listed_call(box):
    lists = dict(walls._REFUSED)
    if box.isolation != "namespaces":
        lists |= walls._CHANGES
    numbers = {
        name: both[walls._ARCHITECTURES[os.uname().machine][0]] for name, both in lists.items()
    }
    # with these arguments a call that the filter lets through fails with another error, or succeeds
    program = f"""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    for name, number in {numbers!r}.items():
        if number is None or name in ("fork", "vfork", "reboot", "vhangup"):
            continue
        ctypes.set_errno(0)
        returned = libc.syscall(number, *[ctypes.c_long(-1)] * 6)
        if returned != -1 or ctypes.get_errno() != 1:
            print(name, returned, ctypes.get_errno())
    print(libc.syscall(435, 0, 0), ctypes.get_errno(), libc.syscall(9999), ctypes.get_errno())
    """
    assert box.run(textwrap.dedent(program)).output == "-1 38 -1 38\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="another numbering is x86_64's alone")
def test_the_other_numbering_of_calls_is_no_way_around(box):
    result = box.run("import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 57); print('out')")
    assert (result.output, result.exit) == ("", 128 + signal.SIGSYS)


LIMITED = {
    "an endless loop": ("while True: pass", ("cpu", "time")),
    "an endless loop that ignores signals": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        ("cpu", "time"),
    ),
    "sleep": ("import time\ntime.sleep(1000)", ("time",)),
    "waiting for input": ("import threading\nthreading.Event().wait()", ("time",)),
    "endless output": ("while True: print('x' * 1000)", ("output",)),
    "endless errors": (
        "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
        ("output",),
    ),
    "a memory bomb": ("x = 'x'\nwhile True: x += x", ("memory",)),
    "much memory at once": ("bytearray(1 << 40)", ("memory",)),
    "a huge file": ("open('big', 'wb').write(bytes(1 << 26))", ("disk",)),
    "a huge sparse file": ("f = open('big', 'wb')\nf.truncate(1 << 40)", ("disk",)),
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits_end_a_run_and_are_named(name):
    program, named = LIMITED[name]
    quick = "time" in named
    limits = Limits(1, 1.5 if quick else 60, memory=256 << 20, disk=1 << 20, output=10_000)

    def run(isolation):
        with Sandbox(isolation, limits) as box:
            result = box.run(program)
        with Sandbox(isolation) as box:
            return result, box.run("print(1)").output

    with ThreadPoolExecutor() as pool:
        for isolation, (result, after) in zip(HERE, pool.map(run, HERE), strict=True):
            assert result.limit in named, (isolation, result)
            assert result.exit != 0
            assert result.seconds < 30
            assert len(result.output) <= 10_000
            assert len(result.errors) <= 10_000
            assert after == "1\n"


def test_all_files_together_are_limited(best):
    program = """
    for i in range(1000):
        with open(str(i), "wb") as file:
            file.write(bytes(1 << 20))
    """
    assert best.run(textwrap.dedent(program)).limit == "disk"
    assert best.run("for i in range(10000): open(str(i), 'w').close()").limit == "disk"


def test_threads_can_be_had_but_not_without_end(box):
    program = """
    import threading
    done = []
    threads = [threading.Thread(target=done.append, args=(i,)) for i in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(sorted(done))
    stop = threading.Event()
    started = []
    try:
        for _ in range(100_000):
            started.append(threading.Thread(target=stop.wait, daemon=True))
            started[-1].start()
    except (RuntimeError, MemoryError):
        print("no more")
    finally:
        stop.set()
    """
    result = box.run(textwrap.dedent(program))
    assert result.output == f"{list(range(8))}\nno more\n", result


def test_crashes_are_told_by_their_signals(box):
    assert box.run("import ctypes; ctypes.string_at(0)").exit == 128 + signal.SIGSEGV
    deep = """
    import sys
    sys.setrecursionlimit(10**9)
    x = []
    for _ in range(3 * 10**5): x = [x]
    repr(x)
    """
    deep = textwrap.dedent(deep)
    assert box.run(deep).exit != 0
    assert box.run("import os; os.abort()").exit == 128 + signal.SIGABRT
    kills_itself = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert box.run(kills_itself).exit == 128 + signal.SIGTERM


def descendants(pid):
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        todo += (children := parents.get(todo.pop(), []))
        found += children
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left_behind(box):
    box.run("1")
    before = set(descendants(os.getpid()))  # servers, idle
    folders = set(os.listdir(tempfile.gettempdir()))
    program = """
    import os, pickle, signal, threading, time
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    open("left.pickle", "wb").write(pickle.dumps(print))
    threading.Thread(target=time.sleep, args=(1000,)).start()
    os._exit(0) if QUICK else time.sleep(1000)
    """
    quick = Sandbox(box.isolation, Limits(wall=0.5))
    with quick:
        for how in ("True", "False"):
            quick.run(textwrap.dedent(program).replace("QUICK", how))
    for _ in range(200):
        left = set(descendants(os.getpid())) - before
        if not left:
            break
        time.sleep(0.02)
    assert not left
    assert not {f for f in os.listdir(tempfile.gettempdir()) if "postgrad-" in f} - folders


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_end_of_the_trainer_ends_a_run():
    program = """
    import sys, threading
    from postgrad.rewards.sandbox import Limits, Sandbox
    box = Sandbox(sys.argv[1], Limits(wall=1000))
    threading.Thread(target=box.run, args=("import time; time.sleep(1000)",)).start()
    print("started", flush=True)
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), BEST], stdout=subprocess.PIPE
    )
    with trainer:
        assert trainer.stdout.read(7) == b"started"
        for _ in range(500):
            running = descendants(trainer.pid)
            if len(running) >= 3:
                break
            time.sleep(0.02)
        assert running
        trainer.kill()
    for _ in range(500):
        if not any(Path(f"/proc/{pid}").exists() for pid in running):
            return
        time.sleep(0.02)
    pytest.fail("processes live on")


def test_results_are_those_of_python(box):
    result = box.run(
        "import sys\nprint(input() + '!')\nprint('e', file=sys.stderr)\nsys.exit(3)", "hé\n"
    )
    assert (result.output, result.errors, result.exit, result.limit) == ("hé!\n", "e\n", 3, None)
    failed = box.run("def f():\n    return 1 / 0\n\nf()\n")
    expected = subprocess.run(
        [sys.executable, "-c", "1"], capture_output=True, check=True
    ).stderr.decode()
    assert expected == ""
    assert failed.errors.splitlines()[0] == "Traceback (most recent call last):"
    assert '  File "<code>", line 4, in <module>' in failed.errors.splitlines()
    assert "    return 1 / 0" in failed.errors
    assert failed.errors.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert failed.exit == 1
    assert "confined" not in failed.errors
    assert box.run("def f(:").errors.splitlines()[-1].startswith("SyntaxError")
    assert box.run("print(__name__, __file__)").exit == 1  # there is no file
    assert box.run("import sys; sys.exit('bad')").errors == "bad\n"
    assert box.run("import atexit; atexit.register(print, 'end'); print('a')").output == "a\nend\n"
    late = "import threading\nthreading.Timer(0.1, print, ('b',)).start()"
    assert box.run(late).output == "b\n"
    long = "x" * 300_000
    assert box.run("print(input())", long).output == long + "\n"
    assert box.run("pass", long).exit == 0  # nobody reads it
    assert box.run("print('a\\ud800')").exit == 1
    assert box.run("print(1)\0").exit == 1
    assert box.run("open('m.py', 'w').write('X = 5')\nimport m\nprint(m.X)").output == "5\n"


def test_the_standard_library_is_there(box):
    program = """
    import asyncio, hashlib, os, sqlite3, ssl, uuid, zoneinfo
    async def five():
        await asyncio.sleep(0.001)
        return 5
    print(asyncio.run(five()), zoneinfo.ZoneInfo("UTC"), len(os.urandom(4)))
    print(sqlite3.connect(":memory:").execute("select 6 * 7").fetchone())
    """
    assert box.run(textwrap.dedent(program)).output == "5 UTC 4\n(42,)\n"


def test_every_run_is_the_same_and_sees_nothing_of_another(box):
    program = """
    import os, random
    print(random.random(), list({"a", "b", "c", "d", "e"}), os.listdir("."))
    open("x", "w")
    """
    program = textwrap.dedent(program)
    first = box.run(program)
    assert first.exit == 0
    assert box.run(program) == first
    with Sandbox(box.isolation) as another:
        assert another.run(program) == first


def test_many_at_a_time():
    with Sandbox(limits=Limits(wall=60), parallel=4) as box:
        programs = [f"print({i})" for i in range(24)]
        assert [r.output for r in box.map(box.run, programs)] == [f"{i}\n" for i in range(24)]
        sleeper = "import time; print(time.time()); time.sleep(2); print(time.time())"
        times = [r.output.split() for r in box.map(box.run, [sleeper] * 2)]
        assert float(times[0][0]) < float(times[1][1])
        assert float(times[1][0]) < float(times[0][1])


def test_the_weak_form_has_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda name: None if name == "process" else "not here")
    with pytest.raises(
        PostgradError, match=r"no strong isolation.*install bubblewrap.*process"
    ) as e:
        Sandbox()
    assert "\n" not in str(e.value)
    with pytest.raises(
        PostgradError, match="isolation 'bubblewrap' is not available here: not here"
    ):
        load_rewards({"name": "code", "isolation": "bubblewrap"})
    with pytest.raises(PostgradError, match="no strong isolation"):
        load_rewards("code")
    assert Sandbox("process").isolation == "process"


def test_an_isolation_that_does_not_exist_is_named():
    with pytest.raises(PostgradError, match="did you mean 'bubblewrap'"):
        Sandbox("bubblewarp")


# Conversations


def test_variables_live_on_from_snippet_to_snippet(box):
    with Interpreter(box.isolation, Limits(wall=60)) as python:
        assert python.run("import math\nx = 5").output == ""
        assert python.run("def f(y):\n    return x + y\nf(1)").output == "6\n"
        assert python.run("'a'; 'b'").output == "'b'\n"
        failed = python.run("y = 7\n1 / 0\ny = 8")
        assert failed.exit == 1
        assert failed.errors.endswith(
            "line 2, in <module>\n    1 / 0\n    ~~^~~\nZeroDivisionError: division by zero\n"
        )
        assert python.run("print(x, y, math.floor(2.5))").output == "5 7 2\n"
        assert python.run("import sys; sys.exit(4)").exit == 4
        assert python.run("x").output == "5\n"
        assert "SyntaxError" in python.run("f(").errors
        assert python.run("").exit == 0
        assert python.run("open('a', 'w').write('z')\nopen('a').read()").output == "'z'\n"
        assert python.run("input()").errors.endswith("EOFError: EOF when reading a line\n")


def test_a_snippet_that_takes_too_long_is_interrupted_and_variables_live_on(best):
    with Interpreter(best.isolation, Limits(wall=1)) as python:
        python.run("x = 1")
        result = python.run("print('a')\nwhile True: x += 1")
        assert (result.limit, result.output) == ("time", "a\n")
        assert python.run("x > 1").output == "True\n"
        stubborn = """
        while True:
            try:
                while True: sum(range(10))
            except BaseException: pass
        """
        assert python.run(textwrap.dedent(stubborn)).limit == "time"
        assert not python.alive
        assert python.run("x") == sandbox.Result("", "", 1, "ended")


FORGED = """
import json, os, time
data = json.dumps(["exit"]).encode()
os.write(3, len(data).to_bytes(8, "big") + data)
time.sleep(50)
"""


def test_what_ends_an_interpreter(best):
    cases = {
        "import os; print('a', flush=True); os._exit(3)": (3, None),
        "import ctypes; ctypes.string_at(0)": (128 + signal.SIGSEGV, None),
        "while True: print('x' * 1000)": (128 + signal.SIGKILL, "output"),
        # forged answers
        FORGED: (137, "output"),
        "import os; os.write(3, bytes([255] * 8)); import time; time.sleep(50)": (137, "output"),
    }
    for snippet, (code, limit) in cases.items():
        with Interpreter(best.isolation, Limits(wall=30, output=10_000)) as python:
            result = python.run(snippet)
            assert (result.exit, result.limit) == (code, limit)
            assert python.run("1").limit == "ended"


def test_a_memory_error_does_not_end_an_interpreter(best):
    with Interpreter(best.isolation, Limits(wall=30, memory=256 << 20)) as python:
        assert python.run("x = bytearray(1 << 40)").limit == "memory"
        assert python.run("2").output == "2\n"


# Unit tests: the verdict

ADD = ["assert f(1) == 2", "assert f(5) == 6", "assert abs(f(0.5) - 1.5) < 1e-6"]


def test_tests_of_right_and_wrong_programs(box):
    assert box.test("def f(x): return x + 1", ADD) == [True] * 3
    assert box.test("def f(x): return 2", ADD) == [True, False, False]
    assert box.test("def g(x): return x + 1", ADD) == [False] * 3
    assert box.test("def f(x: return x + 1", ADD) == [False] * 3


CHEATS = {
    "exits with success": "import sys\nsys.exit(0)",
    "exits within": "import sys\ndef f(x): sys.exit(0)",
    "exits at once": "import os\ndef f(x): os._exit(0)",
    "exits at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): exit()",
    "prints success": "print('True\\nOK\\npassed')\ndef f(x): print('passed')",
    "equals everything": """
        class Any:
            def __eq__(self, other): return True
            __ne__ = lambda self, other: False
            __hash__ = None
        def f(x): return Any()
    """,
    "is a number that equals everything": """
        class Any(float):
            def __eq__(self, other): return True
            def __sub__(self, other): return 0.0
            def __rsub__(self, other): return 0.0
            def __abs__(self): return 0.0
            def __lt__(self, other): return True
        def f(x): return Any(0)
    """,
    "replaces built-in functions": """
        import builtins
        builtins.abs = lambda x: 0.0
        builtins.AssertionError = type("AssertionError", (SystemExit,), {})
        def abs(x): return 0.0
        def f(x): return None
    """,
    "names functions as tests do": "check = abs = lambda *_: 0\ndef f(x): return None",
    "looks for what is expected": """
        import gc, sys
        def f(x):
            frame = sys._getframe()
            while frame is not None:
                for value in (*frame.f_globals.values(), *frame.f_locals.values()):
                    if isinstance(value, str) and "assert f(" in value:
                        return float(value.split("==")[1])
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, dict) and "tests" in thing:
                    return thing
    """,
    "writes verdicts to every file": """
        import json, os
        for file in range(3, 64):
            for word in (True, [True] * 3, {"ready": True}, {"value": True}):
                data = json.dumps(word).encode()
                try:
                    os.write(file, len(data).to_bytes(8, "big") + data)
                except OSError:
                    break
        def f(x): return None
    """,
    "answers with a pickle": """
        import os, pickle
        class Evil:
            def __reduce__(self): return (os.abort, ())
        os.write(4, len(pickle.dumps(Evil())).to_bytes(8, "big") + pickle.dumps(Evil()))
        def f(x): return Evil()
    """,
    "answers without end": """
        import os
        while True: os.write(4, (1 << 25).to_bytes(8, "big") + bytes(1 << 25))
    """,
    "answers in great depth": """
        def f(x):
            found = []
            for _ in range(100_000): found = [found]
            return found
    """,
    "answers with what grows": "def f(x): return range(10 ** 15)",
    "raises what looks like success": "def f(x): raise StopIteration",
    "is a type": "f = bool",
    "is a module": "import math as f",
    "tests itself": "def f(x):\n    try: assert False\n    except AssertionError: return True",
}  # fmt: skip


def test_a_program_cannot_talk_its_way_to_a_pass(best):
    programs = [textwrap.dedent(code) for code in CHEATS.values()]
    with Sandbox(best.isolation, Limits(cpu=2, wall=20)) as box:
        passed = box.map(lambda program: box.test(program, ADD), programs)
    assert dict(zip(CHEATS, passed, strict=True)) == {name: [False] * 3 for name in CHEATS}


def test_the_end_of_a_program_is_no_error_that_a_test_expects(best):
    test = "try:\n    f(1)\nexcept BaseException:\n    pass\nelse:\n    assert False"
    assert best.test("def f(x): raise ValueError", [test]) == [True]
    assert best.test("import os\ndef f(x): os._exit(0)", [test, "assert True"]) == [False, False]


def test_helpers_of_the_tests_are_not_the_programs_to_change(best):
    tests, setup = ["assert abs(poly(f()) - 4) < 1e-6"], "import math\ndef poly(x): return x * x"
    cheat = "poly = lambda x: 4\nmath = None\ndef f(): return 0"
    assert best.test(cheat, tests) == [True]  # so the setup must be given
    assert best.test(cheat, tests, setup=setup) == [False]
    assert best.test("def f(): return -2", tests, setup=setup) == [True]


def test_a_hanging_test_leaves_those_before_it(best):
    with Sandbox(best.isolation, Limits(cpu=1, wall=2)) as box:
        program = "def f(x):\n    while x == 5: pass\n    return x + 1"
        assert box.test(program, ADD) == [True, False, False]


# a program, and a test of it that is right where both are one program
CROSSING = {
    "lists": r"""
        def f(x): return [x, (x, None), {x: {x}}]
        # test
        assert f('a') == ['a', ('a', None), {'a': {'a'}}]
    """,
    "types": r"""
        def f(x): return (x,)
        # test
        assert f(1) == (1,) and f(1) != [1] and type(f(1)) is tuple
    """,
    "booleans": r"""
        def f(): return True
        # test
        assert f() is True
    """,
    "odd numbers": r"""
        def f(x): return x
        # test
        import math
        assert f(math.inf) == math.inf and math.isnan(f(math.nan)) and f(1j) == 1j
    """,
    "long numbers": r"""
        import math
        def f(n): return math.factorial(n)
        # test
        import math
        assert f(5000) == math.factorial(5000)
    """,
    "odd text": r"""
        def f(x): return x[::-1]
        # test
        assert f('é\ud800\0') == '\0\ud800é'
    """,
    "bytes": r"""
        def f(x): return bytearray(x)
        # test
        assert f(b'\xff') == bytearray(b'\xff')
    """,
    "collections": r"""
        from collections import *
        def f(x): return Counter(x), deque(x, 3), defaultdict(int, a=1)
        # test
        from collections import deque
        assert f('aab') == ({'a': 2, 'b': 1}, deque('aab'), {'a': 1})
    """,
    "fractions": r"""
        from fractions import Fraction as F
        def f(x): return x + F(1, 3)
        # test
        from fractions import Fraction
        assert f(Fraction(2, 3)) == 1
    """,
    "dates": r"""
        import datetime
        def f(x): return x + datetime.timedelta(1)
        # test
        from datetime import date
        assert f(date(2024, 2, 28)) == date(2024, 2, 29)
    """,
    "changes in place": r"""
        def f(x): x.sort(); x.append({})
        # test
        x = [3, 1]
        assert f(x) is None and x == [1, 3, {}]
    """,
    "keywords": r"""
        def f(*a, b=1, **k): return a, b, k
        # test
        assert f(1, 2, b=3, c=4) == ((1, 2), 3, {'c': 4})
    """,
    "functions as arguments": r"""
        def f(g, x): return g(g(x), 1)
        # test
        assert f(lambda a, b=0: a + 2 + b, 1) == 6
    """,
    "functions as results": r"""
        def f(n): return lambda x: x + n
        # test
        assert f(2)(3) == 5 and callable(f(1))
    """,
    "types as arguments": r"""
        def f(t, x): return t(x)
        # test
        assert f(int, '5') == 5
    """,
    "errors in functions of the tests": r"""
        def f(g):
            try: g()
            except KeyError: return 'seen'
        # test
        def g(): raise KeyError(1)
        assert f(g) == 'seen'
    """,
    "iterators as arguments": r"""
        def f(x): return [next(x), next(x)]
        # test
        assert f(i * i for i in range(2, 9)) == [4, 9]
    """,
    "generators": r"""
        def f():
            n = 0
            while True:
                yield n
                n += 1
        # test
        import itertools
        assert list(itertools.islice(f(), 3)) == [0, 1, 2]
    """,
    "errors": r"""
        def f(x):
            raise ValueError('no', x)
        # test
        try:
            f(1)
            assert False
        except ValueError as e:
            assert e.args == ('no', 1)
    """,
    "own errors": r"""
        class Empty(LookupError): pass
        def f(): raise Empty('x')
        # test
        try:
            f()
            assert False
        except Empty as e:
            assert str(e) == 'x' and isinstance(e, LookupError)
    """,
    "objects": r"""
        class P:
            def __init__(s, x): s.x, s.all = x, []
            def add(s, y): s.all.append(y); return s
            def __len__(s): return len(s.all)
            def __getitem__(s, i): return s.all[i]
            def __repr__(s): return f'P({s.x})'
            def __eq__(s, o): return isinstance(o, P) and s.x == o.x
            def __add__(s, o): return P(s.x + o.x)
        # test
        p = P(1)
        assert p.add(5).add(6) == p and len(p) == 2 and p[1] == 6 and list(p) == [5, 6]
        p.x = 3
        assert repr(p + P(2)) == 'P(5)' and p == P(3) and p != 3
        assert isinstance(p, P) and not isinstance(1, P)
    """,
    "named tuples": r"""
        from collections import namedtuple
        Q = namedtuple('Q', 'a b')
        def f(): return Q(1, 2)
        # test
        assert f() == (1, 2) and f().b == 2 and sorted(f()) == [1, 2]
    """,
    "modules of the program": r"""
        import math
        def f(x): return math.sqrt(x)
        # test
        assert math.isclose(f(4), 2)
    """,
    "constants of the program": r"""
        LIMIT = 3
        def f(): return LIMIT
        # test
        assert f() == LIMIT == 3
    """,
    "no main": r"""
        def f(): return 1
        if __name__ == '__main__': input()
        # test
        assert f() == 1
    """,
    "recursion through a test's function": r"""
        def f(g, n): return g(f, n)
        # test
        assert f(lambda h, n: 0 if n == 0 else 1 + h(lambda h, n: n, n - 1), 3) == 3
    """,
}  # fmt: skip


def test_what_tests_can_pass_and_get(best):
    for name, code in CROSSING.items():
        program, test = textwrap.dedent(code).split("# test\n")
        unconfined: dict = {"__name__": "program"}
        exec(f"{program}\n\n{test}", unconfined)  # it is a right one
        assert best.test(program, [test]) == [True], name


def test_a_test_cannot_pass_objects_of_its_own_classes(best):
    test = "class Node: pass\nf(Node())"
    assert best.test("def f(x): pass", [test]) == [False]


# The reward


def rewards(completions, prompts=None, spec="code", **columns):
    if isinstance(spec, str):
        spec = {"name": spec}
    load = load_rewards({"time_limit": 20, **spec})
    return load(prompts or ["p"] * len(completions), completions, columns)[0]


def test_the_code_of_a_completion():
    assert extract("x = 1\n") == "x = 1\n"
    assert extract("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n  y\n```\nc") == "x = 2\n  y\n"
    assert extract("```\nx = 1\n```") == "x = 1\n"
    assert extract("```python\nx = 1\n```\n```bash\nls\n```\ndone") == "x = 1\n"
    assert extract("cut off:\n```python\nx = 1\ny =") == "x = 1\ny ="
    assert extract("```bash\nls\n```") == "```bash\nls\n```"


def test_assert_statements():
    tests = ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 0"]
    completions = [
        "```python\ndef f(x): return (x + 1) % 4\n```",
        "def f(x): return x + 1",
        "no code",
    ]
    assert rewards(completions, tests=[tests] * 3) == [1, 0, 0]
    partly = {"name": "code", "partial": True}
    assert rewards(completions, spec=partly, tests=[tests] * 3) == [1, 2 / 3, 0]
    shadowed = rewards(
        ["def sum(a, b): return a + b"] * 2,
        tests=[["assert sum(1, 2) == 3"]] * 2,
        entry_point=["sum", None],
    )
    assert shadowed == [1, 0]
    helped = rewards(["def f(x): return x"], tests=[["assert f(ONE) == 1"]], setup=["ONE = 1"])
    assert helped == [1]


def test_inputs_and_outputs():
    double = "print(2 * int(input()))  "
    columns = {"inputs": [["1\n", "5\n"]] * 3, "outputs": [["2\n", "10"]] * 3}
    completions = [double, "print(2)", f"{double}\nraise SystemExit(1)"]
    assert rewards(completions, **columns) == [1, 0, 0]
    partly = {"name": "code", "partial": True}
    assert rewards(completions, spec=partly, **columns) == [1, 0.5, 0]


# In HumanEval's form: the prompt ends in a function's head, the completion goes on from there.
PLAIN = {
    "prompt": 'def halve(xs):\n    """Every number of xs by two."""\n',
    "canonical_solution": "    return [x / 2 for x in xs]\n",
    "test": "def check(candidate):\n    assert candidate([1, 4]) == [0.5, 2]\n",
    "entry_point": "halve",
}
HELPER = {  # a function of the prompt's own comes first and is used by solution and test
    "prompt": "def shift(text):\n    return text[1:] + text[:1]\n\n\n"
    'def unshift(text):\n    """Undo shift."""\n',
    "canonical_solution": "    return text[-1:] + text[:-1]\n",
    "test": "def check(candidate):\n    for text in ('', 'a', 'abc'):\n"
    "        assert candidate(shift(text)) == text\n        assert candidate('b') == 'b'\n",
    "entry_point": "unshift",
}
RANDOM = {
    "prompt": 'def total(x, y):\n    """x and y together."""\n',
    "canonical_solution": "    return x + y\n",
    "test": "def check(candidate):\n    import random\n    for _ in range(50):\n"
    "        x, y = random.randint(1, 99), random.randint(1, 99)\n"
    "        assert candidate(x, y) == x + y, (x, y)\n",
    "entry_point": "total",
}
MODULE = {  # the prompt imports what the solution needs
    "prompt": "import math\n\n\n"
    'def trips(rows, capacity):\n    """How often a bucket goes down for each row."""\n',
    "canonical_solution": "    return sum(math.ceil(sum(row) / capacity) for row in rows)\n",
    "test": "def check(candidate):\n    assert candidate([[1, 1, 1], [0]], 2) == 2\n",
    "entry_point": "trips",
}


def rows_of_humaneval():
    """Ours, and, where POSTGRAD_HUMANEVAL names HumanEval.jsonl.gz, every one of its 164."""
    rows = [PLAIN, HELPER, RANDOM, MODULE]
    if path := os.environ.get("POSTGRAD_HUMANEVAL"):
        with gzip.open(path) as file:
            rows += [json.loads(line) for line in file]
    return rows


def test_problems_of_humanevals_form():
    rows = rows_of_humaneval()
    columns = {key: [row[key] for row in rows] for key in ("test", "entry_point")}
    prompts = [row["prompt"] for row in rows]
    right = [row["canonical_solution"] for row in rows]
    assert rewards(right, prompts, **columns) == [1] * len(rows)
    whole = [f"Here:\n```python\n{p}{s}\n```\n" for p, s in zip(prompts, right, strict=True)]
    chats = [[{"role": "user", "content": p}] for p in prompts]
    assert rewards(whole, prompts, **columns) == [1] * len(rows)
    assert rewards(whole, chats, **columns) == [1] * len(rows)
    assert rewards(["    return None\n"] * len(rows), prompts, **columns) == [0] * len(rows)
    # a completion that redefines the prompt's helper does not change the test's
    helper = "    return 'b'\n\ndef shift(text):\n    return 'b'\n"
    assert rewards([helper], [HELPER["prompt"]], **{k: [HELPER[k]] for k in columns}) == [0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "needs the columns test and entry_point, or tests, or inputs and outputs"),
        ({"test": ["x"]}, "needs the columns test and entry_point"),
        ({"tests": ["assert f(1)"]}, "column 'tests' must be a list of at least one text"),
        ({"tests": [[]]}, "column 'tests' must be a list of at least one text"),
        ({"tests": [[1]]}, "column 'tests' must be a list"),
        ({"inputs": [["1"]]}, "column 'outputs' must be a list of at least one text, got 'None'"),
        ({"inputs": [["1"]], "outputs": [["1", "2"]]}, "a row has 1 inputs but 2 outputs"),
        ({"test": [5], "entry_point": ["f"]}, r"column 'test' must be a text, got '5' \(int\)"),
    ],
)
def test_rows_without_usable_tests_are_named(columns, message):
    with pytest.raises(PostgradError, match=message) as caught:
        rewards(["x"], **columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_limit": 0}, "time_limit must be above 0, got 0"),
        ({"memory": 1.5}, "memory must be a positive whole number, got 1.5"),
        ({"parallel": True}, "parallel must be a positive whole number, got True"),
        ({"partial": "some"}, "partial must be true or false, got 'some'"),
        ({"isolation": "proces"}, "did you mean 'process'"),
        ({"timelimit": 5}, "did you mean 'time_limit'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(PostgradError, match=message):
        load_rewards({"name": "code", **settings})


def test_its_own_time_limits_are_the_only_ones():
    slow = ["import time\ndef f():\n    time.sleep(0.5)\n    return 1"]
    load = load_rewards("code", time_limit=0.1)
    assert load(["p"], slow, {"tests": [["assert f() == 1"]]})[0] == [1]
