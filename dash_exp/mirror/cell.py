"""One cell and its run. What the run holds is asked of the server, so nothing is sent twice, whoever sent it;
after anything went wrong it is asked again.

Values that a resumed run computed anew are sent again, with their later time: for a step, the value with the
latest time counts. A run built from the record alone has only these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from dash_exp.config.tracking import Place
from dash_exp.mirror.facts import CELL, LONGEST_TAG, PREFIX, RECORD, Facts, digest_of, read_facts, shortened
from dash_exp.mirror.mlflow import Held, Run, Store
from dash_exp.mirror.points import Point, Reader, final_points
from dash_exp.mirror.sweeps import Sweep, standing, sweeps_below, sweeps_of

SWEEP, CLAIM = f"{PREFIX}.sweep", f"{PREFIX}.claim"
DIGEST, DIFFERENT = f"{PREFIX}.mirrored", f"{PREFIX}.params_differ"
PARENT = "mlflow.parentRunId"


class BusyError(Exception):
    """Another process mirrors this cell to the same place."""


@contextmanager
def alone(folder: Path, place: Place) -> Iterator[None]:
    """Be the only one that mirrors this cell to this place. Raises BusyError; a record that cannot be written
    to has no lock, and what is sent twice at the same time is still kept once by a database."""
    lock = FileLock(folder / f".mirror-{place.mark}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"{folder.name} is being mirrored by another process") from None
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


class CellMirror:
    """The run of one cell."""

    def __init__(self, folder: Path, store: Store, sweeps: Sequence[Sweep] | None = None):
        self.folder, self.store = folder, store
        known = sweeps_below(folder.parent.parent) if sweeps is None else sweeps
        self.sweeps = sweeps_of(folder, known)
        self._reader = Reader(folder)
        self._waiting: list[Point] = []
        self._run: Run | None = None
        self._held: Held | None = None
        """What the run holds; None: not asked yet."""

    @property
    def attached(self) -> bool:
        return self._run is not None

    @property
    def status(self) -> str:
        """Of the run, as it is now."""
        return self._run.status if self._run else ""

    def beat(self) -> None:
        """Send what is new since the last time. Raises StoreError; then the next call tries again."""
        self._waiting += self._reader.new()
        facts = self._facts(None)
        if not facts.record:  # nothing is known yet that a run could be found by
            return
        try:
            new = self._run is None
            run = self._attached(facts)
            self._send(run, self._waiting)
            self._waiting = []
            self._tell(run, facts)
            if new:
                self.tell_sweeps()
        except BaseException:
            self._run = self._held = None
            raise

    def whole(self, gone: int | None = None) -> int | None:
        """Make the run all that the record says: how many values were sent, None where nothing had to be
        done. `gone`: an attempt that is known to have ended, whatever its status says. Raises StoreError."""
        facts, points = self._facts(gone), final_points(self.folder)
        digest = digest_of(facts, points)
        try:
            run = self._run or self._found(facts)
            if run is None and not facts.begun:
                return None
            if run and run.tags.get(DIGEST) == digest and run.status == facts.status:
                self._run = run
                return None
            run = self._attached(facts)
            sent = self._send(run, points)
            self._tell(run, facts, digest)
        except BaseException:
            self._run = self._held = None
            raise
        self._waiting = []
        return sent

    def _facts(self, gone: int | None) -> Facts:
        return read_facts(self.folder, [one.name for one in self.sweeps], gone)

    def _found(self, facts: Facts) -> Run | None:
        """The run of this record, or of this cell before its record had begun."""
        runs = self.store.find(CELL, facts.name)
        return next((run for run in runs if run.tags.get(RECORD, "") in ("", facts.record)), None)

    def _attached(self, facts: Facts) -> Run:
        if self._run is None:
            with self.store.creating():
                run = self._found(facts)
                self._run = run or self.store.create(facts.name, facts.start_ms, facts.tags)
        if self._held is None:
            self._held = self.store.held(self._run)
        return self._run

    def _parent_tag(self) -> dict[str, str]:
        if not self.sweeps:
            return {}
        first = self.sweeps[0]
        return {PARENT: sweep_run(self.store, first.name, first.created_ms).id}

    def _send(self, run: Run, points: Sequence[Point]) -> int:
        """Those values that the run does not hold; how many that were."""
        held = self._held if self._held is not None else {}
        lacking = []
        for point in points:
            there = held.get((point.step, point.time_ms), frozenset())
            values = {name: value for name, value in point.values.items() if name not in there}
            if values:
                lacking.append(replace(point, values=values))
        self.store.log_points(run, lacking)
        for point in lacking:
            key = (point.step, point.time_ms)
            held[key] = held.get(key, frozenset()) | point.values.keys()
        return sum(len(point.values) for point in lacking)

    def _tell(self, run: Run, facts: Facts, digest: str | None = None) -> None:
        """Parameters, tags and status, where they are not what the run has. A parameter is never changed: the
        server would refuse that; what differs is named in a tag."""
        params = {name: text for name, text in facts.params.items() if name not in run.params}
        differ = [name for name, text in facts.params.items() if run.params.get(name, text) != text]
        wanted = dict(facts.tags) | ({DIFFERENT: shortened(", ".join(differ), LONGEST_TAG)} if differ else {})
        if PARENT not in run.tags:
            wanted |= self._parent_tag()
        tags = {name: text for name, text in wanted.items() if run.tags.get(name) != text}
        self.store.log_words(run, params, tags)
        ours = [name for name in run.tags if name.startswith(f"{PREFIX}.") and name != DIGEST]
        self.store.drop_tags(run, [name for name in ours if name not in wanted])  # of an attempt that failed
        self.store.set_status(run, facts.status, facts.end_ms)
        if digest is not None:
            self.store.log_words(run, {}, {DIGEST: digest})

    def tell_sweeps(self) -> None:
        """Give the runs of its sweeps the status they have now. Raises StoreError."""
        for sweep in self.sweeps:
            tell_sweep(self.store, sweep)


def sweep_run(store: Store, name: str, created_ms: int) -> Run:
    """The run that a sweep's cells are nested under; created where it is not there."""
    with store.creating():
        found = store.find(SWEEP, name)
        return found[0] if found else store.create(name, created_ms, {SWEEP: name})


def tell_sweep(store: Store, sweep: Sweep) -> None:
    """Give a sweep's run the status that its cells have together. Cells that end at the same time look and
    tell one after the other, so the last word is the newest."""
    with store.creating():
        run = sweep_run(store, sweep.name, sweep.created_ms)
        if sweep.claim and run.tags.get(CLAIM) != (claim := shortened(sweep.claim, LONGEST_TAG)):
            store.log_words(run, {}, {CLAIM: claim})
        store.set_status(run, *standing(sweep))
