"""``python -m deep_ep_py <command>``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import doctor, run, scale_report

#: One entry a command: its name, its line of help, what adds its arguments, what runs it and returns the exit status.
COMMANDS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None], Callable[[Any], int]], ...] = (
    ("doctor", "what this machine can run, what not and why, with the remedy", doctor.add_arguments, doctor.run),
    (
        "plan",
        "bytes, buffer sizes and expected times of dispatch and combine on any number of nodes",
        scale_report.add_arguments,
        scale_report.run,
    ),
    ("run", "a program as Python runs it, with `deep_ep` being this library", run.add_arguments, run.run),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; usage errors leave with status 2, as argparse does."""
    parser = argparse.ArgumentParser(prog="python -m deep_ep_py", description="Expert-parallel dispatch and combine.")
    commands = parser.add_subparsers(title="commands", metavar="<command>")
    for name, summary, add_arguments, function in COMMANDS:
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        add_arguments(command)
        command.set_defaults(run=function)
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        return 130  # what a shell reports for a program that Ctrl-C ended
    return status


if __name__ == "__main__":
    sys.exit(main())
