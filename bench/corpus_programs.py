"""Programs that are started to be captured: several runtimes, each with data of its own kind.

    python3    syntax trees, tokens, dictionaries and number lists made from the standard library
    node       JSON documents, maps, typed arrays, strings
    redis      hashes, JSON strings, sorted sets, lists of log lines, over a Unix socket
    compiler   cc1 in the middle of optimising a long generated C file

Each is a context manager that yields the process id once the data is there; a program that is not
installed is left out.  Bound: MEMORY_MIB or so each, START_LIMIT_S to get there, and all of them
end with the `with`.  Nothing of them is made up to compress well or badly: it is what such
programs hold, made from text that every Debian machine has.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

START_LIMIT_S = 60.0
POLL_S = 0.05

PYTHON = r"""
import ast, glob, json, random, sys, tokenize, io
folder, mib = sys.argv[1], int(sys.argv[2])
rng, keep = random.Random(7), []
def used_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024
for path in sorted(glob.glob(folder + "/*.py")):
    if used_mib() > mib:
        break
    text = open(path, encoding="utf-8", errors="replace").read()
    keep.append(ast.parse(text))
    keep.append(list(tokenize.generate_tokens(io.StringIO(text).readline)))
    words = text.split()
    keep.append({w: i for i, w in enumerate(words)})
    keep.append([{"id": i, "name": w, "score": rng.random(), "tags": words[i:i+3]}
                 for i, w in enumerate(words[::5])])
    keep.append([rng.gauss(0, 1) for _ in range(4000)])
    keep.append(json.dumps(keep[-2]).encode())
print("ready", flush=True)
sys.stdin.read()
"""

NODE = r"""
const fs = require("fs"), path = require("path");
const folder = process.argv[2], mib = Number(process.argv[3]), keep = [];
for (const name of fs.readdirSync(folder).filter(n => n.endsWith(".py")).sort()) {
  if (process.memoryUsage().rss > mib * 1048576) break;
  const text = fs.readFileSync(path.join(folder, name), "latin1");
  const words = text.split(/\s+/);
  keep.push(words.map((w, i) => (
    { id: i, name: w, at: Date.now() + i, tags: words.slice(i, i + 2) })));
  keep.push(new Map(words.map((w, i) => [w, i * 1.5])));
  keep.push(JSON.stringify(keep[keep.length - 2]));
  keep.push(Float64Array.from(words, (w, i) => Math.sin(i) * w.length));
  keep.push(text.split("\n").map(l => l.trim().toUpperCase()));
}
console.log("ready");
process.stdin.resume();
"""

Program = Callable[[int], AbstractContextManager[int]]


def standard_library() -> str:
    return sysconfig.get_paths()["stdlib"]


@contextmanager
def _speaking(argv: list[str]) -> Iterator[int]:
    """A program that says "ready" when its data is there, and ends with its standard input."""
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        try:
            if process.stdout.readline().strip() != b"ready":
                raise OSError(f"{argv[0]} ended before its data was there")
            yield process.pid
        finally:
            process.kill()


@contextmanager
def python3(mib: int) -> Iterator[int]:
    argv = [_command("python3"), "-c", PYTHON, standard_library(), str(mib)]
    with _speaking(argv) as pid:
        yield pid


@contextmanager
def node(mib: int) -> Iterator[int]:
    with tempfile.NamedTemporaryFile("w", suffix=".js") as script:
        script.write(NODE)
        script.flush()
        with _speaking([_command("node"), script.name, standard_library(), str(mib)]) as pid:
            yield pid


@contextmanager
def redis(mib: int) -> Iterator[int]:
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        path = os.path.join(folder, "redis.sock")
        # Debian's redis-tools has the server's program under another name; it goes by argv[0].
        program = shutil.which("redis-server") or _command("redis-check-rdb")
        argv = ["redis-server", "--port", "0", "--unixsocket", path, "--save", ""]
        argv += ["--appendonly", "no", "--dir", folder]
        with subprocess.Popen(
            argv, executable=program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                with _dial(path) as line:
                    _fill_redis(line, process.pid, mib)
                yield process.pid
            finally:
                process.kill()


@contextmanager
def compiler(mib: int) -> Iterator[int]:
    cc1 = subprocess.run(
        [_command("gcc"), "-print-prog-name=cc1"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        source = Path(folder) / "long.c"
        source.write_text(_long_c_file(random.Random(11), functions=mib * 60))
        argv = [cc1, "-quiet", "-O2", "-g", str(source), "-o", "/dev/null"]
        with subprocess.Popen(
            argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                _until_resident(process, mib)
                yield process.pid
            finally:
                process.kill()


PROGRAMS: dict[str, Program] = {
    "python3": python3,
    "node": node,
    "redis": redis,
    "compiler": compiler,
}


def _command(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is not installed")
    return path


def _resident_mib(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * 4096 >> 20


def _until_resident(process: subprocess.Popen[bytes], mib: int) -> None:
    """Until it uses that much; OSError if it ends before, or takes longer than the limit."""
    end_s = time.monotonic() + START_LIMIT_S
    while _resident_mib(process.pid) < mib:
        if process.poll() is not None or time.monotonic() > end_s:
            raise OSError("the compiler did not grow as expected")
        time.sleep(POLL_S)


def _dial(path: str) -> socket.socket:
    end_s = time.monotonic() + START_LIMIT_S
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(path)
            return line
        except OSError:
            line.close()
            if time.monotonic() > end_s:
                raise
            time.sleep(POLL_S)


def _resp(*words: object) -> bytes:
    """One command in redis's protocol."""
    parts = [str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)


def _fill_redis(line: socket.socket, pid: int, mib: int) -> None:
    rng = random.Random(5)
    library = sorted(Path(standard_library()).glob("*.py"))
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in library)
    lines = [text for whole in texts for text in whole.splitlines() if text.strip()]
    words = sorted({word for text in lines[:20000] for word in text.split() if word.isalnum()})
    number = 0
    while _resident_mib(pid) < mib:
        batch = []
        for _ in range(250):
            number += 1
            user = rng.choice(words)
            batch += [
                _resp("HSET", f"user:{number}", "name", user, "mail", f"{user}@example.org",
                      "seen", 1_700_000_000 + rng.randrange(10**7), "score", rng.random()),
                _resp("SET", f"document:{number}", json.dumps({
                    "id": number, "title": " ".join(rng.sample(words, 4)),
                    "body": " ".join(rng.choices(lines, k=3)), "active": rng.random() < 0.5})),
                _resp("ZADD", f"rank:{number % 97}", rng.random(), f"user:{number}"),
                _resp("RPUSH", f"log:{number % 53}", f"{number} {rng.choice(lines)}"),
            ]  # fmt: skip
        line.sendall(b"".join(batch))
        _count_replies(line, len(batch))


def _count_replies(line: socket.socket, wanted: int) -> None:
    """Every command above is answered with one line."""
    seen = 0
    while seen < wanted:
        data = line.recv(65536)
        if not data:
            raise OSError("redis ended")
        seen += data.count(b"\r\n")


def _long_c_file(rng: random.Random, functions: int) -> str:
    names = ["count", "offset", "length", "state", "flags", "index", "total", "left", "right"]
    parts = ["struct item { long key; int kind; struct item *next; double weight; };\n"]
    for number in range(functions):
        a, b, c = rng.sample(names, 3)
        parts.append(
            f"long work_{number}(struct item *at, long {a}, int {b})\n{{\n"
            f"    long {c} = {rng.randrange(1000)};\n"
            f"    for (int i = 0; i < {b}; i++) {{\n"
            f"        switch (({a} >> {rng.randrange(8)}) & 7) {{\n"
            + "".join(
                f"        case {k}: {c} += at->key * {rng.randrange(99)} "
                f"{rng.choice('+-^|')} i; break;\n"
                for k in range(rng.randrange(2, 7))
            )
            + f"        default: {c} ^= {a} * {rng.randrange(1, 1 << 20)};\n        }}\n"
            f"        if (at->next && at->weight > {rng.random():.4f})\n"
            f"            at = at->next;\n"
            f"        {a} = {a} * {rng.randrange(3, 99)} + {c};\n    }}\n"
            + (f"    {c} += work_{rng.randrange(number)}(at, {c}, {b} - 1);\n" if number else "")
            + f"    return {c};\n}}\n"
        )
    return "".join(parts)
