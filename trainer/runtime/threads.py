"""How long the threads of a matrix product spin while they wait for each other. Importing this sets
it, and has an effect before torch is loaded alone.

By default a thread of GNU OpenMP spins for about a millisecond, which keeps the others from running
where another program has a core: training is 2 to 9 times slower then (docs/LOG.md).
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
