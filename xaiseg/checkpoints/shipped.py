"""Models that come with the package, by name: folders of `xaiseg/shipped`, each with a model card."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent.parent / "shipped"
_CARD = "model_card.md"


def shipped_models() -> list[str]:
    """Their names, sorted: what `load_model` and `--model` take in place of a folder."""
    return sorted(card.parent.name for card in _FOLDER.glob(f"*/{_CARD}"))


def shipped_folder(name: str) -> Path:
    """The model folder. Raises KeyError for a name that is not one of `shipped_models()`."""
    if name not in shipped_models():
        raise KeyError(name)
    return _FOLDER / name


def model_card(name: str) -> str:
    """Data and licence, recipe, results and limits of a shipped model, in Markdown. Raises KeyError as `shipped_folder`."""
    return (shipped_folder(name) / _CARD).read_text(encoding="utf-8")
