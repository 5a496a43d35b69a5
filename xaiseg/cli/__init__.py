"""The `xaiseg` command. Each module beside this one adds commands, and imports what they do when they are called."""

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from xaiseg._version import __version__
from xaiseg.cli import analysis, cohort, context, evaluation, models, report, sanity, synthetic
from xaiseg.errors import InputError, Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 all done, 1 something failed, 2 wrong usage, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        # A scheduler's time limit is an interruption too; a run of a cohort does more about both, see `cohort.stopping`.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return arguments.run(arguments)
    except (InputError, OSError) as error:
        print(f"xaiseg: error: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"xaiseg: error: out of memory ({error}); give a smaller --memory or --chunk", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("xaiseg: interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    except Stopped as error:
        print(f"xaiseg: stopped: {error}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("xaiseg", description="Explain 3-D segmentation networks lesion by lesion.")
    parser.add_argument("--version", action="version", version=f"xaiseg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (models, cohort, evaluation, analysis, context, synthetic, report, sanity):
        module.add(commands)
    return parser
