"""What runs share: files that are whole, and the way to stop."""

from pathlib import Path


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""


def write_whole(file: Path, text: str) -> None:
    """Write a file that is either the old or the new one, never a part."""
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text)
    temporary.replace(file)
