"""The state of a training at one step, and its checkpoint files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mpd_gym.atomic import check_writable, lock_file, sync_directory
from mpd_gym.checkpoint import load_file, load_into, save_file
from mpd_gym.errors import MALFORMED, CheckpointError, ConfigError, InputError, TrainingError
from mpd_gym.training.config import (
    TrainingConfig,
    averaging_rate,
    check_continues,
    check_equal,
    learning_rate_factor,
)
from mpd_gym.training.flat import FlatParameters
from mpd_gym.training.log import Log

__all__ = ["Checkpoints", "LossFunction", "Sampler", "TrainingState", "to_tensors"]

# (module, batch of tensors, noise) -> scalars to log; "loss" is minimised.
LossFunction = Callable[[nn.Module, Any, torch.Generator], Mapping[str, Tensor]]
# (batch size, random numbers) -> NumPy arrays in a dataclass or mapping.
Sampler = Callable[[int, np.random.Generator], Any]

_KIND = "training"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SMALL = 1e-6  # keeps the clipping of a gradient of zeros finite, as torch does
_MAX_BYTES = 64 * 2**30  # weights, average and two moments: four times the module


@final
class TrainingState:
    """Everything that a training consists of at one step; checkpoints hold all of it.

    Args:
        module: Trained in place; moved to `device`.
        config: Settings of the training.
        device: Device of module, batches and noise.
        identity: JSON values that a resumed training must share, such as the data set's name.

    Attributes:
        step: Optimisation steps done.
        seconds: Duration of these steps, in all sessions.
        log: Log of the training loss.
        validation_log: Log of the validations.

    Raises:
        InputError: If `module` has nothing to train, or `identity` is not JSON.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        device: torch.device,
        identity: Mapping[str, Any],
    ) -> None:
        self._identity = _as_json(identity)
        self._module = module.to(device).train()
        self._config, self._device = config, device
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise InputError("module has no parameter that requires a gradient; nothing to train")
        self._flat = FlatParameters(self._parameters)
        self._average_vector = self._flat.values.detach().clone()
        self._average = self._flat.views(self._average_vector)
        self._optimizer = torch.optim.AdamW(
            [self._flat.values],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self._rng, self._noise = _random_numbers(config.seed, 0, device)
        self.step, self.seconds = 0, 0.0
        self._parts: tuple[str, ...] = ()  # names of the loss and its parts, once known
        self.log, self.validation_log = Log("training"), Log("validation")
        self._schedule = self._scheduler()

    def advance(self, loss_fn: LossFunction, sampler: Sampler) -> None:
        """Take one optimisation step, without waiting for the device.

        Raises:
            InputError: If `loss_fn` returns no ``"loss"``, or a part that is no scalar.
        """
        flat = self._flat
        batch = to_tensors(sampler(self._config.batch_size, self._rng), self._device)
        parts = self._loss(loss_fn, batch, self._noise)
        flat.gather(parts["loss"])
        norm = torch.linalg.vector_norm(flat.gradients)
        if self._config.gradient_clip is not None:
            flat.gradients.mul_((self._config.gradient_clip / (norm + _SMALL)).clamp_(max=1.0))
        self._optimizer.step()
        self._schedule.step()
        logged = {name: part.detach() for name, part in parts.items()}
        self.log.add(logged | {"gradient_norm": norm})
        self.step += 1
        if self.step % self._config.ema_every == 0:
            rate = averaging_rate(self._config, self.step // self._config.ema_every - 1)
            self._average_vector.lerp_(flat.values.detach(), rate)

    def validate(self, loss_fn: LossFunction, sampler: Sampler) -> None:
        """Log the averaged weights' loss, on the same batches and noise every time."""
        rng, noise = _random_numbers(self._config.seed, 1, self._device)
        with self._averaged(), torch.no_grad():
            for _ in range(self._config.validation_batches):
                batch = to_tensors(sampler(self._config.batch_size, rng), self._device)
                self.validation_log.add(self._loss(loss_fn, batch, noise))

    def finish(self) -> dict[str, Tensor]:
        """Leave the averaged weights in the module, in evaluation mode, and return a copy.

        Raises:
            TrainingError: If they are not finite.
        """
        for name, tensor in self._average.items():
            if not torch.isfinite(tensor).all():
                raise TrainingError(f"the average of '{name}' is not finite at step {self.step}")
            self._parameters[name].data.copy_(tensor)
        self._module.eval()
        return {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self._module.state_dict().items()
        }

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: weights, their average and two moments."""
        return 4 * sum(int(tensor.nbytes) for tensor in self._module.state_dict().values())

    def release(self) -> None:
        """Give the module's parameters their own memory again; this ends the training."""
        self._flat.release()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint.

        Raises:
            TrainingError: If the training has become non-finite.
        """
        groups = {"weights": self._module.state_dict(), "average": self._average}
        groups |= {f"adam/{name}": moments for name, moments in self._moments().items()}
        for log in (self.log, self.validation_log):
            groups[f"log/{log.split}"] = log.tensors(self.step)
        named = {f"{group}/{name}": t for group, part in groups.items() for name, t in part.items()}
        return {"noise": self._noise.get_state(), **named}

    def header(self) -> dict[str, Any]:
        """Return the header of a checkpoint."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "config": dataclasses.asdict(self._config),
            "identity": self._identity,
            "device": self._device.type,
            "rng": self._rng.bit_generator.state,
            "names": {"training": self.log.names, "validation": self.validation_log.names},
        }

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: str) -> None:
        """Continue from the checkpoint at `path`.

        Raises:
            ConfigError: If it belongs to another training; names the different field.
            CheckpointError: If it belongs to another module, or its header is damaged.
        """
        try:
            self._restore(tensors, header, path)
        except (CheckpointError, ConfigError):
            raise
        except (RuntimeError, *MALFORMED) as error:  # RuntimeError: PyTorch's of sizes
            raise CheckpointError(
                f"{path}: its header does not describe a training ({type(error).__name__}: "
                f"{error!s:.300}); start again with resume=False"
            ) from error

    def _restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: str) -> None:
        check_continues(self._config, header["config"], header["step"], path)
        check_equal("identity", self._identity, header["identity"], path)
        check_equal("device", self._device.type, header["device"], path)
        load_into(self._module, tensors, "weights/", source=path)
        load_into(self._average, tensors, "average/", source=path)
        self._restore_moments(tensors)
        self._noise.set_state(tensors["noise"])
        self._rng.bit_generator.state = header["rng"]
        self.step, self.seconds = int(header["step"]), float(header["seconds"])
        self._schedule = self._scheduler()
        for log in (self.log, self.validation_log):
            names, prefix = header["names"][log.split], f"log/{log.split}/"
            kept = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            log.restore(names, kept, self._device)
        self._parts = self.log.names[:-1]  # the last is the gradient's norm

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """Adam's state by parameter, so that files do not depend on the memory layout."""
        state = self._optimizer.state[self._flat.values]
        views = {key: self._flat.views(state[key]) for key in _MOMENTS}
        return {
            name: {"step": state["step"]} | {key: views[key][name] for key in _MOMENTS}
            for name in self._parameters
        }

    def _restore_moments(self, tensors: Mapping[str, Tensor]) -> None:
        state = {"step": tensors[f"adam/{next(iter(self._parameters))}/step"]}
        for key in _MOMENTS:
            moments = {name: tensors[f"adam/{name}/{key}"] for name in self._parameters}
            state[key] = self._flat.join(moments)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})

    def _scheduler(self) -> LambdaLR:
        factor = partial(learning_rate_factor, self._config)
        return LambdaLR(self._optimizer, factor, last_epoch=self.step - 1)

    def _loss(
        self, loss_fn: LossFunction, batch: Any, noise: torch.Generator
    ) -> Mapping[str, Tensor]:
        bf16 = self._config.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            parts = loss_fn(self._module, batch, noise)
        if tuple(parts) != self._parts:
            self._begin(parts)
        return parts

    def _begin(self, parts: Mapping[str, Tensor]) -> None:
        """Check the first loss of a training; the names of later ones must be equal."""
        if self._parts:
            raise InputError(f"loss_fn returned {list(parts)}; before it was {list(self._parts)}")
        if "loss" not in parts:
            raise InputError(f"loss_fn must return a 'loss' to minimise; got {list(parts)}")
        for name, value in parts.items():
            if not isinstance(value, Tensor) or value.ndim:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"loss_fn's '{name}' must be a scalar tensor; got {got}")
        self._parts = tuple(parts)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights into the module, in evaluation mode, inside the block."""
        modes = {module: module.training for module in self._module.modules()}
        self._module.eval()
        self._swap()
        try:
            yield
        finally:
            self._swap()
            for module, mode in modes.items():
                module.training = mode

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self._average[name] = self._average[name], parameter.data


@final
class Checkpoints:
    """The newest checkpoint of a training and its predecessor, in one folder.

    A new checkpoint is complete on disk before the others are renamed, so at least one loads after
    kill −9 at any moment.

    Args:
        folder: Folder of the files; created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._newest = folder / "checkpoint.safetensors"
        self._previous = folder / "previous.safetensors"
        self._next = folder / "next.safetensors"
        self.summary = "no checkpoint was written"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other trainings out of the folder during the block.

        Raises:
            ConfigError: If another one is in it.
            FileError: If the folder cannot be written to.
        """
        folder = self._newest.parent
        taken = f"{folder}: another training is in this folder"
        remedy = "wait for it, or choose another name or directory"
        with lock_file(folder / "lock", f"{taken}; {remedy}") as lock:
            try:
                yield
            finally:
                if os.name == "posix":  # while it is locked, so that it is nobody else's
                    Path(lock.name).unlink(missing_ok=True)

    def begin(self, state: TrainingState, *, resume: bool) -> None:
        """Restore `state` from the newest checkpoint, if any; without `resume` delete them all.

        Raises:
            FileError: If the disk has no room for a checkpoint.
            CheckpointError: If the newest is damaged or belongs to another module.
            ConfigError: If it belongs to another training.
        """
        self._next.unlink(missing_ok=True)  # from a killed process
        if not resume:
            self._newest.unlink(missing_ok=True)
            self._previous.unlink(missing_ok=True)
        check_writable(self._newest.parent, state.checkpoint_bytes)
        if not resume:
            return
        path = self._newest if self._newest.exists() else self._previous
        if path.exists():
            state.restore(*self._load(path), str(path))
            self._describe(path, state)

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            return load_file(path, kind=_KIND, max_bytes=_MAX_BYTES)
        except CheckpointError as error:
            other = "start again" if path == self._previous else f"continue from {self._previous}"
            raise CheckpointError(f"{error}; or remove it to {other}") from None

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint of `state`.

        Raises:
            TrainingError: If the training has become non-finite; nothing is written.
            CheckpointError: If the disk refuses; the earlier checkpoints stay.
        """
        try:
            save_file(self._next, state.tensors(), state.header(), kind=_KIND)
        except InputError as error:  # weights or moments overflowed, but not the loss
            raise TrainingError(f"{error} (step {state.step})") from error
        except CheckpointError as error:
            raise CheckpointError(f"step {state.step:,}: {error}; {self.summary}") from error
        if self._newest.exists():
            os.replace(self._newest, self._previous)
        os.replace(self._next, self._newest)
        sync_directory(self._newest.parent)
        self._describe(self._newest, state)

    def _describe(self, path: Path, state: TrainingState) -> None:
        self.summary = f"the last checkpoint is {path} at step {state.step:,}"


def to_tensors(batch: Any, device: torch.device) -> Any:
    """Turn the NumPy arrays of a batch into tensors on `device`, sharing memory on the CPU.

    Args:
        batch: Arrays and tensors in mappings and dataclasses of any depth; other values do not
            change.
        device: Target; copies to a GPU use pinned memory and do not wait.

    Returns:
        The same structure with tensors; a mapping becomes a dict.
    """
    if isinstance(batch, np.ndarray):
        tensor = torch.from_numpy(batch if batch.flags.writeable else batch.copy())
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_tensors(value, device) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch)]
        converted = {name: to_tensors(getattr(batch, name), device) for name in fields}
        return dataclasses.replace(batch, **converted)
    return batch


def _random_numbers(
    seed: int, stream: int, device: torch.device
) -> tuple[np.random.Generator, torch.Generator]:
    """Generators for batches and for noise, independent between streams."""
    batches, noise = np.random.SeedSequence([seed, stream]).spawn(2)
    generator = torch.Generator(device).manual_seed(int(noise.generate_state(1, np.uint64)[0]))
    return np.random.default_rng(batches), generator


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"identity must hold finite JSON values: {error}") from None
    return copy
