"""What users also want and readers of the method need not meet."""

import os

# For python -m extras.NAME: before the program loads torch, as in sample.py.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
