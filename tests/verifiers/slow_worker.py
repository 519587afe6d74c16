"""A worker that never gets ready: for tests of the pool only."""

import time

time.sleep(600)
