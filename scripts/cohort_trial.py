"""A cohort of phantoms, explained without a break and then with many: killed, in two parts, by Dask workers that are killed.

    python scripts/cohort_trial.py DIR                          200 scans, 20 kills, all ways
    python scripts/cohort_trial.py DIR --scans 24 --kills 4 --ways killed shards
    python scripts/cohort_trial.py DIR --ways overhead          what a unit costs besides its compute, and peak memory

Every way must end with the same tables and maps, byte for byte, with nothing done twice. Needs no PyTorch; `dask` needs
`pip install -e '.[dask]'`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("killed", "shards", "dask", "overhead", "workers")
_GIB = 2**20  # of the kibibytes in which `ru_maxrss` counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--scans", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which processes are killed")
    args = parser.parse_args()
    trial = Trial(args.folder, args.scans, args.kills, random.Random(args.seed))
    for way in args.ways:
        getattr(trial, way)()
    return 0


class Trial:
    def __init__(self, folder: Path, scans: int, kills: int, chance: random.Random) -> None:
        self.folder, self.scans, self.kills, self.chance = folder, scans, kills, chance
        folder.mkdir(parents=True, exist_ok=True)
        self.manifest = folder / "scans" / "manifest.tsv"
        if not self.manifest.is_file():
            make_scans(self.manifest.parent, scans)
        begun = time.monotonic()
        finish([self.start("whole")])
        self.seconds = time.monotonic() - begun
        self.whole = results(folder / "whole")
        self.units = units(folder / "whole")
        print(
            f"whole: {scans} scans, {len(self.units)} units, {len(self.whole)} files, {self.seconds:.0f} s", flush=True
        )

    def start(self, name: str, *options: str, cores: Sequence[int] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "xaiseg.cli", "explain", str(self.manifest), str(self.folder / name)]
        command += ["--model", "example", "--samples", "2", "--min-voxels", "3", "--no-pictures", *options]
        limit = [] if cores is None else ["taskset", "-c", ",".join(map(str, cores))]
        log = (self.folder / f"{name}.log").open("a")
        return subprocess.Popen([*limit, *command], cwd=ROOT, stdout=log, stderr=log, text=True)

    def killed(self) -> None:
        """SIGKILL at random moments, some of them before anything is computed, and the same command again each time."""
        self.broken("killed", lambda: [self.start("killed")])

    def shards(self) -> None:
        """Two processes at once, each with half of the cases, both killed."""
        self.broken("shards", lambda: [self.start("shards", "--shard", f"{part}/2") for part in (1, 2)])

    def broken(self, name: str, start: Callable[[], list[subprocess.Popen[str]]]) -> None:
        lines = []
        for _ in range(self.kills):
            processes, before = start(), done(self.folder / name)
            if self.chance.random() < 0.75:  # the others die while they begin
                wait_for(lambda before=before: done(self.folder / name) > before, processes)
            time.sleep(self.chance.uniform(0, 1.5 * self.seconds / self.kills))
            for process in processes:
                process.kill()
                process.wait()
            lines.append(done(self.folder / name))
        finish(start())
        self.compare(name)
        print(f"{name}: {self.kills} kills, after {lines} journal lines: equal", flush=True)

    def dask(self) -> None:
        """Two workers, of which one after the other is killed. They have a core each, and XLA adds up in an order that depends on
        the number of its threads, so they are compared with a process on one core."""
        import psutil

        finish([self.start("whole-1", cores=sorted(os.sched_getaffinity(0))[:1])])
        self.compare("whole-1", exactly=False)  # the same units and files

        process, kills = self.start("dask", "--executor", "dask", "--workers", "2"), 0
        while process.poll() is None and kills < self.kills:
            before = done(self.folder / "dask")
            wait_for(lambda before=before: done(self.folder / "dask") > before + 2, [process])
            time.sleep(self.chance.uniform(0, 1))
            if process.poll() is not None:
                break
            workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
            if workers:
                os.kill(self.chance.choice(workers).pid, signal.SIGKILL)
                kills += 1
        finish([process])
        self.compare("dask", results(self.folder / "whole-1"))
        print(f"dask: 2 workers, {kills} kills: equal", flush=True)

    def overhead(self) -> None:
        """Seconds of the whole run beside those in which something was computed, and peak memory by the number of scans."""
        import resource

        records = [entry for case in journals(self.folder / "whole") for entry in case]
        stages = {kind: [e for e in records if e["entry"] == kind] for kind in ("segmented", "explained")}
        for kind, entries in stages.items():
            computed, span = (
                sum(e["seconds"] for e in entries),
                max(e["at"] for e in entries) - min(e["at"] for e in entries),
            )
            first = min(entries, key=lambda e: e["at"])["seconds"]
            print(f"{kind}: {computed - first:.1f} s computed in {span:.1f} s: {span / (computed - first) - 1:+.1%}")
        for part in (10, 1):
            name = f"memory-{part}"
            finish([self.start(name, "--shard", f"1/{part}")])
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / _GIB
            print(f"{-(-self.scans // part)} scans: peak memory of this or an earlier run {peak:.2f} GiB", flush=True)

    def workers(self) -> None:
        """Two Dask workers with a core each beside one with one core."""
        cores = sorted(os.sched_getaffinity(0))[:2]
        spans = {}
        for count in (1, 2):
            name = f"workers-{count}"
            finish([self.start(name, "--executor", "dask", "--workers", str(count), cores=cores[:count])])
            explained = [e for case in journals(self.folder / name) for e in case if e["entry"] == "explained"]
            begun = min(e["at"] - e["seconds"] for e in explained)
            spans[count] = max(e["at"] for e in explained) - begun
            self.compare(name, exactly=False)
        print(
            f"workers: {spans[1]:.1f} s with one, {spans[2]:.1f} s with two: {spans[1] / spans[2]:.2f} times",
            flush=True,
        )

    def compare(self, name: str, expected: dict[str, bytes] | None = None, exactly: bool = True) -> None:
        found, expected = results(self.folder / name), expected or self.whole
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        if exactly:
            different = [file for file, content in found.items() if content != expected[file]]
            assert not different, different
        assert units(self.folder / name) == self.units  # each once


def make_scans(folder: Path, count: int) -> None:
    sys.path.insert(0, str(ROOT))
    from xaiseg.demo import write_phantoms

    write_phantoms(folder, count, shape=(40, 48, 40), spacing=3.6, lesions=4)


def results(out: Path) -> dict[str, bytes]:
    """Every file but the logs."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and "logs" not in p.parts}
    assert not [name for name in found if name.endswith(".tmp")]
    return found


def journals(out: Path) -> list[list[dict]]:
    return [
        [json.loads(line) for line in p.read_text().splitlines()] for p in sorted((out / "logs/cases").glob("*.jsonl"))
    ]


def units(out: Path) -> Counter[tuple]:
    """How often each unit was done."""
    found: Counter[tuple] = Counter()
    for entries in journals(out):
        for entry in entries:
            assert entry["entry"] != "failed", entry
            if entry["entry"] == "segmented":
                found[entry["case"], "segmentation"] += 1
            for lesion in entry.get("lesions", ()) if entry["entry"] == "explained" else ():
                found[entry["case"], entry["method"], lesion["lesion"]] += 1
    assert set(found.values()) == {1}, found.most_common(3)
    return found


def done(out: Path) -> int:
    return sum(p.read_bytes().count(b"\n") for p in (out / "logs/cases").glob("*.jsonl"))


def wait_for(holds: Callable[[], bool], processes: Sequence[subprocess.Popen[str]]) -> None:
    while not holds() and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def finish(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.wait():
            raise SystemExit(f"{process.args}: exit status {process.returncode}; see the .log files")


if __name__ == "__main__":
    sys.exit(main())
