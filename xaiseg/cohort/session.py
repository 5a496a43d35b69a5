"""What all cases of a run share."""

from dataclasses import replace

from xaiseg.cohort.folder import RunFolder
from xaiseg.cohort.methods import Method, Settings, build_methods, build_predictor
from xaiseg.cohort.work import Request
from xaiseg.errors import InputError
from xaiseg.inference import StitchedPredictor
from xaiseg.models import Model
from xaiseg.saliency.linearise import MAX_CHUNK


class Session:
    """A model made ready for the cases of a run: its predictors and methods, compiled once for all of them.

    Raises InputError for settings that do not fit the model or this machine.
    """

    def __init__(self, model: Model, request: Request, settings: Settings | None, folder: RunFolder) -> None:
        self.model, self.request, self.settings, self.folder = model, request, settings, folder
        try:
            # in float32, so that which lesions there are does not depend on how they are explained
            self.segmenter = StitchedPredictor.of(model, whole_volume=request.whole_volume)
        except ValueError as error:
            raise InputError(f"--whole-volume: {error}") from error
        self.methods: list[Method] = []
        self.explained = self.segmenter
        if settings is not None:
            try:
                self.methods = build_methods(model, settings)
                self.explained = build_predictor(model, settings, request.whole_volume)
            except ValueError as error:
                raise InputError(str(error)) from error

    @property
    def keys(self) -> list[str]:
        return [method.key for method in self.methods]

    @property
    def source(self) -> str:
        """Whose instances are found: a segmentation alone is of the predicted ones."""
        return "predicted" if self.settings is None else self.request.instances

    def halve_chunk(self) -> int | None:
        """Go on with half the rows at once; None where it is one row already."""
        assert self.settings is not None
        chunk = (self.settings.chunk or MAX_CHUNK) // 2
        if chunk < 1:
            return None
        self.settings = replace(self.settings, chunk=chunk)
        self.methods = build_methods(self.model, self.settings)
        return chunk
