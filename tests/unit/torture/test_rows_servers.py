# SPDX-License-Identifier: Apache-2.0
"""What the clients of the servers say, read as requests and failures."""

from __future__ import annotations

import pytest

from torture.errors import TortureError
from torture.loads import read_redis_benchmark, read_wrk

_WRK = """Running 3s test @ http://127.0.0.1:1/
  1 threads and 8 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   115.91us  112.57us   4.99ms   98.15%
    Req/Sec    66.90k     4.35k   71.31k    80.65%
  206311 requests in 3.10s, 822.05MB read
"""
_REDIS = """"test","rps","avg_latency_ms","min_latency_ms"
"SET","180000.00","0.2","0.1"
"MSET (10 keys)","60000.00","0.9","0.3"
"""


def test_wrk_without_failures() -> None:
    loaded = read_wrk(_WRK)
    assert (loaded.n_requests, loaded.n_failed, loaded.words) == (206311, 0, "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  Socket errors: connect 0, read 3, write 0, timeout 2", 5),
        ("  Non-2xx or 3xx responses: 7", 7),
    ],
)
def test_failures_of_wrk(line: str, expected: int) -> None:
    loaded = read_wrk(f"{_WRK}{line}\n")
    assert loaded.n_failed == expected
    assert loaded.words == line.strip()


def test_other_words_of_wrk() -> None:
    with pytest.raises(TortureError, match="unable to connect"):
        read_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_redis_without_failures() -> None:
    loaded = read_redis_benchmark(_REDIS * 2)
    assert (loaded.n_requests, loaded.n_failed) == (160_000, 0)


def test_failures_of_redis() -> None:
    said = f"{_REDIS}Error: Server closed the connection\nError: status 1\n"
    loaded = read_redis_benchmark(said)
    assert (loaded.n_requests, loaded.n_failed) == (80_000, 2)
    assert "closed the connection" in loaded.words
