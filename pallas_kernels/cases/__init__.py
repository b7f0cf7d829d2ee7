"""Named argument shapes that the tests, the benchmarks and the check on a device share, by what they are for."""

import numpy as np

Seed = int | np.random.Generator
"""What the numbers of a case are drawn with."""
