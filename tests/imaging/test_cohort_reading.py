"""Inputs of which a part is broken: every usable case is read, every other one is rejected with its cause."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xaiseg.errors import InputError
from xaiseg.imaging import nifti
from xaiseg.imaging.case import Case, load_scan, preflight
from xaiseg.imaging.discovery import Cohort, Rejected, read_cohort, read_input, select_participants

CHANNELS = ["FLAIR", "T1w"]


def table(tmp_path: Path, *rows: str) -> Path:
    """A manifest; spaces stand for tabs."""
    path = tmp_path / "cases.tsv"
    path.write_text("\n".join(row.replace(" ", "\t") for row in rows), encoding="utf-8")
    return path


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def complete(*names: str) -> list[str]:
    """The two images of subjects (`sub-01`) and sessions (`sub-01_ses-1`)."""
    return [f"{name.replace('_', '/')}/anat/{name}_{channel}.nii.gz" for name in names for channel in CHANNELS]


def names(cohort: Cohort) -> tuple[list[str], list[str]]:
    return [case.name for case in cohort.cases], [rejected.name for rejected in cohort.rejected]


def test_every_flaw_of_a_table_rejects_its_line_and_no_other(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "case FLAIR T1w reference",
        "good-1 f t n/a",
        "ragged f t",
        "hole  t n/a",
        " f t n/a",
        "../up f t n/a",
        '"a"b f t n/a',
        "good-2 f t m",
        "",
        'broken "f\ng" t n/a',
        "good-3 f t n/a",
    )
    cohort = read_cohort(path, CHANNELS)
    assert names(cohort) == (
        ["good-1", "good-2", "good-3"],
        ["ragged", "hole", "line 5", "line 6", "line 7", "broken"],
    )
    parts = [
        "line 3: 3 cells under 4 columns",
        "line 4: empty cell in column 'FLAIR'",
        "line 5: empty cell in column 'case'",
        "line 6: case name '../up' cannot name files",
        "line 7: no table ('tab' expected after '\"')",
        "line 11: a line break or other control character in column 'FLAIR', 'f\\ng'",
    ]
    for rejected, part in zip(cohort.rejected, parts, strict=True):
        assert rejected.message.startswith(f"{path}, {part}"), rejected.message
        assert "\n" not in rejected.message
        assert "; expected " in rejected.message


def test_a_quote_that_is_not_closed_costs_its_own_line_only(tmp_path: Path) -> None:
    path = table(tmp_path, "case FLAIR T1w", 'a "f t', "b f t", 'c "f t', "d f t")
    cohort = read_cohort(path, CHANNELS)
    assert names(cohort) == (["b", "d"], ["line 2", "line 4"])
    assert "line 4: no table (unexpected end of data)" in cohort.rejected[1].message


def test_all_lines_of_one_name_are_rejected(tmp_path: Path) -> None:
    path = table(
        tmp_path, "case FLAIR T1w", "a f t", "b f t", "A f t", "c f", "a f t", "c f t", "sub-1_ses-2 f t", "sub-1 f t"
    )
    cohort = read_cohort(path, CHANNELS)
    assert [case.name for case in cohort.cases] == ["b", "sub-1_ses-2", "sub-1"]
    assert [(r.name, r.message.removeprefix(f"{path}, ").split(";")[0]) for r in cohort.rejected] == [
        ("A", "line 4: case 'A', of the same subject and session as 'a', is already on line 2"),
        ("a", "line 2: case 'a', of the same subject and session as 'A', is again on line 4"),
        ("c", "line 5: 2 cells under 3 columns"),
        ("a", "line 6: case 'a' is already on line 2"),
        # Its name is that of the ragged line: which of the two is meant?
        ("c", "line 7: case 'c' is already on line 5"),
    ]


def test_the_first_flaw_is_what_reading_all_or_nothing_says(tmp_path: Path) -> None:
    path = table(tmp_path, "case FLAIR T1w", "a f t", "b f t", "a f t", "c f")
    with pytest.raises(InputError) as caught:
        read_input(path, CHANNELS)
    assert str(caught.value) == read_cohort(path, CHANNELS).rejected[0].message
    assert "line 4: case 'a' is already on line 2" in str(caught.value)


def test_a_table_of_rejected_lines_only_is_no_error_of_the_table(tmp_path: Path) -> None:
    assert names(read_cohort(table(tmp_path, "case FLAIR T1w", "a f"), CHANNELS)) == ([], ["a"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        (['"case FLAIR T1w', "a f t"], "no table"),
        (["case FLAIR T1w"], "lists no case"),
        (["case FLAIR", "a f"], "no column 'T1w'"),
        (["case FLAIR T1w FLAIR", "a f t f"], "appears twice"),
    ],
)
def test_what_concerns_the_whole_table(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_cohort(table(tmp_path, *rows), CHANNELS)


def test_what_concerns_the_whole_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.tsv").write_bytes("case\tFLAIR\tT1w\nä\tf\tt".encode("latin-1"))
    for path, message in [
        (tmp_path / "absent", "no such folder or file"),
        (tmp_path / "latin.tsv", "save it as UTF-8"),
        (tmp_path, "no case found"),
        (tmp_path / ("n" * 300), "cannot be read"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            read_cohort(path, CHANNELS)
        assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(ValueError, match="index 'ancpbids'"):
        read_cohort(tmp_path, CHANNELS, "ancpbids")

    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(InputError, match="cannot be listed"):
        read_cohort(tmp_path, CHANNELS)


def test_every_flaw_of_a_folder_rejects_its_case_and_no_other(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *complete("sub-01", "sub-02_ses-1", "sub-02_ses-2", "sub-02_ses-3", "sub-04", "sub-06", "sub-07"),
        "sub-03/anat/sub-03_FLAIR.nii.gz",
        "sub-04/anat/sub-04_run-2_T1w.nii.gz",
        "sub-05/anat/sub-06_T1w.nii.gz",
        "sub-08/anat/sub-08_T2w.nii.gz",
        "derivatives/a/sub-07/anat/sub-07_label-L_mask.nii.gz",
        "derivatives/b/sub-07/anat/sub-07_label-L_mask.nii.gz",
        "derivatives/a/sub-01/anat/sub-01_label-L_mask.nii.gz",
    )
    (tmp_path / "sub-02/ses-2/anat/sub-02_ses-2_FLAIR.nii.gz").unlink()
    (tmp_path / "sub-09").symlink_to("sub-09")
    (tmp_path / "sub-10").symlink_to("nowhere")
    (tmp_path / "sub-11").mkdir()
    (tmp_path / "sub-11/ses-1").symlink_to("nowhere")
    (tmp_path / "sub-12").touch()
    cohort = read_cohort(tmp_path, CHANNELS)
    assert [case.name for case in cohort.cases] == ["sub-01", "sub-02_ses-1", "sub-02_ses-3", "sub-06"]
    assert cohort.cases[0].reference == tmp_path / "derivatives/a/sub-01/anat/sub-01_label-L_mask.nii.gz"
    parts = {
        "sub-02_ses-2": "sub-02/ses-2/anat: no image of channel FLAIR, though of T1w",
        "sub-03": "sub-03/anat: no image of channel T1w",
        "sub-04": "2 files for T1w of sub-04",
        "sub-05": "sub-06_T1w.nii.gz: another case's name; expected sub-05_…",
        "sub-07": "2 files for the reference mask of sub-07 (a/sub-07/",
        "sub-09": "sub-09: cannot be listed (Too many levels of symbolic links)",
        "sub-10": "sub-10: a link to a folder that is not there",
        "sub-11_ses-1": "sub-11/ses-1: a link to a folder that is not there",
    }
    assert [rejected.name for rejected in cohort.rejected] == list(parts)
    for rejected in cohort.rejected:
        assert parts[rejected.name] in rejected.message
        assert rejected.message.startswith(str(tmp_path))
    with pytest.raises(InputError, match="no image of channel FLAIR"):
        read_input(tmp_path, CHANNELS)


def closed_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that nobody may list; root is told so."""
    path.chmod(0)
    if os.access(path, os.R_OK):
        listed = Path.iterdir

        def iterdir(self: Path) -> object:
            if self == path or path in self.parents:
                raise PermissionError(13, "Permission denied")
            return listed(self)

        monkeypatch.setattr(Path, "iterdir", iterdir)


@pytest.mark.parametrize("closed", ["sub-02", "sub-02/ses-1", "sub-02/ses-1/anat", "derivatives/manual"])
def test_a_folder_without_permission(tmp_path: Path, closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *complete("sub-01", "sub-02_ses-1", "sub-03"), "derivatives/manual/README")
    closed_folder(tmp_path / closed, monkeypatch)
    cohort = read_cohort(tmp_path, CHANNELS)
    (tmp_path / closed).chmod(0o755)
    if closed == "derivatives/manual":  # what belongs to a case is not known for any
        assert names(cohort) == ([], ["sub-01", "sub-02_ses-1", "sub-03"])
    else:
        name = "sub-02" if closed == "sub-02" else "sub-02_ses-1"
        assert names(cohort) == (["sub-01", "sub-03"], [name])
    assert "cannot be listed (Permission denied)" in cohort.rejected[0].message


@pytest.fixture
def image() -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        nifti.write(path, np.random.default_rng(0).uniform(1, 9, (4, 5, 6)).astype(np.float32), np.eye(4))

    return make


def test_spaces_and_letters_of_any_language_in_file_names(tmp_path: Path, image: Callable[[Path], None]) -> None:
    folder = tmp_path / "données du service 神経"
    for name in ("Größe 1/ÿ flair (neu) #2.nii.gz", "Größe 1/t1 'w' 50 %.nii"):
        image(folder / name)
    path = folder / "Fälle 1.tsv"
    path.write_text(
        "case\tFLAIR\tT1w\na\tGröße 1/ÿ flair (neu) #2.nii.gz\tGröße 1/t1 'w' 50 %.nii\nMüller\tf\tt\n", "utf-8"
    )
    cohort = read_cohort(path, CHANNELS)
    assert names(cohort) == (["a"], ["line 3"])
    assert "case name 'Müller' cannot name files" in cohort.rejected[0].message
    preflight(cohort.cases, CHANNELS)
    assert load_scan(cohort.cases[0], CHANNELS).image.shape == (4, 5, 6, 2)

    for channel in CHANNELS:
        image(folder / "bids/sub-01/anat" / f"sub-01_acq-größer 3D_{channel}.nii.gz")
    cohort = read_cohort(folder / "bids", CHANNELS)
    assert names(cohort) == (["sub-01"], [])
    preflight(cohort.cases, CHANNELS)


COHORT = Cohort(
    [Case("sub-01_ses-1", {}), Case("sub-01_ses-2", {}), Case("sub-02_ses-1", {}), Case("x.7", {})],
    [Rejected("sub-03_ses-1", "m3"), Rejected("sub-04", "m4"), Rejected("line 7", "m7")],
)


@pytest.mark.parametrize(
    ("participants", "sessions", "expected"),
    [
        ([], [], names(COHORT)),
        (["01"], [], (["sub-01_ses-1", "sub-01_ses-2"], [])),
        (["sub-02", "01"], ["ses-1"], (["sub-01_ses-1", "sub-02_ses-1"], [])),
        (["x7"], [], (["x.7"], [])),
        (["03", "01"], ["2"], (["sub-01_ses-2"], [])),
        (["sub-03"], ["1"], ([], ["sub-03_ses-1"])),
        (["04"], ["2"], ([], ["sub-04"])),  # it may have had that session
        ([], ["2"], (["sub-01_ses-2"], ["sub-04", "line 7"])),
    ],
)
def test_participants(participants: list[str], sessions: list[str], expected: tuple[list[str], list[str]]) -> None:
    assert names(select_participants(COHORT, participants, sessions)) == expected


@pytest.mark.parametrize(
    ("participants", "sessions", "message"),
    [
        (["01", "sub-9", "8"], [], "participant '9', '8': not in the input; expected among 01, 02, x7, 03, 04"),
        (["SUB-01"], [], "participant 'SUB-01': not in the input"),
        ([], ["ses-3"], "session '3': not in the input; expected among 1, 2$"),
        (["02"], ["2"], "session '2': not of participant '02'; expected among 1$"),
        (["x7"], ["2"], "session '2': not of participant 'x7'; expected among none, give no session"),
    ],
)
def test_unknown_participants(participants: list[str], sessions: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_participants(COHORT, participants, sessions)


def test_some_of_many_participants_are_listed() -> None:
    many = Cohort([Case(f"sub-{i}", {}) for i in range(30)], [])
    with pytest.raises(InputError, match=r"expected among 0, 1, .*, 9, …$"):
        select_participants(many, ["x"])
    with pytest.raises(InputError, match=r"session 'x': not in the input; expected among none"):
        select_participants(many, sessions=["x"])


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A usual dataset, and what lies about in it."""
    return touch(
        tmp_path / "data set",
        *complete("sub-02", "sub-01_ses-b", "sub-01_ses-a", "sub-10_ses-1"),
        "sub-02/anat/sub-02_FLAIR.json",  # empty, thus no JSON
        "sub-02/anat/._sub-02_T1w.nii.gz",
        "sub-02/func/sub-02_FLAIR.nii.gz",
        "sub-03/anat/sub-03_T1w.nii.gz",
        "sub-04/anat/sub-04_T2w.nii.gz",
        "sub-05/anat/sub-05_FLAIR.nii.gz",
        "sub-05/anat/sub-05_T1w.nii",
        "sub-05/anat/sub-05_acq-fast_T1w.nii.gz",
        "sub-06/anat/sub-07_FLAIR.nii.gz",
        "sub-08/anat/sub-08_acq-3D_FLAIR.nii.gz",
        "sub-08/anat/sub-08_T1w.nii",
        "sourcedata/sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "derivatives/manual/dataset_description.json",
        "derivatives/manual/sub-02/anat/sub-02_label-L_mask.nii.gz",
        "derivatives/manual/sub-02/anat/sub-02_T1w.nii.gz",
    )


def test_pybids_finds_the_same(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bids", reason="pybids is not installed: pip install 'xaiseg[bids]'")
    (dataset / "sub-09").symlink_to("nowhere")
    expected = read_cohort(dataset, CHANNELS)
    assert names(expected) == (
        ["sub-01_ses-a", "sub-01_ses-b", "sub-02", "sub-08", "sub-10_ses-1"],
        ["sub-03", "sub-05", "sub-06", "sub-09"],
    )
    assert read_cohort(dataset, CHANNELS, "pybids") == expected
    monkeypatch.chdir(dataset.parent)
    assert read_cohort(Path(dataset.name), CHANNELS, "pybids") == read_cohort(Path(dataset.name), CHANNELS)


def test_pybids_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("bids", reason="pybids is not installed: pip install 'xaiseg[bids]'")
    with pytest.raises(InputError, match="no case found"):
        read_cohort(tmp_path, CHANNELS, "pybids")


def test_without_pybids(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bids", "bids.layout"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install 'xaiseg\[bids\]'"):
        read_cohort(dataset, CHANNELS, "pybids")
    with pytest.raises(InputError, match=r"cases\.tsv: a file; expected a BIDS folder for the index 'pybids'"):
        read_cohort(table(tmp_path, "case FLAIR T1w", "a f t"), CHANNELS, "pybids")


@pytest.mark.data
def test_real_folders(shared: Path) -> None:
    for folder in ("open_ms", "mslesseg"):
        cohort = read_cohort(shared / "data" / folder, CHANNELS)
        assert cohort.rejected == []
        assert cohort.cases == read_input(shared / "data" / folder, CHANNELS)
