"""Whole cohorts broken off and shared out, in processes of their own: `scripts/cohort_trial.py` in small; and a full disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import snapshot, table

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", ["killed", "shards", "dask"])
def test_a_cohort_ends_the_same_whatever_happens_to_it(way: str, tmp_path: Path) -> None:
    if way == "dask":
        pytest.importorskip("distributed", reason="dask is an optional extra")
    command = [sys.executable, "scripts/cohort_trial.py", str(tmp_path / "trial")]
    done = subprocess.run(
        [*command, "--scans", "8", "--kills", "3", "--ways", way], cwd=ROOT, capture_output=True, text=True, check=False
    )
    logs = {log.name: log.read_text()[-2000:] for log in (tmp_path / "trial").glob("*.log")}
    assert done.returncode == 0, (done.stderr, logs)
    assert f"{way}:" in done.stdout
    assert "equal" in done.stdout


def test_slurm_jobs(explain, cohort: Path, native_model: Path, tmp_path: Path) -> None:
    """SLURM played by two shell scripts: `sbatch` starts what it is given, `scancel` ends it."""
    pytest.importorskip("dask_jobqueue", reason="dask is an optional extra")
    commands = {
        "sbatch": f"""for script; do :; done; cp "$script" {tmp_path}/job.sh
setsid bash {tmp_path}/job.sh > {tmp_path}/job.log 2>&1 < /dev/null & echo "Submitted batch job $!" """,
        "scancel": 'for job; do kill -- "-$job"; done',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    command = [sys.executable, "-m", "xaiseg.cli", "explain", str(cohort), str(tmp_path / "out")]
    command += ["--model", str(native_model), "--samples", "2", "--chunk", "4", "--no-pictures", "--executor", "slurm"]
    command += ["--job-option", "memory=1GB", "--job-option", "job_extra_directives=--gres=gpu:1"]
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --gres=gpu:1" in (tmp_path / "job.sh").read_text()
    whole = explain("whole", "--no-pictures", source=cohort)
    for file in whole.rglob("*_saliency.nii.gz"):
        assert (tmp_path / "out" / file.relative_to(whole)).is_file()
    workers = {row["worker"] for row in table(tmp_path / "out" / "logs" / "timings.tsv")}
    assert len(workers) == 1
    assert workers.isdisjoint({row["worker"] for row in table(whole / "logs" / "timings.tsv")})


def test_a_disk_that_fills_up(explain, cohort: Path, tmp_path: Path, native_model: Path) -> None:
    """On a disk of its own: one line, no half-written file, and with more room the same command ends as it would have."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here, so no small disk")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        command = [sys.executable, "-m", "xaiseg.cli", "explain", str(cohort), str(disk / "out")]
        command += ["--model", str(native_model), "--samples", "2", "--chunk", "4", "--no-pictures"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)

        sizes = []
        stopped = run()
        while stopped.returncode:
            (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("xaiseg: error: ")]
            assert "No space left on device" in line
            assert "Traceback" not in stopped.stderr
            assert not [name for name in snapshot(disk) if name.endswith(".tmp")]
            sizes.append(200 + 80 * (len(sizes) + 1))
            assert len(sizes) < 20
            subprocess.run(["mount", "-o", f"remount,size={sizes[-1]}k", str(disk)], check=True)
            stopped = run()
        assert len(sizes) >= 2
        results = {n: c for n, c in snapshot(disk / "out").items() if not n.startswith("logs")}
        whole = snapshot(explain("whole", "--no-pictures", source=cohort))
        # the pictures of other tests are no pictures
        assert {n for n in whole if not n.startswith("logs")} == set(results)
        for name, content in results.items():
            if name.endswith((".nii.gz", ".tsv")):
                assert content == whole[name], name
    finally:
        subprocess.run(["umount", str(disk)], check=True)
