"""Files that are whole."""

from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a file that is either the old or the new one, never a part."""
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text)
    temporary.replace(file)
