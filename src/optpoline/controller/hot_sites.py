# SPDX-License-Identifier: Apache-2.0
"""Hot first: find the sites that run, so that only they are given learning blocks.

Threads are sampled with a software clock event each (``process/perf.py``), or where that
is not permitted in brief stops that read registers and the top of the stacks; what the
samples say of sites is told by ``site_map``.

A site that had its learning window and was not promoted *rests*: it keeps its thunk for a
good reason, and is looked at again at intervals that double.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from optpoline.controller.records import SiteRecord
from optpoline.controller.site_map import N_STACK_WORDS, Evidence, SiteMap, Weights
from optpoline.controller.stop_sampler import STOP_EVERY_S, StopSampler
from optpoline.controller.summary import SiteState
from optpoline.controller.target import LoadedModule, Target
from optpoline.discover import ModuleImage
from optpoline.discover.functions import Span
from optpoline.errors import OptpolineError, ProcessGone
from optpoline.model import Addr
from optpoline.process.perf import PcSample, PcSampler

__all__ = ["ALL_AT_ONCE_SITES", "FIRST_LOOK_S", "WAVE_S", "HotSites", "Lookout"]

ALL_AT_ONCE_SITES = 2048
"""Sites up to which all are learned at once; of more only those that run.

A generated program of 22,000 sites, of which 300 run (2 virtual CPUs, Linux 6.18); Zipf's
law says how often each runs:

===============================  ===========  =========
learned are                      all          hot first
===============================  ===========  =========
controller's time to link        3.5 s        0.1 s
stops to link and promote        65, 178 ms   10, 12 ms
promoted after a window          300          201
promoted 10 s later              300          299
memory of the controller         135 MB       93 MB
===============================  ===========  =========

Linking takes 0.16 ms a site: a third of a second for this many, about as long as sampling
takes to be sure of the hot ones, and no site is missed. Finding the sites takes 0.36 s of
CPU time, so that the first are promoted a second after the attach. In the program, the
500 sites linked in all had 264 KiB of code and counters resident, half a KiB each, and a
site that never ran had none; 4 KiB of address space are reserved for every site.
"""

FIRST_LOOK_S = 0.1
"""Length of the look before the first wave of sites is linked."""

WAVE_S = 0.1
"""Time between waves of a window: a stop each, some 0.3 ms for 100 sites."""

LEARN_HZ = 3989
"""Samples per second of CPU time while sites are learned: 1 % of it, at 2 to 3 us each."""

FIRST_REST_S = 2.0
LAST_REST_S = 600.0
"""Rest of a site whose window did not get it promoted: doubles from the first to the last."""

MAX_UNNAMED_SITES = 256
"""Jump sites of one thunk that are learned together where samples in it name none."""

MIN_UNNAMED_SHARE = 0.03
"""Share of the samples that must be in thunks without naming a site before sites are tried
for no better reason than the thunk that they take."""

NEARBY_WEIGHT = 0.01
"""What a sample nearby counts beside one that met the site branching: it settles the order only."""

_RETURN_SIZE = 5
_CALL_OPCODE = b"\xe8"
"""call rel32, the form of every direct call; a longer one ends in the same bytes."""


class _Sampler(Protocol):
    """What samples where threads are."""

    def sample(self, seconds: float) -> tuple[PcSample, ...]:
        """Watch for a while."""


class Lookout:
    """The hot sites met in one learning window; made by ``HotSites.watch``."""

    def __init__(self, sites: HotSites, sampler: _Sampler, now_s: float) -> None:
        """Nothing was met yet."""
        self._sites = sites
        self._sampler = sampler
        self._weights: Weights = defaultdict(float)
        self._next_wave_s = now_s + FIRST_LOOK_S

    def look(self, seconds: float) -> None:
        """Watch for a while.

        Raises:
            ProcessGone: if the target has exited.
        """
        evidence = self._sites.weigh(self._sampler.sample(seconds))
        for addr, weight in evidence.branching.items():
            self._weights[addr] += weight
        for addr, weight in evidence.nearby.items():
            self._weights[addr] += NEARBY_WEIGHT * weight

    def take_wave(self, now_s: float) -> list[SiteRecord]:
        """Return the sites met since the last wave, hottest first; none before it is time."""
        if now_s < self._next_wave_s:
            return []
        self._next_wave_s = now_s + WAVE_S
        wave = self._sites.eligible(self._weights, now_s)
        self._weights.clear()
        return wave


class HotSites:
    """Finds the sites of one target that run.

    Args:
        target: The target.
    """

    def __init__(self, target: Target) -> None:
        """Begin with no site; nothing is opened but for the length of a look."""
        self._target = target
        self._records: Sequence[SiteRecord] = ()
        self._map: SiteMap | None = None
        self._with_sites: list[LoadedModule] = []
        self._rests: dict[Addr, tuple[float, float]] = {}
        """How long a site rests, and until when."""
        self._n_tried: dict[Addr, int] = defaultdict(int)
        """By thunk: how many of its jump sites had their turn without being named."""
        self.reason_blind: str | None = None
        """Why there is no clock, so that threads are stopped to look at them; or None."""

    def use(self, records: Sequence[SiteRecord]) -> None:
        """Look for these sites from now on: all that there are."""
        self._records = records
        self._map = None
        present = {record.site.addr for record in records} if self._rests else set[Addr]()
        self._rests = {addr: rest for addr, rest in self._rests.items() if addr in present}

    @contextmanager
    def watch(self) -> Iterator[Lookout]:
        """Watch for hot sites for the length of the block, as far as ``look`` is called."""
        with self._sampler(LEARN_HZ) as sampler:
            yield Lookout(self, sampler, time.monotonic())

    def look(self, seconds: float, frequency_hz: int) -> Evidence:
        """Watch for a while and say which sites were met.

        Raises:
            ProcessGone: if the target has exited.
        """
        with self._sampler(frequency_hz) as sampler:
            return self.weigh(sampler.sample(seconds))

    def samples_per_cpu(self, seconds: float, frequency_hz: int) -> float:
        """Return how many samples a look has of a thread that runs all the time."""
        rate_hz = frequency_hz if self.reason_blind is None else 1 / STOP_EVERY_S
        return seconds * rate_hz

    def weigh(self, samples: Iterable[PcSample]) -> Evidence:
        """Say which sites some samples tell of."""
        return self._site_map().weigh(samples)

    def eligible(self, weights: Weights, now_s: float) -> list[SiteRecord]:
        """Return the sites that may be learned now, those of the greatest weight first."""
        found: list[SiteRecord] = []
        for addr, _ in sorted(weights.items(), key=lambda item: -item[1]):
            record = self._site_map().record_at(addr)
            if record is None or record.state is not SiteState.BASELINE:
                continue
            if not self.rests(addr, now_s):
                found.append(record)
        return found

    def rests(self, addr: Addr, now_s: float) -> bool:
        """Tell whether a site was learned in vain not long ago."""
        return now_s < self._rests.get(addr, (0.0, 0.0))[1]

    def take_unnamed(self, evidence: Evidence) -> list[SiteRecord]:
        """Return jump sites of thunks in which much time is spent for sites unknown.

        Each time it is the turn of others; when all had theirs it is nobody's.
        """
        found: list[SiteRecord] = []
        for thunk_addr, weight in evidence.unnamed.items():
            if weight < MIN_UNNAMED_SHARE * evidence.n_samples:
                continue
            n_tried = self._n_tried[thunk_addr]
            jumps = self._site_map().jumps_through(thunk_addr)[n_tried:]
            self._n_tried[thunk_addr] += min(len(jumps), MAX_UNNAMED_SITES)
            found += jumps[:MAX_UNNAMED_SITES]
        return found

    def learned(self, records: Iterable[SiteRecord], now_s: float) -> None:
        """Note how a window over some sites ended: who was not promoted rests."""
        for record in records:
            addr = record.site.addr
            if record.state is SiteState.PROMOTED:
                self._rests.pop(addr, None)
                continue
            last_s, _ = self._rests.get(addr, (FIRST_REST_S / 2, 0.0))
            rest_s = min(LAST_REST_S, 2 * last_s)
            self._rests[addr] = (rest_s, now_s + rest_s)

    def _site_map(self) -> SiteMap:
        """Return the map of the sites, made when it is first needed."""
        if self._map is None:
            self._with_sites = [one for one in self._target.modules.values() if one.scan.sites]
            self._map = SiteMap(
                self._records,
                thunks=[span for one in self._with_sites for span in one.image.thunks.bodies],
                function_at=self._function_at,
                callee_before=self._callee_before,
            )
        return self._map

    def _function_at(self, addr: Addr) -> Span | None:
        """Return the function that an address is in, or None."""
        image = self._image_at(addr)
        return image.functions.find(addr) if image is not None else None

    def _callee_before(self, addr: Addr) -> Addr | None:
        """Return where the direct call goes that ends at an address, or None."""
        start = addr - _RETURN_SIZE
        image = self._image_at(start)
        text = image.text_at(start) if image is not None and image.is_code(start) else None
        code = text.code_at(start, _RETURN_SIZE) if text is not None else b""
        if code[:1] != _CALL_OPCODE or len(code) < _RETURN_SIZE:
            return None
        return Addr(addr + int.from_bytes(code[1:], "little", signed=True))

    def _image_at(self, addr: int) -> ModuleImage | None:
        """Return the module that an address is in, if it has sites; others are not looked into."""
        for loaded in self._with_sites:
            if loaded.module.start <= addr < loaded.module.end:
                return loaded.image
        return None

    @contextmanager
    def _sampler(self, frequency_hz: int) -> Iterator[_Sampler]:
        """Open clocks, or go by stops where there are none to be had."""
        if self.reason_blind is None:
            sampler = PcSampler(
                self._target.pid, frequency_hz=frequency_hz, n_stack_words=N_STACK_WORDS
            )
            with sampler:
                try:
                    sampler.open()
                except ProcessGone:
                    raise
                except OptpolineError as error:
                    self.reason_blind = str(error)
                else:
                    yield sampler
                    return
        yield StopSampler(self._target, n_stack_words=N_STACK_WORDS)
