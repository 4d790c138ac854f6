"""What the programs share: what is wrong with what a user gives, in one line; files that are whole or not there."""

import contextlib
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
    except (UserError, OSError) as e:
        raise UserError(f"{what}: {getattr(e, 'strerror', None) or e}") from None
    except Exception:       # damaged headers, zip files and JSON raise ten kinds, and numpy's texts advise unpickling
        raise UserError(f"{what}: {cure}") from None


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
