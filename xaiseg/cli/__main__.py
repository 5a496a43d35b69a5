"""`python -m xaiseg.cli` is the `xaiseg` command."""

import sys

from xaiseg.cli import main

if __name__ == "__main__":
    sys.exit(main())
