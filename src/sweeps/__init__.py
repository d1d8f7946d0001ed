"""Many runs as one: a grid of configurations, jobs that are run once, on this machine or by SLURM."""
