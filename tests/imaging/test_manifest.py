"""The table of cases."""

from pathlib import Path

import pytest

from xaiseg.errors import InputError
from xaiseg.imaging.manifest import read_manifest

CHANNELS = ["FLAIR", "T1w"]


def table(tmp_path: Path, *rows: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "cases.tsv"
    path.write_bytes("\n".join(row.replace(" ", "\t") for row in rows).encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_cases(tmp_path: Path, encoding: str) -> None:
    path = table(
        tmp_path,
        "T1w case note FLAIR reference instances",
        "t1.nii sub-01_ses-2 ä /data/flair.nii mask.nii n/a",
        "",
        'b/t1.nii "b.2" x b/flair.nii n/a b/les.nii\r',
        "",
        encoding=encoding,
    )
    first, second = read_manifest(path, CHANNELS)
    assert (first.name, second.name) == ("sub-01_ses-2", "b.2")
    assert list(first.images.items()) == [("FLAIR", Path("/data/flair.nii")), ("T1w", tmp_path / "t1.nii")]
    assert (first.reference, first.instances) == (tmp_path / "mask.nii", None)
    assert (second.reference, second.instances) == (None, tmp_path / "b/les.nii")


def test_optional_columns_may_be_absent(tmp_path: Path) -> None:
    (case,) = read_manifest(table(tmp_path, "case FLAIR T1w", "a f.nii t.nii"), CHANNELS)
    assert (case.reference, case.instances) == (None, None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        (["case FLAIR T1w"], "lists no case"),
        (["case FLAIR t1w", "a f t"], "no column 'T1w', found 'case', 'FLAIR', 't1w'"),
        (["case,FLAIR,T1w", "a,f,t"], "save it tab-separated"),
        (["case FLAIR T1w T1w", "a f t t"], "a column appears twice"),
        (["case FLAIR T1w", "a f t", "b f"], "line 3: 2 cells under 3 columns"),
        (["case FLAIR T1w", "", "b f t u"], "line 3: 4 cells under 3 columns"),
        (["case FLAIR T1w", "a  t"], "line 2: empty cell in column 'FLAIR'"),
        (["case FLAIR T1w", " f t"], "line 2: empty cell in column 'case'"),
        (["case FLAIR T1w reference", "a f t "], "line 2: empty cell in column 'reference'.*write n/a"),
        (["case FLAIR T1w", "a f t", "b f t", "a f t"], "line 4: case 'a' is already on line 2"),
        (["case FLAIR T1w", "ab f t", "a.b f t"], "case 'a.b', of the same subject and session as 'ab'"),
        (["case FLAIR T1w", "sub-01 f t", "01 f t"], "case '01', of the same subject and session as 'sub-01'"),
        (["case FLAIR T1w", "sub-a f t", "sub-A f t"], "'sub-A', of the same"),
        (["case FLAIR T1w", '"a f t'], "no table"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, rows: list[str], message: str) -> None:
    path = table(tmp_path, *rows)
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(path, CHANNELS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../a", "a/b", "a\\b", "..", ".a", "-a", "é", "_", "a:b", "a*"])
def test_names_unfit_for_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot name files"):
        read_manifest(table(tmp_path, "case FLAIR T1w", f"{name} f t"), CHANNELS)


def test_two_sessions_of_one_subject_are_two_cases(tmp_path: Path) -> None:
    path = table(tmp_path, "case FLAIR T1w", "sub-1_ses-1 f t", "sub-1_ses-2 f t", "sub-1 f t")
    assert [case.session for case in read_manifest(path, CHANNELS)] == ["1", "2", None]


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save it as UTF-8"):
        read_manifest(table(tmp_path, "case FLAIR T1w", "a f t", encoding="utf-16"), CHANNELS)
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(tmp_path / "absent.tsv", CHANNELS)
