"""Explainers to compare, by name: a run's own methods, variants of any method, controls."""

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xaiseg._types import Explainer
from xaiseg.analysis.control_explainers import CONTROLS
from xaiseg.analysis.run_explainer import FEW_SAMPLES, key_of, options_of
from xaiseg.analysis.run_tables import Run
from xaiseg.cohort.methods import METHODS, Method, Settings, build_methods
from xaiseg.errors import InputError
from xaiseg.models import Model

# What a run's settings say of methods that it did not use.
_SHARED = ("aggregate", "target", "samples", "noise")
_TYPES = {
    name: kind
    for name, kind in typing.get_type_hints(Settings).items()
    if name not in ("methods", "precision", "devices", "seed", "memory")
}


class Named(NamedTuple):
    """An explainer with its name; the method of `cohort.methods` that it is, None for a control or one of the caller's own."""

    name: str
    explain: Explainer
    method: Method | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.method is None else {"method": self.method.name, **self.method.settings}


def default_names(run: Run) -> list[str]:
    """The run's own methods, two that most papers compare with, and the controls."""
    own = [name for name in METHODS if key_of(name) in run.identity["methods"]]
    return [*dict.fromkeys([*own, "gradient", "input-x-gradient"]), *CONTROLS]


def named_explainers(run: Run, model: Model, names: Sequence[str]) -> list[Named]:
    """The explainers that `names` say: `NAME` of `METHODS` or `CONTROLS`, or `NAME:OPTION=VALUE,…` with options of `Settings`.

    What is not said is as the run has it, but no more than `FEW_SAMPLES` samples of noise, since the measures explain each lesion
    many times.
    Raises InputError for an unknown name or option, a value that it cannot have, or a name that is given twice.
    """
    if twice := [name for n, name in enumerate(names) if name in names[:n]]:
        raise InputError(f"explainer {twice[0]} is given twice: give each once")
    return [_named(run.identity["methods"], model, name) for name in names]


def _named(records: Mapping[str, Mapping[str, Any]], model: Model, text: str) -> Named:
    name, _, rest = text.partition(":")
    if name in CONTROLS:
        if rest:
            raise InputError(f"explainer {name!r} takes no options, not {rest}: leave them out")
        return Named(text, CONTROLS[name]())
    if name not in METHODS:
        raise InputError(f"explainer {name!r} is unknown; known are {', '.join((*METHODS, *CONTROLS))}")
    options: dict[str, Any] = {o: v for record in [*records.values()][::-1] for o, v in record.items() if o in _SHARED}
    options |= options_of(records.get(key_of(name), {}))
    options["samples"] = min(options.get("samples", FEW_SAMPLES), FEW_SAMPLES)
    options |= dict(_option(text, part) for part in rest.split(",") if part)
    try:
        (method,) = build_methods(model, Settings(methods=(name,), **options))
    except ValueError as error:
        raise InputError(f"explainer {text}: {error}") from error
    return Named(text, method.explain, method)


def _option(explainer: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = "layers" if name == "layer" else name
    if not equals or name not in _TYPES:
        raise InputError(
            f"explainer {explainer}: {text!r}, expected OPTION=VALUE with an option of {', '.join(_TYPES)}"
        )
    kind = _TYPES[name]
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    try:
        return name, (value,) if name == "layers" else kind(value)
    except ValueError:
        raise InputError(f"explainer {explainer}: {name} is {value!r}, expected {kind.__name__}") from None
