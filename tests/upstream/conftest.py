"""Upstream's Triton kernels, run on the CPU by Triton's interpreter: `make test-kernels`.

The interpreter is chosen while triton is imported and holds for the whole process, so these tests have one of their own. In any other
process (`make test`) they are not collected.
"""

import pytest

from src.components.kernels import upstream

if upstream.interpreted():
    from tests.upstream.interpreter import prepare

    prepare()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _packages():
    """Without the packages nothing would be checked: say so, rather than skip."""
    for package in (upstream.FLA, upstream.MAMBA):
        assert upstream.missing(package) is None, upstream.missing(package)
