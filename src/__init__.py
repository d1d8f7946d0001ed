"""Canon Lab: fair, exactly repeatable comparisons of sequence architectures."""

import os

__version__ = "0.2.0"

# PyTorch's CPU threads spin while they wait for each other. When anything else runs on the machine, the thread waited for may not
# be scheduled: the quickstart's model then falls from 12.1 to 4.2 steps/s beside one busy process on two cores. Threads that sleep
# make 10.0 and 7.5 (benchmarks/results/threads.json). Read when torch is imported first, so it is set here; a value set by the user
# stays, and OMP_WAIT_POLICY=ACTIVE is the faster one on a machine of one's own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
