"""What the programs share: what is wrong with what a user gives, in one line; files that are whole or not there."""

import contextlib
import errno
import os
from pathlib import Path

import numpy as np


class UserError(ValueError):
    """What the user can put right: one line that says what was found and what to do."""


@contextlib.contextmanager
def naming(what, cure):
    """Whatever is wrong with `what`, which comes from outside, in one line."""
    try:
        with np.errstate(all="ignore"):     # numbers too large for float32 get a message of their own
            yield
    except UserError as e:
        raise UserError(f"{what}: {e}") from None
    except Exception as e:  # damaged headers, zip files and JSON raise ten kinds, and numpy's texts advise unpickling
        told = getattr(e, "errno", None) not in (None, errno.EINVAL)    # that one comes of damaged zip files
        raise UserError(f"{what}: {e.strerror if told else cure}") from None


def write(path, save, *args):
    """Call save(*args, temporary path), then rename: a file is whole or not there."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        save(*args, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
