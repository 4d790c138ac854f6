"""What users also want and readers of the method need not meet."""

import os

# For python -m extras.NAME, before it loads torch: idle threads spin only briefly, as a browser
# beside the page needs the cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
