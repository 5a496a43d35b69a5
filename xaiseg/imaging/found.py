"""What an input holds: its cases, and those that cannot be used, each with its cause."""

from typing import NamedTuple

from xaiseg.errors import InputError
from xaiseg.imaging.case import Case


class Rejected(NamedTuple):
    """A case that cannot be used.

    Attributes:
        name: the case's: as the table has it, or `sub-…[_ses-…]`; `line 7` for a line of a table without a usable name.
        message: one line: the file, what was found, what was expected, what to do.
    """

    name: str
    message: str


class Cohort(NamedTuple):
    """The cases of an input, and the rejected ones; either list may be empty."""

    cases: list[Case]
    rejected: list[Rejected]

    def complete(self) -> list[Case]:
        """The cases, where none was rejected.

        Raises:
            InputError: the cause of the first rejected one.
        """
        if self.rejected:
            raise InputError(self.rejected[0].message)
        return self.cases
