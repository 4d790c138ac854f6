"""What the programs share: flags, signals, exit codes, and what stands in extras."""

import argparse
import contextlib
import importlib
import os
import signal
import sys

import torch

from motionstream import UserError, reason_of


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others."""

    def error(self, message):
        raise UserError(message)


def number(kind, least, most):
    """A flag's type: an int or float from `least` to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]      # argparse prints it
    return parse


def check_output(path, endings, inputs):
    """UserError if an output path cannot be written or is one of the inputs."""
    there = [file for file in inputs if file and file.exists()]
    faults = [
        (path.suffix.lower() not in endings, f"choose a name that ends in {' or '.join(endings)}"),
        (not os.access(path.parent, os.W_OK),
         f"the folder {path.parent} is missing or not writable"),
        (path.is_dir(), "is a folder"),
        (path.exists() and any(map(path.samefile, there)),
         "is a file that is read; choose another name"),
    ]
    for wrong, cure in faults:
        if wrong:
            raise UserError(f"{path}: {cure}")


@contextlib.contextmanager
def hold_signals():
    """Record the first Ctrl-C or SIGTERM in the list that this yields; the second one ends the
    program."""
    noted = []

    def handle(signum, _):
        if noted:
            raise KeyboardInterrupt
        noted.append(signum)

    before = {}
    for signum in signal.SIGINT, signal.SIGTERM:
        before[signum] = signal.signal(signum, handle)
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def reported(work, *args):
    """Exit code of work(*args), a program: 2 and a one-line message for an error that the user can
    fix, 130 if interrupted, 141 if the reader of its output closed the pipe, as | head -1 does.
    Consoles that lack a character of a path, as on Windows, print its code."""
    for console in sys.stdout, sys.stderr:
        if hasattr(console, "reconfigure"):
            console.reconfigure(errors="backslashreplace")
    try:
        code = work(*args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141                          # 128 + SIGPIPE, which Windows does not have
    except (UserError, OSError) as e:       # OSError: a full disk, for one
        print(f"error: {UserError(str(e))}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        of_memory = MemoryError, torch.OutOfMemoryError
        if not isinstance(e, of_memory) and "DefaultCPUAllocator" not in str(e):
            raise
        print(f"error: out of memory: {UserError(reason_of(e))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def extra(name, why):
    """The module extras/NAME.py, for what few need. UserError if this copy lacks it."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ImportError:
        raise UserError(f"{why}; extras/{name}.py, which that needs, is missing") from None
