"""Which implementation of an operation runs: a table of named backends for each operation.

An operation (`causal_conv`, `gla`, `attention`, ...) registers its backends from the fastest to the most general.
Each brings the function that computes it and a predicate `why_not`, called with the same arguments, which returns None
when the backend can run this call and otherwise one sentence: why not, and what to install or change. `"auto"` takes
the first that can run; a backend asked for by name runs or raises.

    scan = Operation("scan")

    @scan.backend("fla", why_not=lambda x, **_: None if x.is_cuda else "x is on the CPU; move it to a CUDA device")
    def _scan_fla(x, *, reverse): ...

    @scan.backend("torch")
    def _scan_torch(x, *, reverse): ...

    y = scan("auto", x, reverse=False)

Packages that only one backend needs are imported inside its function, so that importing the registry stays cheap.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

AUTO = "auto"


class BackendUnavailableError(RuntimeError):
    """The backend asked for exists but cannot run this call; the message says why and what would make it run."""


class Backend(NamedTuple):
    """One implementation of an operation."""

    run: Callable[..., Any]
    why_not: Callable[..., str | None]


class Operation:
    """A named operation and its backends, fastest first. Calling it runs one of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backends: dict[str, Backend] = {}

    def backend(
        self, name: str, *, why_not: Callable[..., str | None] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that registers a function as the next slower backend; without `why_not` it can always run.

        Raises:
            ValueError: the name is taken, or is "auto".
        """
        if name == AUTO or name in self.backends:
            raise ValueError(f"{self.name}: backend name {name!r} is taken; registered: {_listed(self.backends)}")

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends[name] = Backend(run, why_not or _always)
            return run

        return register

    def check_name(self, name: str) -> None:
        """Raises a ValueError that lists the backends if there is none of this name; for constructors, before anything runs."""
        if name != AUTO and name not in self.backends:
            raise ValueError(f"backend {name!r} does not exist; {self.name} has {_listed([AUTO, *self.backends])}")

    def pick(self, name: str, *args: Any, **kwargs: Any) -> str:
        """The name of the backend that would run this call: `name` itself, or for "auto" the first that can.

        Raises:
            ValueError: no backend has this name.
            BackendUnavailableError: the backend named, or for "auto" every backend, cannot run this call.
        """
        if name == AUTO:
            for candidate, backend in self.backends.items():
                if backend.why_not(*args, **kwargs) is None:
                    return candidate
            reasons = (f"{key}: {backend.why_not(*args, **kwargs)}" for key, backend in self.backends.items())
            raise BackendUnavailableError(f"{self.name}: no backend can run this call. " + " | ".join(reasons))
        if name not in self.backends:
            known = _listed([AUTO, *self.backends])
            raise ValueError(f"{self.name}: there is no backend {name!r}; choose one of {known}")
        reason = self.backends[name].why_not(*args, **kwargs)
        if reason is not None:
            raise BackendUnavailableError(f"{self.name}: backend {name!r} cannot run this call: {reason}")
        return name

    def __call__(self, backend: str, *args: Any, **kwargs: Any) -> Any:
        """Run the operation on `backend` ("auto" or a name) and record which one ran. Raises what `pick` raises."""
        chosen = self.pick(backend, *args, **kwargs)
        _record(self.name, chosen)
        return self.backends[chosen].run(*args, **kwargs)


_used: dict[str, list[str]] = {}


def used_backends() -> dict[str, tuple[str, ...]]:
    """Operation name -> the backends it has run on since the start or `forget_backends`, in the order of their first use."""
    return {operation: tuple(names) for operation, names in _used.items()}


def forget_backends() -> None:
    """Begins a new record of `used_backends`: one process may make several runs."""
    _used.clear()


def _record(operation: str, backend: str) -> None:
    names = _used.setdefault(operation, [])
    if backend not in names:
        names.append(backend)


# The effect of torch.compiler.assume_constant_result, which would import all of torch._dynamo: torch.compile calls the
# function once, while tracing, and puts no guard on the table, which would recompile whenever the table grows.
_record._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _always(*_args: Any, **_kwargs: Any) -> None:
    return None


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"
