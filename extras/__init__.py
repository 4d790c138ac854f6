"""What users also want and readers of the method need not meet."""

import os

if "OMP_WAIT_POLICY" not in os.environ:                # as in sample.py, before a program here loads torch
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
