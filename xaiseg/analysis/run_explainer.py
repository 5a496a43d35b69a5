"""The method of a finished run, built again from its record: experiments explain as the run did, with fewer samples if need be."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from xaiseg.analysis.run_tables import Run
from xaiseg.cohort.methods import METHODS, Method, Settings, build_methods
from xaiseg.errors import InputError
from xaiseg.models import Model

FEW_SAMPLES = 4
_OWN = {field.name for field in fields(Settings)}


def key_of(name: str) -> str:
    """A method's key in files and columns, `gradcampp` for `gradcam++`."""
    return name.replace("++", "pp").replace("-", "")


def options_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Settings` that a run's record of a method tells."""
    options = {option: value for option, value in record.items() if option in _OWN}
    if "layer" in record:
        layers = record["layer"]
        options["layers"] = (layers,) if isinstance(layers, str) else tuple(layers)
    return options


def method_of(run: Run, model: Model, name: str | None = None, samples: int | None = None) -> Method:
    """The method of this name or key, or the run's first, with the run's settings.

    model: see `reopened.reopen_model`. samples: of noise; by default the run's, and `FEW_SAMPLES` at most.
    Raises InputError where the run has no such method, or its settings cannot be had again.
    """
    records = run.identity["methods"]
    key = next(iter(records)) if name is None else key_of(name)
    if key not in records:
        raise InputError(f"{run.root}: was explained by {', '.join(records)}, not by {name}: name one of these")
    record = records[key]
    known = next((known for known in METHODS if key_of(known) == key), None)
    if known is None:
        raise InputError(
            f"{run.root}: its method {key} is none of {', '.join(METHODS)}: explain it again by one of these"
        )
    options = options_of(record)
    if "samples" in record:
        options["samples"] = min(record["samples"], FEW_SAMPLES) if samples is None else samples
    try:
        (method,) = build_methods(model, Settings(methods=(known,), **options))
    except ValueError as error:
        raise InputError(f"{run.root}: its method {known} cannot be had again: {error}") from error
    unlike = [
        option
        for option, value in json.loads(json.dumps(method.settings)).items()
        if option != "samples" and value != record.get(option)
    ]
    if unlike:
        raise InputError(
            f"{run.root}: its method {known} has {unlike[0]} {record.get(unlike[0])!r}, expected "
            f"{method.settings[unlike[0]]!r}, as this version of xaiseg has it: explain the scans again"
        )
    return method
