from pathlib import Path

import pytest

from training.cases import read_cases
from xaiseg.errors import InputError

CHANNELS = ("FLAIR", "T1w")


def names(cases: list) -> list[str]:
    return [case.name for case in cases]


def test_split_by_name(bids) -> None:
    folder, add = bids
    for name in ("sub-01", "sub-02", "sub-03"):
        add(name)
    cases = read_cases([folder], ["sub-03", "sub-01"], CHANNELS)
    assert (names(cases.training), names(cases.validation)) == (["sub-02"], ["sub-03", "sub-01"])


def test_cases_of_one_name_in_two_inputs_are_told_apart(bids, tmp_path: Path) -> None:
    folder, add = bids
    for name in ("sub-01", "sub-02"):
        add(name)
    line = "\t".join(["sub-01", *(str(folder / f"sub-01/anat/sub-01_{c}.nii.gz") for c in CHANNELS)])
    line += f"\t{folder}/derivatives/manual/sub-01/anat/sub-01_label-L_mask.nii.gz"
    (tmp_path / "more.tsv").write_text(f"case\tFLAIR\tT1w\treference\n{line}\n")
    cases = read_cases([folder, tmp_path / "more.tsv"], ["more_sub-01"], CHANNELS)
    # The same subject label in another input is another person.
    assert (names(cases.training), names(cases.validation)) == (["dataset_sub-01", "sub-02"], ["more_sub-01"])
    with pytest.raises(InputError, match="is there twice"):
        read_cases([folder, folder], [], CHANNELS)


def test_sessions_of_one_patient_stay_together_whatever_their_names(bids, tmp_path: Path) -> None:
    """Two inputs with the same names; and names with more than BIDS' subject and session."""
    folder, add = bids
    for name in ("sub-01_ses-1", "sub-01_ses-2", "sub-02"):
        add(name)

    def table(name: str, cases: dict[str, str], patients: dict[str, str] | None = None) -> Path:
        lines = ["\t".join(["case", *CHANNELS, "reference", *(["patient"] if patients else [])])]
        for case, source in cases.items():
            subject, _, session = source.partition("_")
            place = Path(subject, session, "anat")
            cells = [case, *(str(folder / place / f"{source}_{c}.nii.gz") for c in CHANNELS)]
            cells.append(str(folder / "derivatives/manual" / place / f"{source}_label-L_mask.nii.gz"))
            lines.append("\t".join([*cells, *([patients[case]] if patients else [])]))
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    same = {name: name for name in ("sub-01_ses-1", "sub-01_ses-2")}
    two = [table("A.tsv", same), table("B.tsv", same)]
    with pytest.raises(InputError, match="the same patient's A_sub-01_ses-2 would be trained on"):
        read_cases(two, ["A_sub-01_ses-1"], CHANNELS)
    cases = read_cases(two, [], CHANNELS, folds=2)
    assert sorted(map(sorted, cases.folds)) == [[f"{x}_sub-01_ses-{n}" for n in (1, 2)] for x in "AB"]

    runs = table(
        "runs.tsv", {"sub-01_ses-1_run-1": "sub-01_ses-1", "sub-01_ses-1_run-2": "sub-01_ses-2", "sub-02": "sub-02"}
    )
    with pytest.raises(InputError, match="the same patient's sub-01_ses-1_run-2 would be trained on"):
        read_cases([runs], ["sub-01_ses-1_run-1"], CHANNELS)
    own = {"a": "sub-01_ses-1", "b": "sub-01_ses-2", "c": "sub-02"}
    named = table("named.tsv", own, {"a": "p", "b": "q", "c": "p"})
    with pytest.raises(InputError, match="the same patient's c would be trained on"):
        read_cases([named], ["a"], CHANNELS)
    assert names(read_cases([named], ["b"], CHANNELS).validation) == ["b"]


def test_no_reference(bids) -> None:
    folder, add = bids
    add("sub-01")
    add("sub-02", reference=False)
    with pytest.raises(InputError, match="case 'sub-02' has no reference"):
        read_cases([folder], [], CHANNELS)


def test_reference_on_another_grid(bids) -> None:
    folder, add = bids
    add("sub-01", origin=1.0)
    with pytest.raises(InputError, match=r"sub-01_label-L_mask\.nii\.gz: not on the grid of"):
        read_cases([folder], [], CHANNELS)


def test_unknown_validation_case(bids) -> None:
    folder, add = bids
    add("sub-01")
    with pytest.raises(InputError, match="--validation sub-09: no such case; expected some of sub-01"):
        read_cases([folder], ["sub-09"], CHANNELS)


def test_nothing_left_to_train_on(bids) -> None:
    folder, add = bids
    add("sub-01")
    with pytest.raises(InputError, match="expected some left to train on"):
        read_cases([folder], ["sub-01"], CHANNELS)


def test_a_patient_is_on_one_side(bids) -> None:
    folder, add = bids
    for name in ("sub-01_ses-1", "sub-01_ses-2", "sub-02"):
        add(name)
    with pytest.raises(
        InputError, match="--validation sub-01_ses-2: the same patient's sub-01_ses-1 would be trained on"
    ):
        read_cases([folder], ["sub-01_ses-2"], CHANNELS)
    cases = read_cases([folder], ["sub-01_ses-1", "sub-01_ses-2"], CHANNELS)
    assert names(cases.training) == ["sub-02"]
