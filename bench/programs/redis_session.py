# SPDX-License-Identifier: Apache-2.0
"""Redis answering the same commands each time, and its own tests.

The commands touch every type of value in its small and its large form, scripts, transactions
and serialisation. Each batch is answered before the next is sent, so that the server does
nearly the same whenever it runs; what is left is its hash tables' secret, and its clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.commands import require_command, run_command
from bench.errors import BenchError
from bench.sources import REDIS, fetch_source

__all__ = ["answer_commands", "failed_tests"]

_ROUNDS = 25
_SERVER = (
    *("--port", "0", "--save", "", "--appendonly", "no", "--daemonize", "no"),
    # Work that depends on how long the rest takes.
    *("--hz", "1", "--dynamic-hz", "no", "--activerehashing", "no"),
)
_START_S = 60.0
_ANSWER_S = 120.0
_SUITES = (
    "unit/type/string",
    "unit/type/hash",
    "unit/type/set",
    "unit/type/stream",
    "unit/sort",
    "unit/scripting",
    "unit/multi",
    "unit/acl",
)
"""Half a minute of its tests: no replication, no fuzzing, no persistence."""

_TREE = ("tests", "runtest", "redis.conf", "sentinel.conf")
_PROGRAMS = ("redis-server", "redis-cli", "redis-benchmark")
_SCRIPT = (
    "local n = 0; for i = 1, 50 do n = n + tonumber(redis.call('incr', KEYS[1])) end; "
    'local t = cjson.decode(\'{"a": [1, 2, {"b": null}]}\'); table.sort(t.a, function(x, y) '
    "return tostring(x) < tostring(y) end); return {n, #t.a, string.rep('x', 9):upper(), "
    "string.gsub('hello world', 'o', '0'), cmsgpack.unpack(cmsgpack.pack(n))}"
)


def answer_commands(executable: Path, in_front: Sequence[str]) -> str:
    """Start a server, have it answer all commands, end it; returns a digest of its answers.

    Args:
        executable: The server.
        in_front: Words in front of its command.

    Raises:
        BenchError: if it does not start, answer or end.
    """
    with tempfile.TemporaryDirectory(prefix="redis-") as name:
        address = Path(name) / "socket"
        process = subprocess.Popen(
            [*in_front, str(executable), *_SERVER, "--unixsocket", str(address)],
            cwd=name,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with _connect(process, address) as stream:
                answers = hashlib.sha256()
                for batch in _batches():
                    answers.update(_ask(stream, batch))
                stream.sendall(_encode("shutdown", "nosave"))
                status = process.wait(timeout=_ANSWER_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchError(f"{executable} does not answer: {error}") from error
        finally:
            process.kill()
            process.wait()
    if status != 0:
        raise BenchError(f"{executable} ended with status {status}")
    return answers.hexdigest()[:16]


def failed_tests(executable: Path) -> tuple[int, int]:
    """Run suites of its own tests; returns how many failed, and how many there are."""
    require_command("tclsh", package="tcl")
    root = fetch_source(REDIS)
    with tempfile.TemporaryDirectory(prefix="redis-tests-") as name:
        tree = Path(name)
        for part in _TREE:
            copy = shutil.copytree if (root / part).is_dir() else shutil.copy2
            copy(root / part, tree / part)
        (tree / "src").mkdir()
        for program in _PROGRAMS:
            shutil.copy2(executable.with_name(program), tree / "src" / program)
        suites = [word for suite in _SUITES for word in ("--single", suite)]
        # The exit status tells only whether all passed.
        command = ["sh", "-c", '"$@" || true', "sh", "./runtest", "--clients", "2", *suites]
        said = re.sub(r"\x1b\[[0-9;]*m", "", run_command(command, cwd=tree, timeout_s=600))
    failed = len(re.findall(r"^\[(?:err|exception)\]: ", said, re.M))
    passed = len(re.findall(r"^\[ok\]: ", said, re.M))
    if "The End" not in said or not passed:
        raise BenchError("the tests of Redis did not end:\n" + said[-800:])
    return failed, failed + passed


def _connect(process: subprocess.Popen[bytes], address: Path) -> socket.socket:
    """Connect to the server once it listens."""
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(_ANSWER_S)
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            stream.connect(str(address))
            return stream
        time.sleep(0.05)
    stream.close()
    raise BenchError(f"the server did not start within {_START_S:.0f} s")


def _ask(stream: socket.socket, batch: Sequence[bytes]) -> bytes:
    """Send commands and one that ends them; return all that is answered before that."""
    end = b"$3\r\nend\r\n"
    stream.sendall(b"".join(batch) + _encode("echo", "end"))
    answer = b""
    while not answer.endswith(end):
        piece = stream.recv(1 << 20)
        if not piece:
            raise BenchError("the server closed the connection")
        answer += piece
    return answer[: -len(end)]


def _encode(*words: str) -> bytes:
    """Encode a command as clients send it."""
    parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
    return f"*{len(words)}\r\n{''.join(parts)}".encode()


def _batches() -> Iterator[list[bytes]]:
    """Yield the commands of each round; no answer depends on the order of a hash table."""
    for number in range(_ROUNDS):
        yield [_encode(*command.split()) for command in _commands(number)]
        yield [_encode("eval", _SCRIPT, "1", f"n{number % 3}")]


def _commands(number: int) -> Iterator[str]:
    """Yield the commands of one round whose words have no blanks."""
    for i in range(40):
        key = f"{number % 5}:{i}"
        yield f"set s:{key} value-{number}-{i}"
        yield f"get s:{key}"
        yield f"append s:{key} more"
        yield f"setrange s:{key} 3 xyz"
        yield f"getrange s:{key} 1 7"
        yield f"incrbyfloat f:{key} 1.25"
        yield f"setbit b:{key} {i * 37} 1"
        yield f"rpush l:{number % 5} {i} {number} {'x' * (i * 5)}"
        yield f"hset h:{number % 5} field{i}.{number} {i} name{i} {'y' * (i * 4)}"
        yield f"sadd i:{number % 5} {i * number}"
        yield f"sadd t:{number % 5} member{i * number}"
        yield f"zadd z:{number % 5} {i * 1.5} one{i} {number} two{i * number}"
        yield f"pfadd p:{number % 5} {i * number}"
        yield f"xadd x:{number % 5} {number + 1}-{i + 1} field {i} other {number}"
        yield f"geoadd g:{number % 5} {i}.5 {number}.25 place{i}"
    one = number % 5
    yield f"bitcount b:{one}:3"
    yield f"bitfield b:{one}:3 incrby u5 10 1 get i8 0"
    yield f"lrange l:{one} 0 40"
    yield f"linsert l:{one} before 3 new"
    yield f"lpos l:{one} 7"
    yield f"lrem l:{one} 1 5"
    yield f"sort i:{one} desc limit 0 10"
    yield f"sort t:{one} alpha"
    yield f"sinterstore d i:{one} i:{(one + 1) % 5}"
    yield f"scard t:{one}"
    yield f"hlen h:{one}"
    yield f"hincrby h:{one} count 3"
    yield f"zrange z:{one} 0 20 withscores"
    yield f"zrangebyscore z:{one} 3 (30 limit 0 9"
    yield f"zrevrangebylex z:{one} + - limit 0 3"
    yield f"zunionstore u 2 z:{one} z:{(one + 1) % 5} weights 2 3 aggregate max"
    yield f"pfcount p:{one}"
    yield f"xrange x:{one} - + count 5"
    yield f"xlen x:{one}"
    yield f"geosearch g:{one} fromlonlat 15 10 byradius 900 km asc count 5"
    yield f"object encoding h:{one}"
    yield f"type z:{one}"
    yield f"copy l:{one} copied replace"
    yield f"dump l:{one}"
    yield f"lcs s:{one}:1 s:{one}:2"
    yield f"expire s:{one}:1 1000"
    yield f"persist s:{one}:1"
    yield "multi"
    yield f"incr count:{one}"
    yield f"getset count:{one} 7"
    yield "exec"
    yield "nonsense"
    yield f"lpush s:{one}:2 wrong"
    yield "publish channel message"
    yield "dbsize"
    yield "config get maxmemory"
    yield f"del d u i:{one}" if number % 7 == 0 else "ping"
    yield "flushall" if number == _ROUNDS - 1 else "ping"
