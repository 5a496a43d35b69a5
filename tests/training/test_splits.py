"""Splits: by patient, balanced in number and in load, and the same however the cases are listed."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from training.splits import holdout, k_folds, read_splits, write_splits
from xaiseg.errors import InputError

COLUMNS = "case\tpatient\tload\tfold\n"


def cohort(count: int, seed: int = 0) -> tuple[dict[str, str], dict[str, float]]:
    """Patients of one to three scans, whose loads are spread over three orders of magnitude."""
    rng = np.random.default_rng(seed)
    patients, loads = {}, {}
    for patient in range(count):
        load = float(10 ** rng.uniform(1, 4))
        for session in range(int(rng.integers(1, 4))):
            case = f"sub-{patient:03}_ses-{session}"
            patients[case], loads[case] = f"sub-{patient:03}", load * float(rng.uniform(0.95, 1.05))
    return patients, loads


def mean_load(patient: str, patients: dict[str, str], loads: dict[str, float]) -> float:
    return float(np.mean([loads[case] for case, owner in patients.items() if owner == patient]))


@pytest.mark.parametrize(("count", "folds"), [(20, 5), (23, 5), (7, 7), (9, 2)])
def test_every_case_once_every_patient_in_one_fold_sizes_within_one(count: int, folds: int) -> None:
    patients, loads = cohort(count)
    split = k_folds(patients, loads, folds, seed=3)
    assert sorted(itertools.chain(*split)) == sorted(patients)
    owners = [{patients[case] for case in fold} for fold in split]
    assert sum(map(len, owners)) == len(set(patients.values())) == count
    assert max(map(len, owners)) - min(map(len, owners)) <= 1
    assert len(split) == folds


def test_each_fold_has_one_patient_of_each_stratum() -> None:
    patients, loads = cohort(40)
    ranked = sorted(set(patients.values()), key=lambda p: mean_load(p, patients, loads))
    for fold in k_folds(patients, loads, folds=4, seed=0):
        ranks = sorted(ranked.index(patient) for patient in {patients[case] for case in fold})
        assert [rank // 4 for rank in ranks] == list(range(10))


def test_loads_are_spread_more_evenly_than_by_chance() -> None:
    patients, loads = cohort(30)

    def spread(folds: list[set[str]]) -> float:
        return float(np.std([np.mean([mean_load(p, patients, loads) for p in fold]) for fold in folds]))

    rng = np.random.default_rng(0)
    names = sorted(set(patients.values()))
    blind = [spread([set(part) for part in np.array_split(rng.permutation(names), 5)]) for _ in range(20)]
    ours = [spread([{patients[c] for c in fold} for fold in k_folds(patients, loads, 5, seed)]) for seed in range(20)]
    assert np.mean(ours) < 0.5 * np.mean(blind)


def test_the_order_of_cases_plays_no_part_the_seed_does() -> None:
    patients, loads = cohort(23)
    shuffled = dict(reversed(patients.items()))
    assert k_folds(shuffled, dict(reversed(loads.items())), 5, seed=1) == k_folds(patients, loads, 5, seed=1)
    assert k_folds(patients, loads, 5, seed=2) != k_folds(patients, loads, 5, seed=1)
    assert holdout(shuffled, loads, 0.2, seed=1) == holdout(patients, loads, 0.2, seed=1)
    assert holdout(patients, loads, 0.2, seed=2) != holdout(patients, loads, 0.2, seed=1)


def test_every_patient_of_a_stratum_may_come_into_every_fold() -> None:
    patients, loads = cohort(7)
    seen = {
        (case, fold)
        for seed in range(100)
        for fold, cases in enumerate(k_folds(patients, loads, 3, seed))
        for case in cases
    }
    assert len(seen) == 3 * len(patients)


@pytest.mark.parametrize(("count", "fraction", "held"), [(20, 0.2, 4), (10, 0.01, 1), (4, 0.99, 3)])
def test_holdout(count: int, fraction: float, held: int) -> None:
    patients, loads = cohort(count)
    training, out = holdout(patients, loads, fraction, seed=0)
    assert sorted(training + out) == sorted(patients)
    inside, outside = ({patients[case] for case in side} for side in (training, out))
    assert not inside & outside
    assert len(outside) == held
    ranked = sorted(set(patients.values()), key=lambda p: -mean_load(p, patients, loads))
    strata = np.array_split(np.array(ranked), held)
    assert [len(outside & set(stratum.tolist())) for stratum in strata] == [1] * held


def test_written_and_read(tmp_path: Path) -> None:
    patients, loads = cohort(9)
    split = k_folds(patients, loads, 3, seed=0)
    write_splits(tmp_path / "splits.tsv", split, patients, loads)
    lines = (tmp_path / "splits.tsv").read_text().splitlines()
    assert lines[0] == COLUMNS.strip()
    first = split[0][0]
    assert lines[1].split("\t") == [first, patients[first], repr(loads[first]), "0"]
    assert read_splits(tmp_path / "splits.tsv") == split
    assert [path.name for path in tmp_path.iterdir()] == ["splits.tsv"]


def test_too_few_patients_are_refused() -> None:
    patients, loads = cohort(4)
    with pytest.raises(InputError, match=r"folds: 5 of 4 patients; expected .*: ask for fewer folds"):
        k_folds(patients, loads, 5, seed=0)
    with pytest.raises(InputError, match=r"folds: 1; expected 2 or more"):
        k_folds(patients, loads, 1, seed=0)
    with pytest.raises(InputError, match=r"cases: of 1 patients; expected two or more"):
        holdout({"a": "p", "b": "p"}, {"a": 1, "b": 2}, 0.5, seed=0)
    with pytest.raises(InputError, match=r"fraction: 1.0; expected a number between 0 and 1"):
        holdout(patients, loads, 1.0, seed=0)


def test_loads_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"case b: no lesion load"):
        k_folds({"a": "a", "b": "b"}, {"a": 1}, 2, seed=0)
    with pytest.raises(InputError, match=r"case b: lesion load nan; expected a number"):
        k_folds({"a": "a", "b": "b"}, {"a": 1, "b": float("nan")}, 2, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tp\t1\t0\nb\tq\t1\t1\n\nc\tp\t1\t1\n", r"line 5: patient 'p' is in fold 1 here and in fold 0 on line 2"),
        ("a\tp\t1\t0\na\tp\t1\t0\n", r"line 3: case 'a' is already on line 2"),
        ("a\tp\t1\t0\nb\tq\t1\t2\n", r"no case in fold 1, but in fold 2"),
        ("a\tp\t1\tone\n", r"line 2: fold 'one'; expected a whole number"),
        ("a\tp\tmany\t0\n", r"line 2: lesion load 'many'"),
        ("a\tp\t1\n", r"line 2: 3 cells; expected 4"),
        ("a\t\t1\t0\n", r"line 2: an empty cell"),
        ("", r"lists no case"),
    ],
)
def test_a_table_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "splits.tsv").write_text(COLUMNS + text)
    with pytest.raises(InputError, match=message) as caught:
        read_splits(tmp_path / "splits.tsv")
    assert str(caught.value).startswith(f"{tmp_path / 'splits.tsv'}")
    assert "\n" not in str(caught.value)


def test_other_files_and_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.tsv: cannot be read \(No such file"):
        read_splits(tmp_path / "none.tsv")
    (tmp_path / "other.tsv").write_text("name\tage\n")
    with pytest.raises(InputError, match=r"other.tsv: columns name, age; expected case, patient, load, fold"):
        read_splits(tmp_path / "other.tsv")
    with pytest.raises(InputError, match=r"'a\\tb' cannot stand in a table"):
        write_splits(tmp_path / "splits.tsv", [["a\tb"]], {"a\tb": "p"}, {"a\tb": 1})
    with pytest.raises(InputError, match=r"cannot be written"):
        write_splits(tmp_path / "no folder" / "splits.tsv", [["a"]], {"a": "p"}, {"a": 1})
