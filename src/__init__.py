"""Canon Lab: fair, exactly repeatable comparisons of sequence architectures."""

import os

# PyTorch's CPU threads spin while they wait for each other. When anything else runs on the machine, the thread waited for may not
# be scheduled, and small models slow down by an order of magnitude (`benchmarks/threads.py`). Sleeping instead costs little on
# an idle machine. Read when torch is imported first, so it is set here; a value set by the user stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
