"""Work shared by processes that begin anew, as on Windows and macOS, unaware of the first."""

import functools
import sys
import unittest.mock

from extras import world
from extras.clips import encode_video
from extras.testing import folder, new_vae, slow


@slow
def test_workers_that_begin_anew_encode_as_this_process_does():
    encode = functools.partial(encode_video, new_vae())
    options = {"frames": 5, "size": 16, "seed": 2, "encode": encode}
    with folder() as one, folder() as two:
        world.write_clips(one, 5, workers=1, **options)
        with unittest.mock.patch.dict(sys.modules, {"__main__": world}):        # they load no tests
            world.write_clips(two, 5, workers=2, **options)
        names = sorted(path.name for path in one.iterdir())
        assert len(names) == 5 + 1                              # and world.json
        assert names == sorted(path.name for path in two.iterdir())
        for name in names:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
