"""What the programs share: what is wrong with what a user gives, in one line."""

import contextlib

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
