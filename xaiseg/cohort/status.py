"""How far a run is, from its journals alone: what is done, running, failed and left, how fast, and when it may end."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xaiseg.cohort.folder import PLAN, SETTINGS
from xaiseg.cohort.journal import CaseRecord, journalled
from xaiseg.cohort.plan import duration
from xaiseg.cohort.running import RUNNING
from xaiseg.cohort.tables import case_row
from xaiseg.errors import InputError

# A process that has said nothing for so long, which it does every five seconds, is taken to be gone.
_SILENT = 120.0  # seconds
# The rate is that of the last so many seconds in which something was done.
_RECENT = 3600.0


def status(out: Path) -> dict[str, Any]:
    """Of the run in the folder `out`, as plain JSON values.

    cases: numbers by status. segmented: cases of which the lesions are known. units: a lesion explained by a method each; `total`
    only counts segmented cases. passes: rows and samples of these units, by which the time left is estimated. running: processes
    at work. failures: causes. rate: passes a second, of all processes together. seconds_left, end: None where nothing tells.

    Raises InputError where there is no run.
    """
    try:
        settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{out}: no {SETTINGS} is here; expected the output folder of a run: check the path"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{out / SETTINGS}: cannot be read ({error}); expected the settings of a run") from error
    methods = settings["identity"].get("methods")
    keys = None if methods is None else list(methods)
    samples = {
        key: 1 if method.get("samples") is None else method["samples"] for key, method in (methods or {}).items()
    }
    cases: dict[str, int] = {}
    failures: list[dict[str, Any]] = []
    stamps: list[tuple[float, float]] = []
    segmented = units = done = passes = passes_done = 0
    for record in _records(out):
        state = case_row(record, keys)["status"]
        segmented += record.segmented is not None
        cases[state] = cases.get(state, 0) + 1
        failures += [
            {"case": record.name, "unit": unit, "lesion": lesion, "message": failure["message"]}
            for (unit, lesion), failure in record.failures.items()
        ]
        stamps += [(t["at"], t["passes"]) for t in record.timings if t["passes"]]
        for key in keys or ():
            for label in record.lesions():
                assert record.segmented is not None
                own = record.segmented["costs"][key][str(label)][0] * samples[key]
                units, passes = units + 1, passes + own
                if (key, label) in record.explained:
                    done, passes_done = done + 1, passes_done + own
    running = list(_running(out))
    rate = _rate(stamps)
    left = (passes - passes_done) / rate if rate and running else None
    return {
        "out": str(out),
        "command": settings["identity"]["command"],
        "cases": {"total": sum(cases.values()), **cases},
        "segmented": segmented,
        "units": {"total": units, "done": done, "failed": sum(f["lesion"] is not None for f in failures)},
        "passes": {"total": passes, "done": passes_done},
        "running": running,
        "failures": failures,
        "rate": rate,
        "seconds_left": left,
        "end": None if left is None else time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() + left)),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """For the reader of the terminal."""
    cases, units, passes = found["cases"], found["units"], found["passes"]
    said = [", ".join(f"{n} {name}" for name, n in cases.items() if name != "total")]
    text = [f"{found['out']}: {found['command']}", f"  cases: {cases['total']}" + (f" ({said[0]})" if said[0] else "")]
    if found["segmented"] < cases["total"]:
        text.append(f"  segmented: {found['segmented']} of {cases['total']}")
    if units["total"]:
        share = passes["done"] / passes["total"] if passes["total"] else 1.0
        failed = f", {units['failed']} failed" if units["failed"] else ""
        text.append(f"  lesions × methods: {units['done']} of {units['total']} done{failed}; {share:.0%} of the passes")
    for process in found["running"]:
        note = ", stopping" if process["stopping"] else ""
        text.append(f"  running: {process['host']}, process {process['pid']}, heard {process['age']:.0f} s ago{note}")
    if not found["running"] and (cases.get("left") or units["done"] + units["failed"] < units["total"]):
        text.append("  nobody is at work; give the command again to go on")
    if found["rate"]:
        text.append(f"  rate: {found['rate']:.3g} passes a second")
    if found["seconds_left"]:
        unknown = " for what is segmented" if found["segmented"] < cases["total"] else ""
        text.append(f"  left: about {duration(found['seconds_left'])}{unknown}, until {found['end']}")
    for failure in found["failures"][:10]:
        lesion = f", {failure['unit']}, lesion {failure['lesion']}" if failure["lesion"] is not None else ""
        text.append(f"  failed: {failure['case']}{lesion}: {failure['message']}")
    if len(found["failures"]) > 10:
        text.append(f"  … and {len(found['failures']) - 10} more: logs/failures.tsv, or --json")
    return text


def _records(out: Path) -> Iterator[CaseRecord]:
    try:
        planned = json.loads((out / PLAN).read_text(encoding="utf-8"))["cases"]
    except (OSError, ValueError, KeyError):
        planned = []
    for name in sorted({*planned, *journalled(out)}):
        yield CaseRecord.read(out, name)


def _running(out: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((out / RUNNING).glob("*.json")):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            age, host, pid, stopping = time.time() - state["at"], state["host"], state["pid"], state["stopping"]
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if age < _SILENT and (host != socket.gethostname() or _alive(pid)):
            yield {"host": host, "pid": pid, "stopping": stopping, "age": round(max(age, 0.0), 1)}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _rate(stamps: list[tuple[float, float]]) -> float | None:
    """Passes a second over the last while in which some were done; the first one marks its beginning."""
    if len(stamps) < 2:
        return None
    stamps = sorted(stamps)
    recent = [(at, passes) for at, passes in stamps if at > stamps[-1][0] - _RECENT]
    span = recent[-1][0] - recent[0][0]
    return sum(passes for _, passes in recent[1:]) / span if span > 0 else None
