"""What nnU-Net's plans.json says about the preprocessing of one configuration, checked, to and from JSON."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from xaiseg.errors import InputError
from xaiseg.imaging.grid import NATIVE
from xaiseg.imaging.nnunet_resample import KEEP, RESAMPLE, Resampling

SCHEMES = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
_CT = ("mean", "std", "percentile_00_5", "percentile_99_5")


@dataclass(frozen=True)
class NnunetPreprocessing:
    """The preprocessing of an nnU-Net v2 configuration (DefaultPreprocessor).

    nnU-Net's arrays are (Z, Y, X), the axes of the file in reverse; `transpose_forward` permutes them once more. What
    is said "per axis" below is in that last order, which is also that of `Prepared.image`.

    Attributes:
        orientation: "native" for the readers SimpleITKIO and NibabelIO, "RAS" for NibabelIOWithReorient.
            SimpleITKIOWithReorient is "RAS" too, with one difference: on an oblique grid it takes a spacing that may
            differ in its last digit, and a length of exactly n + 0.5 voxels may be rounded the other way.
        transpose_forward: axis i of the result is axis transpose_forward[i] of (Z, Y, X).
        spacing: target per axis in mm; 2 values for a 2-D configuration, whose first axis keeps its spacing.
        normalisation: class per channel, one of `SCHEMES`.
        use_mask_for_norm: per channel, whether a z-score is taken over the non-zero region alone.
        intensities: per channel, "mean", "std", "percentile_00_5" and "percentile_99_5" of the training foreground;
            only CTNormalization needs them, the others may have {}.
        data_resampling: of images.
        probability_resampling: of logits, on the way back.
    """

    orientation: str
    transpose_forward: tuple[int, int, int]
    spacing: tuple[float, ...]
    normalisation: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    intensities: tuple[Mapping[str, float], ...]
    data_resampling: Resampling
    probability_resampling: Resampling

    @property
    def channels(self) -> int:
        return len(self.normalisation)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; `from_dict` reads it back."""
        return {
            "orientation": self.orientation,
            "transpose_forward": list(self.transpose_forward),
            "spacing": list(self.spacing),
            "normalisation": list(self.normalisation),
            "use_mask_for_norm": list(self.use_mask_for_norm),
            "intensities": [dict(channel) for channel in self.intensities],
            "data_resampling": asdict(self.data_resampling),
            "probability_resampling": asdict(self.probability_resampling),
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], source: str) -> "NnunetPreprocessing":
        """Read what `to_dict` made, or what a configuration of plans.json holds under these names.

        The two resamplings take the plans' `resampling_fn_*_kwargs` as they are, with the function's name as
        "resampling_fn"; what they leave out has the function's own default (order 3, order_z 0, not separate).

        Args:
            source: what messages call the origin of `given`, a path.

        Raises:
            InputError: a field is missing, unknown or cannot be used; names it.
        """

        def take(name: str, valid: Callable[[Any], bool], expected: str) -> Any:
            if name not in given:
                raise _refuse(source, name, "missing", expected)
            if not valid(given[name]):
                raise _refuse(source, name, repr(given[name]), expected)
            return given[name]

        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise _refuse(source, unknown[0], "unknown", f"only {', '.join(names)}")
        orientation = take("orientation", lambda v: v in (NATIVE, "RAS"), f"{NATIVE!r} or 'RAS'")
        transpose = take(
            "transpose_forward", lambda v: _list(v, _integer) and sorted(v) == [0, 1, 2], "a permutation of 0, 1, 2"
        )
        spacing = take(
            "spacing",
            lambda v: _list(v, _number) and len(v) in (2, 3) and min(v) > 0,
            "3 lengths in mm, or 2 of a 2-D configuration",
        )
        schemes = take(
            "normalisation",
            lambda v: _list(v, lambda s: s in SCHEMES) and len(v) > 0,
            f"a list of {', '.join(SCHEMES)}",
        )
        n = len(schemes)
        masks = take(
            "use_mask_for_norm",
            lambda v: _list(v, lambda m: isinstance(m, bool)) and len(v) == n,
            f"true or false for each channel ({n})",
        )
        intensities = take(
            "intensities",
            lambda v: _list(v, lambda c: isinstance(c, Mapping)) and len(v) == n,
            f"an object for each channel ({n})",
        )
        for channel, scheme in enumerate(schemes):
            for key in _CT if scheme == "CTNormalization" else ():
                if not _number(value := intensities[channel].get(key)):
                    found = f"{key} of channel {channel} is {value!r}"
                    raise _refuse(source, "intensities", found, f"a number, which {scheme} needs")
        data, probabilities = (
            _resampling(take(name, lambda v: isinstance(v, Mapping), "an object"), name, source)
            for name in ("data_resampling", "probability_resampling")
        )
        if probabilities.resampling_fn == KEEP != data.resampling_fn:
            raise _refuse(source, "probability_resampling", f"{KEEP}, but {RESAMPLE} for images", "one that undoes it")
        return cls(
            orientation,
            (transpose[0], transpose[1], transpose[2]),
            tuple(map(float, spacing)),
            tuple(schemes),
            tuple(masks),
            tuple({key: float(known[key]) for key in _CT if _number(known.get(key))} for known in intensities),
            data,
            probabilities,
        )


def _resampling(given: Mapping[str, Any], name: str, source: str) -> Resampling:
    rule = {key: value for key, value in given.items() if not (key == "is_seg" and value is False)}
    function = rule.get("resampling_fn", RESAMPLE)
    checks: dict[str, tuple[bool, str]] = {
        "resampling_fn": (function in (RESAMPLE, KEEP), f"{RESAMPLE} or {KEEP}, the functions known here"),
        "order": (_order(rule.get("order", 3)), "an integer from 0 to 5"),
        "order_z": (_order(rule.get("order_z", 0)), "an integer from 0 to 5"),
        "force_separate_z": (
            any(rule.get("force_separate_z") is v for v in (None, True, False)),
            "true, false or null",
        ),
    }
    if unknown := sorted(set(rule) - set(checks)):
        raise _refuse(source, f"{name}.{unknown[0]}", repr(rule[unknown[0]]), f"only {', '.join(checks)}")
    for key, (valid, expected) in checks.items():
        if not valid:
            raise _refuse(source, f"{name}.{key}", repr(rule[key]), expected)
    return Resampling(**rule)


def _refuse(source: str, field: str, found: str, expected: str) -> InputError:
    return InputError(
        f"{source}: nnU-Net preprocessing, {field}: {found}; expected {expected}: compare with plans.json"
    )


def _list(value: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(valid, value))


def _integer(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _order(value: Any) -> bool:
    return _integer(value) and 0 <= value <= 5
