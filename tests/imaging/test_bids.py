"""Cases found in a BIDS folder, and the choice between folder and manifest."""

from pathlib import Path

import pytest

from xaiseg.errors import InputError
from xaiseg.imaging.bids import read_bids
from xaiseg.imaging.case import Case
from xaiseg.imaging.discovery import read_input, select_cases

CHANNELS = ["FLAIR", "T1w"]


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def test_subjects_and_sessions(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "dataset_description.json",
        "sub-02/anat/sub-02_T1w.nii",
        "sub-02/anat/sub-02_acq-3D_FLAIR.nii.gz",
        "sub-02/anat/sub-02_FLAIR.json",
        "sub-02/anat/sub-02_T2w.nii.gz",
        "sub-02/anat/._sub-02_T1w.nii",
        "sub-02/func/sub-02_FLAIR.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_FLAIR.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-c/anat/sub-01_ses-c_T2w.nii.gz",
        "sub-03/dwi/sub-03_dwi.nii.gz",
        "derivatives/manual/dataset_description.json",
        "derivatives/manual/sub-01/ses-a/anat/sub-01_ses-a_space-MNI_label-L_mask.nii.gz",
        "derivatives/manual/sub-01/ses-a/anat/sub-01_ses-a_label-brain_mask.nii.gz",
        "derivatives/manual/sub-01/ses-a/anat/sub-01_ses-a_label-L_probseg.nii.gz",
        "derivatives/numbered/sub-02/anat/sub-02_desc-instances_dseg.nii",
        "derivatives/manual/sub-03/anat/sub-03_label-L_mask.nii.gz",
    )
    cases = read_bids(tmp_path, CHANNELS)
    assert [case.name for case in cases] == ["sub-01_ses-a", "sub-01_ses-b", "sub-02"]
    assert [(case.subject, case.session) for case in cases] == [("01", "a"), ("01", "b"), ("02", None)]
    assert list(cases[2].images.items()) == [
        ("FLAIR", tmp_path / "sub-02/anat/sub-02_acq-3D_FLAIR.nii.gz"),
        ("T1w", tmp_path / "sub-02/anat/sub-02_T1w.nii"),
    ]
    mask = tmp_path / "derivatives/manual/sub-01/ses-a/anat/sub-01_ses-a_space-MNI_label-L_mask.nii.gz"
    assert [case.reference for case in cases] == [mask, None, None]
    numbered = tmp_path / "derivatives/numbered/sub-02/anat/sub-02_desc-instances_dseg.nii"
    assert [case.instances for case in cases] == [None, None, numbered]
    assert read_input(tmp_path, CHANNELS) == cases


COMPLETE = ("sub-01/anat/sub-01_FLAIR.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((COMPLETE[0],), r"sub-01/anat: no image of channel T1w, though of FLAIR"),
        (
            (*COMPLETE, "sub-01/anat/sub-01_run-2_FLAIR.nii.gz"),
            r"2 files for FLAIR of sub-01 \(sub-01_FLAIR.nii.gz, sub-01_run-2_FLAIR.nii.gz\).*manifest",
        ),
        ((*COMPLETE, "sub-01/anat/sub-01_T1w.nii"), "2 files for T1w"),
        (("sub-01/anat/sub-02_FLAIR.nii.gz",), r"sub-02_FLAIR.nii.gz: another case's name; expected sub-01_"),
        (
            (
                *COMPLETE,
                "derivatives/a/sub-01/anat/sub-01_label-L_mask.nii",
                "derivatives/b/sub-01/anat/sub-01_label-L_mask.nii",
            ),
            r"2 files for the reference mask of sub-01 \(a/sub-01/anat/sub-01_label-L_mask.nii, b/",
        ),
        (
            (
                *COMPLETE,
                "derivatives/a/sub-01/anat/sub-01_desc-instances_dseg.nii",
                "derivatives/a/sub-01/anat/sub-01_desc-instances_dseg.nii.gz",
            ),
            "2 files for the numbered lesions",
        ),
        (("sub-01/anat/sub-01_PD.nii.gz",), r"no case found; .*sub-\*_FLAIR.nii\[.gz\], .*sub-\*_T1w.nii\[.gz\]"),
        ((), "no case found"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_bids(touch(tmp_path, *files), CHANNELS)
    assert str(tmp_path) in str(caught.value)


def test_channel_names_are_exact(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/anat/sub-01_FLAIR.nii.gz", "sub-01/anat/sub-01_ceFLAIR.nii.gz")
    (case,) = read_bids(tmp_path, ["FLAIR"])
    assert case.images["FLAIR"].name == "sub-01_FLAIR.nii.gz"


def test_input_is_a_folder_or_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "cases.tsv").write_text("case\tFLAIR\na\tf.nii\n")
    assert [case.name for case in read_input(tmp_path / "cases.tsv", ["FLAIR"])] == ["a"]
    with pytest.raises(InputError, match="no such folder or file"):
        read_input(tmp_path / "absent", ["FLAIR"])


def test_selection() -> None:
    cases = [Case(f"c{i}", {}) for i in range(12)]
    assert [case.name for case in select_cases(cases, ["c3", "c1", "c3"])] == ["c3", "c1"]
    with pytest.raises(InputError, match=r"case 'x', 'y': not in the input; expected among c0, .*, c9, …$"):
        select_cases(cases, ["x", "c1", "y"])


@pytest.mark.data
def test_real_folders(shared: Path) -> None:
    open_ms = read_input(shared / "data" / "open_ms", CHANNELS)  # 23 more patients have only masks
    assert [case.name for case in open_ms] == ["sub-19", "sub-26"]
    mslesseg = read_input(shared / "data" / "mslesseg", CHANNELS)
    assert [case.name for case in mslesseg] == ["sub-14_ses-1", "sub-14_ses-3", "sub-18_ses-1"]
    for case in open_ms + mslesseg:
        assert case.reference is not None
        for path in (*case.images.values(), case.reference):
            assert path.name.startswith(f"{case.name}_")
            assert path.is_file()
