"""A cohort with every kind of broken input that we could think of: the good cases complete, each bad one is told with its cause."""

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import Explain, progress_free, snapshot, table, write_case

from xaiseg.cli import main

GOOD = ("sub-good1", "sub-good2", "sub-good3")


def flair(folder: Path, name: str) -> Path:
    return folder / f"{name}_FLAIR.nii.gz"


def rewritten(change: Callable[[nib.Nifti1Image], nib.Nifti1Image | None]) -> Callable[[Path], None]:
    """Load, change, save."""

    def apply(path: Path) -> None:
        image = nib.load(path)
        image = nib.Nifti1Image(np.asarray(image.dataobj).copy(), image.affine, image.header)
        nib.save(change(image) or image, path)

    return apply


def voxels(change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    def apply(image: nib.Nifti1Image) -> nib.Nifti1Image:
        data = np.asarray(image.dataobj).copy()
        changed = change(data)
        return nib.Nifti1Image(data if changed is None else changed, image.affine)

    return rewritten(apply)


def placed(change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    def apply(image: nib.Nifti1Image) -> nib.Nifti1Image:
        affine = image.affine.copy()
        change(affine)
        return nib.Nifti1Image(np.asarray(image.dataobj), affine)

    return rewritten(apply)


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def unpacked(change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    """Change bytes of the header or voxels behind gzip."""

    def apply(path: Path) -> None:
        data = bytearray(gzip.decompress(path.read_bytes()))
        change(data)
        path.write_bytes(gzip.compress(bytes(data), 1))

    return apply


def flipped_qform(image: nib.Nifti1Image) -> None:
    other = image.affine.copy()
    other[0] *= -1
    image.set_sform(image.affine, 1)
    image.set_qform(other, 1)


def bomb(path: Path) -> None:
    """The header of a small volume before 64 MB of zeros that take 64 kB."""
    header = gzip.decompress(path.read_bytes())[:352]
    path.write_bytes(gzip.compress(header + bytes(64 << 20), 9))


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


def spoil(data: np.ndarray, value: float) -> None:
    data[5, 5, 5] = value


def scaled(data: bytearray) -> None:
    data[112:120] = struct.pack("<2f", 1e38, 0)


def flat(data: bytearray) -> None:
    """The third column of the sform is zero."""
    for row in (280, 296, 312):
        data[row + 8 : row + 12] = bytes(4)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "zero": (lambda p: p.write_bytes(b"") and None, "empty, 0 bytes"),
    "missing": (Path.unlink, "does not exist"),
    "truncated": (content(lambda b: b[: len(b) // 2]), "truncated"),
    "lastbyte": (content(lambda b: b[:-1]), "truncated"),
    "checksum": (content(lambda b: b[:-8] + b"\0\0\0\0" + b[-4:]), "damaged"),
    "garbled": (content(lambda b: b[:200] + bytes(200) + b[400:]), "FLAIR.nii.gz: "),
    "trailing": (content(lambda b: b + b"more"), "followed by other bytes"),
    "bomb": (bomb, "more data than its header announces"),
    "huge": (unpacked(lambda d: d.__setitem__(slice(42, 48), struct.pack("<3h", 30000, 30000, 30000))), "announces"),
    "promise": (unpacked(lambda d: d.__setitem__(slice(42, 48), struct.pack("<3h", 1000, 1000, 1000))), "announces"),
    "text": (lambda p: p.write_text("not an image") and None, "not gzip"),
    "page": (lambda p: p.write_text("<!DOCTYPE html><html>404</html>") and None, "DOCTYPE"),
    "plain": (content(gzip.decompress), "not gzip"),
    "gziptext": (content(lambda b: gzip.compress(b"no header here" * 100)), "not a readable NIfTI header"),
    "shortheader": (content(lambda b: gzip.compress(gzip.decompress(b)[:100])), "too few for a NIfTI header"),
    "folder": (replaced_by(Path.mkdir), "a folder"),
    "pipe": (replaced_by(os.mkfifo), "a pipe"),
    "loop": (loop, "leads to itself"),
    "dangling": (replaced_by(lambda p: p.symlink_to("nowhere.nii.gz")), "a link to a file that is not there"),
    "fourd": (voxels(lambda d: np.stack([d, d], -1)), "4-D"),
    "complex": (voxels(lambda d: d.astype(np.complex64)), "expected real numbers"),
    "shape": (voxels(lambda d: d[:-1]), "not on the grid"),
    "shifted": (placed(lambda a: a.__setitem__((0, 3), a[0, 3] + 2)), "not on the grid"),
    "flipped": (placed(lambda a: a.__setitem__(0, -a[0])), "not on the grid"),
    "leftright": (rewritten(flipped_qform), "left and right are uncertain"),
    "flat": (unpacked(flat), "degenerate"),
    "metres": (rewritten(lambda i: i.header.set_xyzt_units("meter")), "metres"),
    "nan": (voxels(lambda d: spoil(d, np.nan)), "not finite"),
    "infinite": (voxels(lambda d: spoil(d, np.inf)), "not finite"),
    "overflow": (unpacked(scaled), "not finite"),
    "constant": (voxels(lambda d: np.full_like(d, 7)), "constant"),
    "zeros": (voxels(np.zeros_like), "FLAIR.nii.gz: "),
}


def broken_line(folder: Path, name: str) -> dict[str, str]:
    line = write_case(folder, name, seed=2)
    line.pop("instances")
    return line


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A manifest, and for each bad case what must be said of it."""
    folder = tmp_path / "scans with späces"
    lines, expected = [], {}
    for number, name in enumerate(GOOD):
        lines.append(broken_line(folder, name) | {"case": name})
        if number == 1:  # file names may hold anything
            odd = folder / "Läsion #1 (FLAIR).nii.gz"
            flair(folder, name).rename(odd)
            lines[-1]["FLAIR"] = odd.name
    for kind, (breaks, message) in BROKEN.items():
        name = f"sub-{kind}"
        lines.append(broken_line(folder, name))
        breaks(flair(folder, name))
        expected[name] = message
    # masks
    for kind, change, message in (
        ("maskvalues", lambda d: d * np.float32(0.5), "without a valid label"),
        ("masknegative", lambda d: -d.astype(np.int16), "without a valid label"),
        ("maskgrid", lambda d: d[1:], "expected the image's own grid"),
    ):
        name = f"sub-{kind}"
        lines.append(broken_line(folder, name))
        voxels(change)(folder / f"{name}_reference.nii.gz")
        expected[name] = message
    name = "sub-maskmissing"
    lines.append(broken_line(folder, name) | {"reference": "nowhere.nii.gz"})
    expected[name] = "does not exist"
    columns = list(lines[0])
    text = ["\t".join(columns), *("\t".join(line[c] for c in columns) for line in lines)]
    # lines of the table itself
    twice = broken_line(folder, "sub-twice")
    text += ["\t".join(twice[c] for c in columns)] * 2
    expected["sub-twice"] = "expected each subject and session once"
    text.append("\t".join({**twice, "case": "sub-nocell", "T1w": ""}[c] for c in columns))
    expected["sub-nocell"] = "empty cell"
    text.append("sub-ragged\tonly.nii.gz")
    expected["sub-ragged"] = "cells under"
    text.append("\t".join({**twice, "case": "../escape"}[c] for c in columns))
    expected[f"line {len(text)}"] = "cannot name files"
    (folder / "cases.tsv").write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder / "cases.tsv", expected


def test_every_good_case_completes_and_every_bad_one_is_told(
    corpus: tuple[Path, dict[str, str]], explain: Explain, capsys: pytest.CaptureFixture[str]
) -> None:
    source, expected = corpus
    assert len(expected) >= 30
    out = explain("out", "--samples", "1", "--no-pictures", source=source, status=1)
    printed = capsys.readouterr()
    rows = {row["case"]: row for row in table(out / "cases.tsv")}
    assert {name for name, row in rows.items() if row["status"] == "done"} == set(GOOD)
    assert {row["case"] for row in table(out / "lesions.tsv")} == set(GOOD)
    assert rows.keys() - set(GOOD) == expected.keys()
    failures = {row["case"]: row["message"] for row in table(out / "logs" / "failures.tsv")}
    told = {line.partition(": failed: ")[0] for line in progress_free(printed.err) if ": failed: " in line}
    for name, message in expected.items():
        assert rows[name]["status"] == "failed", name
        assert message in rows[name]["message"], (name, rows[name]["message"])
        assert failures[name] == rows[name]["message"]
        assert "\n" not in rows[name]["message"]
        assert name in told
    assert not [name for name in snapshot(out) if name.endswith(".tmp")]


def test_swapped_channels_are_computed_with_a_warning(
    native_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = write_case(tmp_path / "in", "sub-01")
    line["FLAIR"], line["T1w"] = line["T1w"], line["FLAIR"]
    source = tmp_path / "in" / "cases.tsv"
    source.write_text("\t".join(line) + "\n" + "\t".join(line.values()) + "\n")
    assert main(["segment", str(source), str(tmp_path / "out"), "--model", str(native_model)]) == 0
    assert "sub-01: warning: " in capsys.readouterr().err
    assert "sub-01_T1w.nii.gz" in table(tmp_path / "out" / "cases.tsv")[0]["message"]
