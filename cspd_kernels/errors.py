"""The errors that both packages raise for a caller to catch.

All of them are a :class:`CspdError`. Each is also the built-in error that fits, so ``except ValueError`` works too::

    CspdError
        BackendUnavailable   RuntimeError   the backend asked for cannot serve this call or machine
        CallError            RuntimeError   the arguments are valid, but the call cannot be made now, or overflowed
        MissingPackage       RuntimeError   an optional package is not installed
        InvalidInput         ValueError     an argument or an environment variable has a bad value
            WrongType        TypeError      an argument has the wrong type
                WrongDtype                  a dtype is unknown, or not one that this place accepts
        UnsupportedModel     ValueError     a model or its head computes something that the kernels do not cover
            NotAModel        TypeError      the object is not such a model at all
        CheckpointError      ValueError     a file of weights does not hold what was asked for

Files that are missing or may not be read stay ``OSError``, as Python's own functions raise them.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "CallError",
    "CheckpointError",
    "CspdError",
    "InvalidInput",
    "MissingPackage",
    "NotAModel",
    "UnsupportedModel",
    "WrongDtype",
    "WrongType",
]


class CspdError(Exception):
    """The base class of all errors of this package.

    Example:
        >>> import cspd
        >>> from cspd_kernels import Schedule
        >>> try:
        ...     Schedule.cosine(0)
        ... except cspd.CspdError as error:
        ...     print(type(error).__name__)
        InvalidInput
    """


class BackendUnavailable(CspdError, RuntimeError):
    """The requested backend cannot run this call on this machine. The message says why.

    Example:
        >>> import cspd
        >>> from cspd.demo.pair import load_pair
        >>> model, _ = load_pair()
        >>> try:
        ...     model = cspd.patch(model, backend="cuda")
        ... except cspd.BackendUnavailable:
        ...     model = cspd.patch(model)  # by the fastest backend that is there
        >>> cspd.is_patched(model)
        True
    """


class CallError(CspdError, RuntimeError):
    """The arguments are valid, but the call cannot be made now, or its arithmetic overflowed.

    Example:
        >>> import cspd
        >>> from cspd.demo.pair import load_pair
        >>> target, draft = load_pair()
        >>> try:
        ...     cspd.SpecDecodeRunner(draft, target).stats
        ... except cspd.errors.CallError:
        ...     print("there are none before a run")
        there are none before a run
    """


class MissingPackage(CspdError, RuntimeError):
    """An optional package is not installed. The message says what installs it.

    Example:
        >>> import cspd
        >>> try:
        ...     vae = cspd.load_vae("no such file")
        ... except (cspd.errors.MissingPackage, FileNotFoundError):
        ...     print("install diffusers, or give another file")
        install diffusers, or give another file
    """


class InvalidInput(CspdError, ValueError):
    """An argument or an environment variable has a bad value. The message says what was expected.

    Example:
        >>> import cspd
        >>> from cspd_kernels import Schedule
        >>> try:
        ...     Schedule.linear(5).ddim(eta=2.0)
        ... except cspd.InvalidInput as error:
        ...     print(error)
        Schedule.ddim expected eta in [0, 1], got 2.0
    """


class WrongType(InvalidInput, TypeError):
    """An argument has the wrong type.

    Example:
        >>> import cspd
        >>> try:
        ...     cspd.samplers.register("mine")
        ... except cspd.errors.WrongType as error:
        ...     print(error)
        register expected an Adapter, got str
    """


class WrongDtype(WrongType):
    """The dtype is unknown, or not accepted here. The message lists the accepted dtypes.

    Example:
        >>> import cspd
        >>> try:
        ...     cspd.load_vae("kl16.ckpt", dtype="int8")
        ... except cspd.WrongDtype as error:
        ...     print(error)
        load_vae expected dtype as float32, bfloat16 (or fp32, float, bf16), got 'int8'
    """


class UnsupportedModel(CspdError, ValueError):
    """A model or its head computes something that the kernels do not cover.

    Example:
        >>> import cspd, torch
        >>> try:
        ...     model = cspd.patch(torch.nn.Linear(2, 2))
        ... except cspd.UnsupportedModel:
        ...     print("nothing to patch")
        nothing to patch
    """


class NotAModel(UnsupportedModel, TypeError):
    """The object is not such a model, head or diffusion object at all. The message says what it lacks.

    Example:
        >>> import cspd
        >>> try:
        ...     cspd.patch("a path")
        ... except cspd.errors.NotAModel:
        ...     print("load the model first")
        load the model first
    """


class CheckpointError(CspdError, ValueError):
    """A checkpoint file is damaged, or does not hold the requested weights.

    Example:
        >>> import cspd, pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "mar.pth"
        ...     count = path.write_bytes(b"no weights")
        ...     try:
        ...         cspd.load_mar(path)
        ...     except cspd.CheckpointError:
        ...         print("damaged")
        damaged
    """
