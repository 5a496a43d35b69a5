"""Does saliency tell true from false lesions? Classifiers judge patients they have not seen; what would rejection change?"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from xaiseg.analysis.clustered import clustered_effect
from xaiseg.analysis.groups import FEWEST
from xaiseg.analysis.run_tables import MEASURES, MapKind
from xaiseg.errors import InputError
from xaiseg.metrics.bootstrap import Statistic, bootstrap_interval, resample_weights
from xaiseg.metrics.voxels import ratio

FOLDS = 5
_INNER = 4
_FEWEST_PATIENTS = 3
ERROR_COLUMNS = {
    "model": "logistic: logistic regression, boosting: gradient boosted trees, of the figures in lesions.tsv, of radiomic "
    "features of the maps or of the scans, or of all of these; else one feature, as it is",
    "features": "Number of features",
    "n_tp": "TP lesions that were scored",
    "n_fp": "FP lesions that were scored",
    "patients": "Patients of these lesions",
    "auroc": "P(score of a TP > score of an FP), ties half, of scores given to patients that the model was not fitted on",
    "auroc_low": "Lower end of its 95 % percentile interval over resampled patients; models are not fitted anew",
    "auroc_high": "Upper end of that interval",
    "rejected_tp": "TP whose score is below the threshold, which was chosen for F1 in the folds without their patient",
    "rejected_fp": "FP whose score is below it",
    "ppv_before": "TP / (TP + FP) of all predicted lesions of the run",
    "ppv_after": "The same without the rejected ones",
    "ppv_gain": "ppv_after - ppv_before",
    "ppv_gain_low": "Lower end of its 95 % percentile interval over resampled patients",
    "ppv_gain_high": "Upper end of that interval",
    "f1_before": "2TP / (2TP + FP + FN)",
    "f1_after": "The same without the rejected ones; a rejected TP counts as FN",
    "f1_gain": "f1_after - f1_before",
    "f1_gain_low": "Lower end of its 95 % percentile interval over resampled patients",
    "f1_gain_high": "Upper end of that interval",
}
SCORE_COLUMNS = {
    "case": "Case",
    "patient": "Whose scan it is",
    "lesion": "Number of the lesion, as in lesions.tsv",
    "group": "TP or FP",
    "model": "As in error_detection.tsv",
    "score": "Higher: more likely a true lesion; from a model fitted without this patient",
    "kept": "1, or 0 where the score is below the threshold chosen without this patient",
}


class Features(NamedTuple):
    """values: `(n, k)`, NaN where unknown. names: `(k,)`. alone: those that are judged one by one too."""

    values: np.ndarray
    names: tuple[str, ...]
    alone: tuple[str, ...]


class Counts(NamedTuple):
    """What the scan's patients have besides the scored lesions, by patient `(P,)`: predicted lesions that are kept whatever
    happens, true and false, and missed lesions."""

    true: np.ndarray
    false: np.ndarray
    missed: np.ndarray


class Detection(NamedTuple):
    """Out-of-fold scores `(n,)` of one model, and which lesions it keeps."""

    scores: np.ndarray
    kept: np.ndarray


Judge = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`(features, is true, features to judge) -> scores`."""


def saliency_features(lesions: Mapping[str, np.ndarray], methods: Sequence[MapKind]) -> Features:
    """All figures of all maps, volume and mean probability; the peaks, volume and probability are judged alone as well."""
    maps = [method.column(c, measure) for method in methods for c in method.channels for measure in MEASURES]
    peaks = [method.column(c, "peak") for method in methods for c in method.channels]
    names = (*maps, "volume_mm3", "mean_probability")
    values = np.stack([lesions[name] for name in names], -1)
    return Features(values, names, (*peaks, "volume_mm3", "mean_probability"))


def check_scikit_learn() -> None:
    """Raises InputError where scikit-learn is missing."""
    if find_spec("sklearn") is None:
        raise InputError("error detection: needs scikit-learn, which is missing: pip install 'xaiseg[analysis]'")


def detect_errors(
    features: Features,
    true: np.ndarray,
    patients: np.ndarray,
    others: Counts,
    resamples: int = 2000,
    seed: int = 0,
    models: Sequence[str] = ("logistic", "boosting"),
) -> tuple[list[dict[str, Any]], dict[str, Detection]]:
    """Tell TP from FP: the columns of `ERROR_COLUMNS` for each model, and what it says of each lesion, by model.

    Patients are dealt into five folds (or as many as there are patients), lesions of a patient together. A lesion's score comes
    from a model fitted on the other folds. The threshold below which it is rejected is the one of largest F1 on the other folds,
    where scores come from four folds of their own; a single feature needs no fit and has its threshold chosen alike.

    Args:
        true: bool `(n,)`, TP or FP. patients: integers `(n,)`, places in `others`.
        others: see `Counts`.
        models: of all features, names in `MODELS`; single features come besides.

    Raises InputError where scikit-learn is missing, a model is unknown, there are fewer than three patients, or fewer than three
    lesions or two patients have TP, or FP.
    """
    check_scikit_learn()
    if unknown := [name for name in models if name not in MODELS]:
        raise InputError(
            f"error detection: no model {', '.join(unknown)}, expected some of {', '.join(MODELS)}: name these"
        )
    if (several := len(set(patients.tolist()))) < _FEWEST_PATIENTS:
        raise InputError(
            f"error detection: {several} patients, expected at least {_FEWEST_PATIENTS}, so that a threshold is chosen on patients "
            "that its scores were not fitted on: explain more scans"
        )
    for name, where in (("TP", true), ("FP", ~true)):
        if where.sum() < FEWEST or len(set(patients[where].tolist())) < 2:
            raise InputError(
                f"error detection: {int(where.sum())} {name} of {len(set(patients[where].tolist()))} patients, expected "
                f"{FEWEST} or more of at least 2: explain more scans with references"
            )
    weights = resample_weights(np.random.default_rng(seed), len(others.missed), resamples)
    rows, found = [], {}
    tried: list[tuple[str, np.ndarray, Judge | None]] = [
        *((name, features.values, MODELS[name]) for name in models),
        *((name, features.values[:, [features.names.index(name)]], None) for name in features.alone),
    ]
    for name, values, judge in tried:
        if np.isfinite(values).all(0).any() or judge is not None:
            detection = cross_validated(values, true, patients, others, judge)
            found[name] = detection
            rows.append(_row(name, values.shape[1], detection, true, patients, others, weights, resamples, seed))
    return rows, found


def cross_validated(
    values: np.ndarray, true: np.ndarray, patients: np.ndarray, others: Counts, judge: Judge | None
) -> Detection:
    """Scores and decisions, each from the folds without the lesion's patient; without a `judge` the value is the score."""
    scores, kept = np.empty(len(true)), np.empty(len(true), bool)
    for train, test in _folds(patients, FOLDS):
        rest = ~np.isin(np.arange(len(others.missed)), patients[test])
        if judge is None:
            seen, scores[test] = _known(values[train, 0]), _known(values[test, 0])
        else:
            seen = np.empty(len(train))
            for fit, look in _folds(patients[train], _INNER):
                seen[look] = judge(values[train][fit], true[train][fit], values[train][look])
            scores[test] = judge(values[train], true[train], values[test])
        sums = (int(part[rest].sum()) for part in others)
        kept[test] = scores[test] >= best_threshold(seen, true[train], *sums)
    return Detection(scores, kept)


def foremost(rows: Sequence[Mapping[str, Any]], most: int = 6) -> list[Mapping[str, Any]]:
    """Rows of `ERROR_COLUMNS` that a picture can hold: models of many features, logistic ones first, then the best single ones."""
    models = sorted((r for r in rows if r["features"] > 1), key=lambda r: not r["model"].startswith("logistic"))
    single = sorted((r for r in rows if r["features"] == 1), key=lambda r: -r["auroc"])
    return [*models, *single][:most]


def best_threshold(scores: np.ndarray, true: np.ndarray, more_true: int, more_false: int, missed: int) -> float:
    """The threshold of largest F1 when lesions that score below it are rejected; the lowest of several, `-inf` to reject none.

    `F1 = 2TP / (2TP + FP + FN)`; a rejected TP adds to FN. more_true, more_false: predicted lesions without a score, kept.
    """
    order = np.argsort(scores, kind="stable")
    ranked, hits = scores[order], true[order]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ranked) > 0) + 1]).astype(int)  # the first lesion that is kept
    lost = np.concatenate([[0], hits.cumsum()])[starts]
    kept_false = (~hits).sum() - np.concatenate([[0], (~hits).cumsum()])[starts]
    f1 = _f1(more_true + hits.sum() - lost, more_false + kept_false, missed + lost)
    best = int(np.argmax(np.nan_to_num(f1, nan=-1.0)))
    if best == 0:
        return -np.inf
    # half-way to the lesion below: as far from both as can be
    return float((ranked[starts[best]] + ranked[starts[best] - 1]) / 2)


def _row(
    name: str,
    count: int,
    detection: Detection,
    true: np.ndarray,
    patients: np.ndarray,
    others: Counts,
    weights: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    scores, kept = detection
    effect = clustered_effect(scores[true], scores[~true], patients[true], patients[~true], resamples, seed)
    row: dict[str, Any] = {"model": name, "features": count, "n_tp": int(true.sum()), "n_fp": int((~true).sum())}
    row |= {"patients": len(set(patients.tolist()))}
    row |= dict(zip(("auroc", "auroc_low", "auroc_high"), ((1 + x) / 2 for x in effect[:3]), strict=True))
    row |= {"rejected_tp": int((true & ~kept).sum()), "rejected_fp": int((~true & ~kept).sum())}
    lesions = np.stack([true, ~true, true & ~kept, ~true & ~kept], -1).astype(float)
    sums = np.zeros((len(others.missed), 5))
    np.add.at(sums[:, :4], patients, lesions)
    sums += np.stack([others.true, others.false, *np.zeros((2, len(sums))), others.missed], -1)
    for measure, before, after in (("ppv", _ppv_before, _ppv_after), ("f1", _f1_before, _f1_after)):
        total = sums.sum(0)
        gain = bootstrap_interval(partial(_gain, before, after), sums, weights)
        row |= {f"{measure}_before": float(before(total)), f"{measure}_after": float(after(total))}
        row |= {f"{measure}_gain": gain.estimate, f"{measure}_gain_low": gain.low, f"{measure}_gain_high": gain.high}
    return row


def _folds(patients: np.ndarray, folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import GroupKFold

    count = min(folds, len(set(patients.tolist())))
    if count < 2:  # nothing to hold out: the few are judged by themselves
        return [(np.arange(len(patients)), np.arange(len(patients)))]
    return list(GroupKFold(count).split(patients, groups=patients))


def _logistic(values: np.ndarray, true: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Probability of TP by logistic regression (L2, C = 1, classes balanced) on standardised features, medians for unknown ones."""
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = np.isfinite(values).any(0)
    if true.all() or not true.any() or not known.any():
        return np.full(len(judged), true.mean())
    model = make_pipeline(
        SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)
    )
    return model.fit(values[:, known], true).predict_proba(judged[:, known])[:, 1]


def _boosting(values: np.ndarray, true: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Probability of TP by 100 stochastic gradient boosted trees (Friedman 2002) of depth 3, classes balanced, medians for unknown
    values: half of the lesions for each tree, √k features for each split, 5 lesions or more in a leaf."""
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.utils.class_weight import compute_sample_weight

    known = np.isfinite(values).any(0)
    if true.all() or not true.any() or not known.any():
        return np.full(len(judged), true.mean())
    fill = SimpleImputer(strategy="median")
    model = GradientBoostingClassifier(
        max_depth=3, min_samples_leaf=5, subsample=0.5, max_features="sqrt", random_state=0
    )
    model.fit(fill.fit_transform(values[:, known]), true, compute_sample_weight("balanced", true))
    return model.predict_proba(fill.transform(judged[:, known]))[:, 1]


MODELS: dict[str, Judge] = {"logistic": _logistic, "boosting": _boosting}


def _known(values: np.ndarray) -> np.ndarray:
    """A lesion without a value scores lowest."""
    return np.where(np.isfinite(values), values, -np.finfo(float).max / 4)


def _gain(before: Statistic, after: Statistic, sums: np.ndarray) -> np.ndarray:
    return after(sums) - before(sums)


def _f1(true: Any, false: Any, missed: Any) -> Any:
    return ratio(2 * true, 2 * true + false + missed)


# Of sums `(…, 5)`: TP, FP, rejected TP, rejected FP, FN.
def _ppv_before(s: np.ndarray) -> Any:
    return ratio(s[..., 0], s[..., 0] + s[..., 1])


def _ppv_after(s: np.ndarray) -> Any:
    kept = s[..., 0] - s[..., 2]
    return ratio(kept, kept + s[..., 1] - s[..., 3])


def _f1_before(s: np.ndarray) -> Any:
    return _f1(s[..., 0], s[..., 1], s[..., 4])


def _f1_after(s: np.ndarray) -> Any:
    return _f1(s[..., 0] - s[..., 2], s[..., 1] - s[..., 3], s[..., 4] + s[..., 2])
