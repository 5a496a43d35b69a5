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
