"""Statistics of Stable-Baselines3's ``VecNormalize``, read from its pickle without running it."""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
import pickletools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from gymnasium import spaces

from mpd_gym.errors import CheckpointError
from mpd_gym.types import Array, Observation
from mpd_gym.validation import observation_arrays

__all__ = [
    "ObservationStatistics",
    "read_vecnormalize",
    "trained_normalized",
    "warn_normalized",
]

FLOAT32 = np.dtype(np.float32)
MALFORMED = (
    ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError,
    pickle.UnpicklingError,
)  # fmt: skip


@final
@dataclass(frozen=True)
class ObservationStatistics:
    """Normalises observations as ``VecNormalize`` did at the end of a training.

    Attributes:
        moments: Mean and standard deviation of each normalised part of an observation, by key;
            ``""`` for an observation that is no Dict.
        clip: Largest absolute value of what it returns.
        digest: SHA-256 of the file.
    """

    moments: Mapping[str, tuple[Array, Array]]
    clip: float
    digest: str

    def __call__(self, observation: Observation) -> Observation:
        """Normalise one observation or a batch; leave what does not fit, to be refused."""
        parts = observation_arrays(observation)
        for key, (mean, deviation) in self.moments.items():
            if key in parts and np.shape(parts[key])[-mean.ndim :] == mean.shape:
                clipped = np.clip((parts[key] - mean) / deviation, -self.clip, self.clip)
                parts[key] = clipped.astype(np.float32)
        return parts if isinstance(observation, Mapping) else parts[""]


def read_vecnormalize(
    file: Path, space: spaces.Space[Any], max_bytes: int
) -> ObservationStatistics:
    """Read what ``VecNormalize.save`` wrote; code in the file does not run.

    Args:
        file: The file, a pickle.
        space: Observations of the policy.
        max_bytes: Largest size of the file.

    Raises:
        CheckpointError: If the file is missing, too large, damaged or of another kind, or the
            statistics do not fit `space`.
    """
    if not file.is_file() or file.stat().st_size > max_bytes:
        raise CheckpointError(f"{file}: no such file of at most {max_bytes} bytes; check the path")
    content, boxes = file.read_bytes(), _by_key(space)
    try:
        found = _inert(content)
        if type(found).__name__ != "VecNormalize":
            raise ValueError(f"it holds {type(found).__name__}")
        fields, moments = found.state, {}
        running = _by_key(fields["obs_rms"]) if fields["norm_obs"] else {}
        for key in running and (fields.get("norm_obs_keys") or running):
            mean, variance = (_array(running[key].state[name]) for name in ("mean", "var"))
            with np.errstate(invalid="ignore"):  # the check below refuses negative ones
                moments[key] = mean, np.sqrt(variance + fields["epsilon"])
            if not all(one.shape == boxes[key].shape for one in moments[key]):
                raise ValueError(f"statistics of shape {mean.shape} for {key!r} {boxes[key]}")
            if not all(np.isfinite(one).all() for one in moments[key]):
                raise ValueError(f"statistics of {key!r} that are not finite")
        clip = float(fields["clip_obs"])
    except MALFORMED as error:
        raise CheckpointError(
            f"{file}: damaged, or not what VecNormalize.save wrote ({str(error)[:99]}); give the "
            "file that was saved with the policy"
        ) from error
    return ObservationStatistics(moments, clip, hashlib.sha256(content).hexdigest())


def trained_normalized(fields: Mapping[str, Any], space: spaces.Space[Any]) -> bool:
    """Whether a model's last observations show that ``VecNormalize`` made them.

    It makes float32 of any type, and may leave the space's bounds. Algorithms that keep no replay
    buffer store the original observations beside them only if there is a ``VecNormalize``.

    Args:
        fields: JSON fields of its zip, or its attributes.
        space: Observations of the policy.
    """
    last, original = (_stored(fields.get(name)) for name in ("_last_obs", "_last_original_obs"))
    for key, box in _by_key(space).items():
        values, before = last.get(key), original.get(key)
        if values is None or (values.dtype, values.shape[1:]) != (FLOAT32, box.shape):
            continue
        if before is not None and ("gae_lambda" in fields or before.dtype == np.float64):
            return True
        if ((values < box.low - 1e-4) | (values > box.high + 1e-4)).any():
            return True
    return False


def warn_normalized(policy: Any) -> None:
    """Warn of a model of Stable-Baselines3 that was trained under a ``VecNormalize``."""
    if not hasattr(policy, "get_vec_normalize_env"):
        return
    wrapper = policy.get_vec_normalize_env()
    if wrapper.norm_obs if wrapper else trained_normalized(vars(policy), policy.observation_space):
        warnings.warn(
            "policy: was trained under VecNormalize and acts wrongly without its statistics; give "
            "SB3Policy(model.policy, statistics=wrapper.normalize_obs), with that wrapper",
            stacklevel=3,
        )


def _stored(field: Any) -> dict[str, Array]:
    """Arrays of an attribute, or of a pickled field, by key; none where it holds something else."""
    try:
        if isinstance(field, Mapping) and ":serialized:" in field:
            field = _inert(base64.b64decode(field[":serialized:"]))
        return {
            key: part if isinstance(part, np.ndarray) else _array(part)
            for key, part in _by_key(field).items()
        }
    except MALFORMED:
        return {}


def _by_key(parts: Any) -> Mapping[str, Any]:
    """The parts of a mapping or a Dict space by their keys; what has no parts under ``""``."""
    parts = parts.spaces if isinstance(parts, spaces.Dict) else parts
    return parts if isinstance(parts, Mapping) and parts else {"": parts}


class _Inert(dict[Any, Any]):
    """Stands for what a pickle imports: notes arguments, state and entries, and runs nothing."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Inert:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Inert]:
        return type(name, (_Inert,), {})


def _inert(content: bytes) -> Any:
    """Unpickle with stand-ins for all classes and functions."""
    for opcode, value, _ in pickletools.genops(content):
        if opcode.name.endswith("PUT") and int(value or 0) > len(content):
            raise ValueError(f"memory for {value} objects is asked for")
    return _Reader(io.BytesIO(content)).load()


def _array(made: Any) -> Array:
    """A NumPy array of numbers, from the arguments that would make it."""
    if type(made).__name__ == "_reconstruct":
        _, shape, dtype, fortran, content = made.state
    else:  # _frombuffer, of protocol 5, which is the default from Python 3.14 on
        content, dtype, shape, order = made.args
        fortran = order == "F"
    kind = dtype.args[0]
    if kind[0] not in "fiub":
        raise ValueError(f"an array of {kind}")
    values = np.frombuffer(content, np.dtype(dtype.state[1] + kind))
    return values.reshape(shape, order="F" if fortran else "C")
