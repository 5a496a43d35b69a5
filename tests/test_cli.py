"""The command: one clear line for bad input, a status, and nothing half-written."""

import gzip
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import CASE, RAS, SHAPE, progress_free, snapshot, stored, volumes, write_case, write_manifest, write_model

from xaiseg import __version__
from xaiseg.checkpoints import load_model
from xaiseg.cli import main
from xaiseg.cohort import job
from xaiseg.errors import InputError

FIXTURES = Path(__file__).parent / "fixtures"
FLAIR, T1W, REFERENCE, INSTANCES = (f"{CASE}_{c}.nii.gz" for c in ("FLAIR", "T1w", "reference", "instances"))
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def pristine_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def pristine_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("case")
    write_manifest(folder / "cases.tsv", [write_case(folder, CASE)])
    return folder


@pytest.fixture
def scans(pristine_case: Path, tmp_path: Path) -> Path:
    """A folder with a case and its manifest, to be spoilt."""
    return Path(shutil.copytree(pristine_case, tmp_path / "in"))


@pytest.fixture
def model(pristine_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_model, tmp_path / "model"))


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command, which must refuse with one line, status 1 and an untouched disk; returns the line."""

    def call(*argv: str | Path) -> str:
        before = snapshot(tmp_path)
        capfd.readouterr()
        assert main([str(a) for a in argv]) == 1
        # capfd, not capsys: what libraries write past sys.stderr reaches users too.
        printed = capfd.readouterr().err
        (line,) = progress_free(printed)
        assert line.startswith("xaiseg: error: ")
        # The line is not glued to a progress bar, also for tools that know nothing of carriage returns.
        assert line in printed.split("\n")
        assert snapshot(tmp_path) == before
        return line.removeprefix("xaiseg: error: ")

    return call


@pytest.fixture
def refused_explain(refused: Refused, scans: Path, model: Path, tmp_path: Path) -> Refused:
    def call(*options: str) -> str:
        source, out = scans / "cases.tsv", tmp_path / "out"
        return refused("explain", source, out, "--model", model, "--samples", "1", "--chunk", "4", *options)

    return call


def replace_voxels(path: Path, change: Callable[[np.ndarray], None]) -> None:
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    change(data)
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)


def test_missing_file(scans: Path, refused_explain: Refused) -> None:
    (scans / T1W).unlink()
    assert refused_explain().startswith(f"{scans / T1W}: does not exist")


def test_missing_input(refused: Refused, model: Path, tmp_path: Path) -> None:
    line = refused("segment", tmp_path / "nowhere", tmp_path / "out", "--model", model)
    assert line.startswith(f"{tmp_path / 'nowhere'}: no such folder or file")


@pytest.mark.parametrize("command", ["segment", "explain"])
def test_truncated_file(command: str, scans: Path, model: Path, refused: Refused, tmp_path: Path) -> None:
    content = (scans / FLAIR).read_bytes()
    (scans / FLAIR).write_bytes(content[: len(content) // 2])
    line = refused(command, scans / "cases.tsv", tmp_path / "out", "--model", model)
    assert line.startswith(f"{scans / FLAIR}: truncated")


def test_damaged_voxels_behind_a_good_header(scans: Path, refused_explain: Refused) -> None:
    content = bytearray((scans / FLAIR).read_bytes())
    content[-5000] ^= 0xFF  # caught by the checksum of gzip, or by the stream itself
    (scans / FLAIR).write_bytes(bytes(content))
    assert refused_explain().startswith(f"{scans / FLAIR}: ")


def test_four_dimensions(scans: Path, refused_explain: Refused) -> None:
    nib.save(nib.Nifti1Image(np.ones((*SHAPE, 2), np.float32), RAS), scans / FLAIR)
    line = refused_explain()
    assert line.startswith(f"{scans / FLAIR}: ")
    assert "4-D" in line


def test_different_shapes(scans: Path, refused_explain: Refused) -> None:
    nib.save(stored(volumes()["T1w"][:-1]), scans / T1W)
    line = refused_explain()
    assert line.startswith(f"{scans / T1W}: not on the grid of {scans / FLAIR}")
    assert "24 x 28 x 22 voxels against 23 x 28 x 22" in line


def test_different_affines_unless_resampled(scans: Path, model: Path, refused_explain: Refused, tmp_path: Path) -> None:
    shifted = RAS.copy()
    shifted[0, 3] += 1  # one voxel: resampling then is a shift without interpolation
    nib.save(stored(np.roll(volumes()["T1w"], -1, 0), affine=shifted), scans / T1W)
    line = refused_explain()
    assert line.startswith(f"{scans / T1W}: not on the grid of {scans / FLAIR}")
    assert "--resample" in line
    options = ["--model", str(model), "--resample"]
    assert main(["segment", str(scans / "cases.tsv"), str(tmp_path / "moved"), *options]) == 0
    nib.save(stored(volumes()["T1w"]), scans / T1W)
    assert main(["segment", str(scans / "cases.tsv"), str(tmp_path / "still"), *options]) == 0
    moved, still = (
        np.asarray(nib.load(next((tmp_path / out).rglob("*_probseg.nii.gz"))).dataobj) for out in ("moved", "still")
    )
    np.testing.assert_array_equal(moved, still)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(value: float, scans: Path, refused_explain: Refused) -> None:
    replace_voxels(scans / T1W, lambda data: data.__setitem__((4, 5, 6), value))
    line = refused_explain()
    assert line.startswith(f"{scans / T1W}: voxels not finite")
    assert "(4, 5, 6)" in line


def test_constant_image(scans: Path, refused_explain: Refused) -> None:
    replace_voxels(scans / FLAIR, lambda data: data.fill(7))
    assert refused_explain().startswith(f"{scans / FLAIR}: every non-zero voxel is 7")


def test_scaling_that_overflows(scans: Path, refused_explain: Refused) -> None:
    nib.save(stored(volumes()["FLAIR"].astype(np.int16)), scans / FLAIR)
    content = bytearray(gzip.decompress((scans / FLAIR).read_bytes()))
    content[112:120] = struct.pack("<2f", 3e38, 0)  # scl_slope, scl_inter
    (scans / FLAIR).write_bytes(gzip.compress(bytes(content)))
    line = refused_explain()
    assert line.startswith(f"{scans / FLAIR}: ")
    assert "scaling" in line


def test_empty_segmentation(refused_explain: Refused) -> None:
    line = refused_explain("--threshold", "0.99999999")
    assert line.startswith(f"{CASE}: the segmentation is empty at threshold 0.99999999")


def test_segmenting_an_empty_scan_is_no_error(scans: Path, model: Path, tmp_path: Path) -> None:
    options = ["--model", str(model), "--threshold", "0.99999999"]
    assert main(["segment", str(scans / "cases.tsv"), str(tmp_path / "out"), *options]) == 0
    assert not np.asarray(nib.load(next((tmp_path / "out").rglob("*_mask.nii.gz"))).dataobj).any()


def test_no_lesion_of_the_size(refused_explain: Refused) -> None:
    line = refused_explain("--min-voxels", "5000")
    assert line.startswith(f"{CASE}: none of the 2 instances has 5000 voxels or more")


@pytest.mark.parametrize(("name", "source"), [(REFERENCE, "reference"), (INSTANCES, "given")])
def test_label_map_on_another_grid(name: str, source: str, scans: Path, refused_explain: Refused) -> None:
    shifted = RAS.copy()
    shifted[2, 3] += 0.5
    nib.save(stored(volumes()["reference"], affine=shifted), scans / name)
    assert refused_explain("--instances", source).startswith(f"{scans / name}: not on the grid of")


def test_empty_label_map(scans: Path, refused_explain: Refused) -> None:
    replace_voxels(scans / INSTANCES, lambda data: data.fill(0))
    assert "given label map is empty" in refused_explain("--instances", "given")


def test_unknown_case(refused_explain: Refused) -> None:
    line = refused_explain("--cases", f"{CASE},sub-99")
    assert "'sub-99'" in line
    assert CASE in line


def test_unknown_lesion(refused_explain: Refused) -> None:
    line = refused_explain("--lesions", "2,9")
    assert line == f"{CASE}: no lesion 9; it has 1, 2"


def test_missing_manifest_column(scans: Path, refused_explain: Refused) -> None:
    write_manifest(scans / "cases.tsv", [{"case": CASE, "FLAIR": FLAIR}])
    assert refused_explain().startswith(f"{scans / 'cases.tsv'}: no column 'T1w'")


@pytest.mark.parametrize(("source", "what"), [("reference", "reference mask"), ("given", "label map")])
def test_nothing_to_take_lesions_from(source: str, what: str, scans: Path, refused_explain: Refused) -> None:
    write_manifest(scans / "cases.tsv", [{"case": CASE, "FLAIR": FLAIR, "T1w": T1W}])
    assert refused_explain("--instances", source).startswith(f"{CASE}: has no {what}")


@pytest.mark.parametrize("command", ["segment", "explain"])
def test_output_below_a_file(command: str, scans: Path, model: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert refused(command, scans / "cases.tsv", out, "--model", model).startswith(f"{out}: ")


def test_output_without_permission(refused_explain: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("xaiseg.cohort.output.tempfile.TemporaryFile", denied)
    assert refused_explain().startswith(f"{tmp_path / 'out'}: cannot be written (Permission denied)")


def test_full_disk_while_maps_are_written(
    scans: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line; what is written is whole, and with room again the same command goes on from there."""
    replace = os.replace
    command = ["explain", str(scans / "cases.tsv"), str(tmp_path / "out"), "--model", str(model)]
    command += ["--samples", "1", "--chunk", "4", "--no-pictures"]

    def full(source: Path, target: Path) -> None:
        if "saliency" in Path(target).name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("xaiseg.imaging.nifti.os.replace", full)
        assert main(command) == 1
    (line,) = progress_free(capsys.readouterr().err)
    assert "lesion-001_saliency.nii.gz: cannot be written (No space left on device)" in line
    left = {name: content for name, content in snapshot(tmp_path / "out").items() if name.endswith(".nii.gz")}
    assert len(left) == 3  # the segmentation
    assert not [name for name in snapshot(tmp_path / "out") if name.endswith(".tmp")]
    assert main(command) == 0
    assert left.items() <= snapshot(tmp_path / "out").items()
    assert len(list((tmp_path / "out").rglob("*saliency.nii.gz"))) == 2


def test_an_error_of_the_file_system_is_one_line(refused_explain: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret/in")

    monkeypatch.setattr(job, "read_cohort", denied)
    assert refused_explain() == "[Errno 13] Permission denied: '/secret/in'"


@pytest.mark.parametrize("command", ["segment", "explain"])
def test_existing_output(command: str, scans: Path, model: Path, refused: Refused, tmp_path: Path) -> None:
    arguments = [scans / "cases.tsv", tmp_path / "out", "--model", model]
    assert main(["segment", *map(str, arguments)]) == 0
    line = refused(command, *arguments, "--threshold", "0.4")
    assert line.startswith(f"{tmp_path / 'out'}: is not empty, and its results came from other settings (")
    assert "model.threshold: 0.5 before, 0.4 now" in line
    assert ("command: segment before, explain now" in line) == (command == "explain")
    assert "--overwrite to start anew" in line


def test_output_of_something_else(refused_explain: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "--overwrite does not touch it" in refused_explain("--overwrite")


def test_unknown_layer(refused_explain: Refused) -> None:
    line = refused_explain("--method", "gradcam++", "--layer", "decoder9")
    assert line.startswith("no layer 'decoder9' in this network; it has ")
    assert "bottleneck.conv" in line


def test_model_folder_missing(scans: Path, refused: Refused, tmp_path: Path) -> None:
    line = refused("segment", scans / "cases.tsv", tmp_path / "out", "--model", tmp_path / "nowhere")
    assert line.startswith(f"{tmp_path / 'nowhere'}: not a model folder")


def test_model_description_damaged(model: Path, refused_explain: Refused) -> None:
    description = model / "model.json"
    text = description.read_text()
    description.write_text(text[:40])
    assert refused_explain().startswith(f"{description}: cannot be read as JSON")
    description.write_text(json.dumps(json.loads(text) | {"window": [16, 16, 15]}))
    assert "multiple of" in refused_explain()
    description.write_text(json.dumps(json.loads(text) | {"channels": ["FLAIR", "T1w", "T2w"]}))
    assert "do not fit the network" in refused_explain()


# Reads of Orbax that are still under way find their event loop closed, which pytest takes for a mistake of the test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_model_parameters_damaged(model: Path, refused_explain: Refused) -> None:
    data = max((p for p in (model / "parameters").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    assert refused_explain().startswith(f"{data}: damaged")
    shutil.rmtree(model / "parameters")
    assert ": missing" in refused_explain()


def test_missing_parameters_are_one_line_for_users(scans: Path, model: Path, tmp_path: Path) -> None:
    shutil.rmtree(model / "parameters")
    command = [
        str(Path(sys.executable).with_name("xaiseg")),
        "segment",
        str(scans / "cases.tsv"),
        "--model",
        str(model),
    ]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--channels", "T1w,FLAIR", "--window", "8,16,8", "--overlap", "0.5", "--threshold", "0.4"]
    options += ["--connectivity", "26", "--orientation", "RAS"]
    assert main(["convert", str(FIXTURES / "unet_batch.pth"), str(tmp_path / "model"), *options]) == 0
    out = capsys.readouterr().out
    assert "8×16×8, overlap 0.5" in out
    assert "strides 2 at every level (keys do not tell; --strides)" in out
    spec = load_model(tmp_path / "model").spec
    assert (spec.channels, spec.window, spec.overlap) == (("T1w", "FLAIR"), (8, 16, 8), 0.5)
    assert (spec.threshold, spec.connectivity, spec.orientation) == (0.4, 26, "RAS")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_convert_onto_an_existing_folder(model: Path, refused: Refused) -> None:
    source = FIXTURES / "unet_batch.pth"
    assert refused("convert", source, model, "--window", "16,16,16").startswith(f"{model}: exists")
    assert main(["convert", str(source), str(model), "--window", "16,16,16", "--overwrite"]) == 0
    assert load_model(model).spec.source == "unet_batch.pth"


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("unet_batch.pth", [], "does not tell the size of its window"),
        ("unet_batch.pth", ["--window", "16,16,16", "--strides", "2"], "2 levels, 1 stride"),
        ("unet_batch.pth", ["--window", "16,16,16", "--no-mirroring"], "not an nnU-Net result folder"),
        ("unet_batch.pth", ["--window", "16,16,16", "--fold", "0"], "not an nnU-Net result folder"),
        ("unet_batch.pth", ["--window", "16,16,16", "--remat"], "--remat is for a SwinUNETR"),
        ("swin_v1.pth", ["--window", "64,32,1"], "--patch-merging"),
        ("unet_batch.pth", ["--window", "16,16,15"], "multiple of"),
        ("unet_batch.pth", ["--channels", "FLAIR"], "2 input channels"),
        ("unet_batch.pth", ["--window", "16,16,16", "--channels", "FLAIR,FLAIR"], "different names"),
        ("unet_batch.pth", ["--window", "16,16,16", "--orientation", "RAX"], "axis codes"),
        ("unet_2d.pth", ["--window", "16,16,16", "--target-class", "1"], "2-D"),
        ("unet_batch.npz", [], "not a PyTorch checkpoint"),
        ("absent.pth", [], "no such checkpoint"),
    ],
)
def test_convert_refuses(name: str, options: list[str], found: str, refused: Refused, tmp_path: Path) -> None:
    line = refused("convert", FIXTURES / name, tmp_path / "out", *options)
    assert found in line


def test_convert_refuses_another_architecture(refused: Refused, tmp_path: Path) -> None:
    content = (FIXTURES / "unet_batch.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(content[: len(content) // 2])
    assert refused("convert", cut, tmp_path / "out").startswith(f"{cut}: not a PyTorch checkpoint, or cut off")

    with zipfile.ZipFile(FIXTURES / "unet_batch.pth") as source, zipfile.ZipFile(tmp_path / "vit.pth", "w") as target:
        for item in source.infolist():
            data = source.read(item)
            # Same length, so that the pickle stays valid: a state dict with keys of no U-Net.
            target.writestr(item.filename, data.replace(b"model.", b"layer."))
    assert "not a network that can be converted (MONAI UNet, " in refused(
        "convert", tmp_path / "vit.pth", tmp_path / "out"
    )


def test_convert_runs_no_code(refused: Refused, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"model.0.conv.weight": Payload()}, protocol=2))
        archive.writestr("evil/version", "3")
    line = refused("convert", tmp_path / "evil.pth", tmp_path / "out")
    assert line.startswith(f"{tmp_path / 'evil.pth'}: refused")
    assert not (tmp_path / "ran").exists()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["convert", "--help"], ["segment", "--help"], ["explain", "--help"], ["demo", "-h"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith("usage: xaiseg")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"xaiseg {__version__}\n"


def test_the_demo_passes_errors_on(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert refused("demo", "--out", tmp_path / "out").startswith(f"{tmp_path / 'out'}: exists and is not empty")


def test_an_input_error_is_the_only_one_without_a_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours must not look like one of the user's."""
    monkeypatch.setattr(job, "read_cohort", lambda *_: [][0])
    assert not issubclass(IndexError, InputError | OSError)
    with pytest.raises(IndexError):
        main(["segment", "in", "out", "--model", str(model)])


def test_the_installed_command(scans: Path, model: Path, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("xaiseg")),
        "segment",
        str(scans / "cases.tsv"),
        "--model",
        str(model),
    ]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{CASE}: done, 2 lesions")
    again = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")  # there was nothing left to do
    other = subprocess.run(
        [*command, str(tmp_path / "out"), "--threshold", "0.4"], capture_output=True, text=True, check=False
    )
    assert (other.returncode, other.stdout) == (1, "")
    (line,) = other.stderr.splitlines()
    assert line.startswith(f"xaiseg: error: {tmp_path / 'out'}: is not empty, and its results came from other settings")
