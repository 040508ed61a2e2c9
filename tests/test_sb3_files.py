"""Zip files of Stable-Baselines3: read without their pickles, and what is refused in them."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

pytest.importorskip("stable_baselines3")

from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3

from mpd_gym.collect.sb3 import SB3Policy, load_sb3
from mpd_gym.errors import CheckpointError, ConfigError, InputError, MissingExtraError

# The safe way gives what the trusting way gives


def pictures(shape: tuple[int, ...] = (1, 36, 36)) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


UNIT = spaces.Box(-1.0, 1.0, (3,), np.float32)
SKEW = spaces.Box(np.float32([-1.0, 2.0]), np.float32([3.0, 2.5]))


class Blank(gym.Env[Any, Any]):
    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space


MODELS: dict[str, tuple[type[Any], Any, Any, dict[str, Any]]] = {
    "sac": (SAC, UNIT, SKEW, {}),
    "sac-deep": (
        SAC,
        UNIT,
        SKEW,
        {"net_arch": {"pi": [8, 9], "qf": [7]}, "activation_fn": torch.nn.Tanh, "n_critics": 3},
    ),
    "sac-linear": (SAC, UNIT, SKEW, {"net_arch": []}),
    "sac-sde": (SAC, UNIT, SKEW, {"use_sde": True, "clip_mean": 0.5, "use_expln": True}),
    "sac-image": (SAC, pictures((36, 36, 3)), SKEW, {"net_arch": [8]}),
    "sac-dict": (SAC, spaces.Dict(a=UNIT, b=pictures()), SKEW, {"net_arch": [8]}),
    "td3": (TD3, UNIT, SKEW, {"net_arch": [8, 5]}),
    "ddpg": (DDPG, UNIT, SKEW, {"net_arch": [8, 5]}),
    "dqn": (DQN, UNIT, spaces.Discrete(4), {}),
    "ppo": (PPO, UNIT, SKEW, {"net_arch": {"pi": [8, 9], "vf": [7]}}),
    "ppo-elu": (PPO, UNIT, SKEW, {"activation_fn": torch.nn.ELU, "log_std_init": -1.0}),
    "ppo-sde": (PPO, UNIT, SKEW, {"use_sde": True, "squash_output": True, "full_std": True}),
    "ppo-sde-reduced": (PPO, UNIT, SKEW, {"use_sde": True, "full_std": False}),
    "ppo-discrete": (PPO, UNIT, spaces.Discrete(4), {}),
    "ppo-image": (
        PPO,
        pictures(),
        SKEW,
        {"share_features_extractor": False, "features_extractor_kwargs": {"features_dim": 16}},
    ),
    "a2c": (A2C, UNIT, SKEW, {"net_arch": [8]}),
}


def new_model(name: str) -> Any:
    algorithm, observation_space, action_space, policy_kwargs = MODELS[name]
    kwargs: dict[str, Any] = {"policy": "MlpPolicy", "seed": 1, "device": "cpu"}
    if isinstance(observation_space, spaces.Dict):
        kwargs["policy"] = "MultiInputPolicy"
    elif len(observation_space.shape) == 3:
        kwargs["policy"] = "CnnPolicy"
    if algorithm in (PPO, A2C):
        kwargs["n_steps"] = 64
    else:
        kwargs["buffer_size"] = 10
    given = dict(policy_kwargs)
    if "use_sde" in given:
        kwargs["use_sde"] = given.pop("use_sde")
    env = Blank(observation_space, action_space)
    return algorithm(env=env, policy_kwargs=given, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a saved model by its name in `MODELS`; made once."""
    folder = tmp_path_factory.mktemp("models")

    def path_of(name: str) -> Path:
        path = folder / f"{name}.zip"
        if not path.exists():
            new_model(name).save(path)
        return path

    return path_of


def env_of(name: str) -> Any:
    return SimpleNamespace(observation_space=MODELS[name][1], action_space=MODELS[name][2])


@pytest.mark.parametrize("name", MODELS)
def test_the_safe_way_gives_the_same_actions(name: str, saved: Callable[[str], Path]) -> None:
    env = env_of(name)
    safe = load_sb3(saved(name), env, algorithm=name.split("-")[0])
    trusted = SB3Policy(MODELS[name][0].load(saved(name), device="cpu").policy)
    assert type(safe.policy) is type(trusted.policy) or "image" in name or "dict" in name
    env.observation_space.seed(0)
    for seed in range(5):
        observation = env.observation_space.sample()
        for deterministic in (True, False):
            safe.reseed(seed)
            trusted.reseed(seed)
            one, _ = safe.predict(observation, deterministic=deterministic)
            two, _ = trusted.predict(observation, deterministic=deterministic)
            np.testing.assert_array_equal(one, two)
            assert one in env.action_space


GOLDEN = {  # actions of sb3-contrib's own `predict` for the three observations below
    "tqc": [[0.4147303104400635], [0.5111298561096191], [0.980414628982544]],
    "trpo": [[-0.09535518288612366], [-0.18912404775619507], [-0.13057354092597961]],
}


@pytest.mark.fault("Policies", "policies of sb3-contrib's TQC and TRPO", "its own actions")
@pytest.mark.parametrize("name", GOLDEN)
def test_policies_of_sb3_contrib_give_its_actions(name: str) -> None:
    path = Path(__file__).parent / f"golden/{name}.zip"
    policy = load_sb3(path, "Pendulum-v1", algorithm=name)
    x = np.float32([[1, 0, 0], [0, 1, 2], [-0.6, 0.8, -5]])
    np.testing.assert_allclose(policy.predict(x, deterministic=True)[0], GOLDEN[name], rtol=1e-5)


def test_policies_draw_from_a_stream_of_their_own(saved: Callable[[str], Path]) -> None:
    policy = load_sb3(saved("sac"), env_of("sac"), seed=5)
    x = np.zeros((6, 3), np.float32)
    before = torch.get_rng_state()
    first = [policy.predict(x)[0] for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(np.unique(np.concatenate(first))) == 36
    torch.manual_seed(0)
    policy.reseed(5)
    copy = pickle.loads(pickle.dumps(policy))
    for other in (policy, copy):
        np.testing.assert_array_equal([other.predict(x)[0] for _ in range(3)], first)
    with pytest.raises(InputError, match="finite"):
        policy.predict(np.full(3, np.nan))
    with pytest.raises(ValueError, match="tuple"):
        policy.predict((np.zeros(3), {}))


def test_files_of_old_versions_load(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Before SB3 1.7 features had one name only, and `gym` spaces called their shape `shape`."""
    weights = {
        name: tensor
        for name, tensor in weights_of(saved("ppo-image")).items()
        if not name.startswith(("pi_features", "vf_features"))
    }
    fields = fields_of(saved("ppo-image"))
    fields["action_space"]["shape"] = fields["action_space"].pop("_shape")
    old = altered(
        saved("ppo-image"),
        tmp_path / "old.zip",
        policy__pth=packed(weights),
        data=json.dumps(fields).encode(),
    )
    picture = np.full((1, 36, 36), 90, np.uint8)
    env = env_of("ppo-image")
    expected, _ = load_sb3(saved("ppo-image"), env).predict(picture, deterministic=True)
    actual, _ = load_sb3(old, env).predict(picture, deterministic=True)
    np.testing.assert_array_equal(actual, expected)


# What is refused


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def altered(path: Path, target: Path, **entries: bytes) -> Path:
    """Copy of a zip with entries replaced; the first dot of their names is written ``__``."""
    given = {name.replace("__", "."): content for name, content in entries.items()}
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, given.get(name, source.read(name)))
    return target


def fields_of(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        fields: dict[str, Any] = json.loads(archive.read("data"))
        return fields


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(path) as archive:
        weights: dict[str, torch.Tensor] = torch.load(
            io.BytesIO(archive.read("policy.pth")), weights_only=True
        )
        return weights


def packed(weights: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


@pytest.mark.fault("Policies", "pickled code in an SB3 file", "not run")
def test_pickled_fields_do_not_run(saved: Callable[[str], Path], tmp_path: Path) -> None:
    import base64

    marker = tmp_path / "ran"
    text = base64.b64encode(pickle.dumps(Bomb(marker))).decode()
    fields = fields_of(saved("sac-deep"))
    for field in fields.values():
        if isinstance(field, dict) and ":serialized:" in field:
            field[":serialized:"] = text
    bad = altered(saved("sac-deep"), tmp_path / "bad.zip", data=json.dumps(fields).encode())
    policy = load_sb3(bad, env_of("sac-deep"))
    good = load_sb3(saved("sac-deep"), env_of("sac-deep"))
    x = np.ones(3, np.float32)
    np.testing.assert_array_equal(
        policy.predict(x, deterministic=True)[0], good.predict(x, deterministic=True)[0]
    )
    assert not marker.exists()
    with pytest.raises(Exception):  # noqa: B017  (what SB3 makes of the file does not matter)
        SAC.load(bad)
    assert marker.exists()  # the bomb was armed


@pytest.mark.fault("Policies", "pickled code among the weights of an SB3 file", "not run")
def test_pickles_among_the_weights_never_run(saved: Callable[[str], Path], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    weights: dict[str, Any] = dict(weights_of(saved("sac")))
    weights["actor.mu.bias"] = Bomb(marker)
    for content in (packed(weights), pickle.dumps(Bomb(marker))):
        bad = altered(saved("sac"), tmp_path / "bad.zip", policy__pth=content)
        with pytest.raises(CheckpointError, match="without running code"):
            load_sb3(bad, env_of("sac"))
    assert not marker.exists()
    torch.load(io.BytesIO(packed(weights)), weights_only=False)
    assert marker.exists()


@pytest.mark.fault("Policies", "SB3 files that are cut or foreign", "refused")
def test_truncated_and_foreign_files_are_refused(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    env, file = env_of("ppo"), tmp_path / "policy.zip"
    content = saved("ppo").read_bytes()
    with pytest.raises(CheckpointError, match="no such file"):
        load_sb3(file, env)
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"policy\.zip"):
            load_sb3(file, env)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(CheckpointError, match="expected an entry 'data'"):
        load_sb3(file, env)


@pytest.mark.fault("Policies", "flipped bytes in an SB3 file", "refused, or the same actions")
def test_no_flipped_byte_changes_an_action(saved: Callable[[str], Path], tmp_path: Path) -> None:
    env, file = env_of("ppo"), tmp_path / "policy.zip"
    content = saved("ppo").read_bytes()
    x = np.ones(3, np.float32)
    expected, _ = load_sb3(saved("ppo"), env).predict(x, deterministic=True)
    rng, refused = np.random.default_rng(0), 0
    for position in rng.integers(len(content), size=60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            action, _ = load_sb3(file, env).predict(x, deterministic=True)
        except CheckpointError:
            refused += 1
        else:  # a byte that is not read: another entry, a time stamp
            np.testing.assert_array_equal(action, expected)
    assert refused > 5


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"{", "not JSON"), (b"[]", "not a JSON object"), (b"[" * 100_000, "not JSON")],
)
def test_bad_json_is_refused(
    saved: Callable[[str], Path], tmp_path: Path, data: bytes, words: str
) -> None:
    bad = altered(saved("ppo"), tmp_path / "bad.zip", data=data)
    with pytest.raises(CheckpointError, match=words):
        load_sb3(bad, env_of("ppo"))


@pytest.mark.fault(
    "Policies", "an SB3 file whose archive claims huge sizes", "refused before memory is taken"
)
def test_sizes_are_checked_before_memory_is_taken(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    env, file = env_of("ppo"), tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(30_000_000))
        archive.writestr("policy.pth", b"")
    with pytest.raises(CheckpointError, match="30000000 bytes unpacked"):
        load_sb3(file, env, max_bytes=2**20)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(30_000_000))
    bad = altered(saved("ppo"), file, policy__pth=inner.getvalue())
    with pytest.raises(CheckpointError, match="tensors takes 30000000 bytes"):
        load_sb3(bad, env, max_bytes=2**20)


def broken_weights() -> dict[str, tuple[Callable[[dict[str, Any]], Any], str]]:
    mu = "actor.mu.bias"
    first = "actor.latent_pi.0.weight"

    def wide(w: dict[str, Any]) -> dict[str, Any]:
        return w | {first: torch.zeros(1).expand(10**9, 3), "actor.latent_pi.0.bias": w[mu]}

    return {
        "nan": (lambda w: w | {mu: w[mu] * np.nan}, "mu.bias.*NaN"),
        "dtype": (lambda w: w | {mu: w[mu].double()}, "mu.bias.*float64"),
        "shape": (lambda w: w | {mu: torch.zeros(3)}, "mu.bias"),
        "missing": (lambda w: {k: v for k, v in w.items() if k != mu}, "missing.*mu.bias"),
        "extra": (lambda w: w | {"actor.extra": w[mu]}, "not understood.*actor.extra"),
        "layer": (lambda w: w | {first: torch.zeros(256, 4)}, "reads 3 numbers"),
        "huge": (wide, "contiguous"),
        "sparse": (lambda w: w | {mu: w[mu].to_sparse()}, "dense"),
        "number": (lambda w: w | {mu: 1.0}, "dense"),
        "actor": (lambda w: {k: v for k, v in w.items() if k.startswith("actor")}, "critics"),
        "unknown": (lambda w: {"lstm.weight": w[mu]}, "belong to none of"),
        "list": (lambda w: [w[mu]], "belong to none of"),
    }


@pytest.mark.fault("Policies", "SB3 weights that do not fit their network", "refused")
@pytest.mark.parametrize("kind", broken_weights())
def test_weights_must_fit_the_network(
    saved: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    change, words = broken_weights()[kind]
    content = packed(change(dict(weights_of(saved("sac")))))
    bad = altered(saved("sac"), tmp_path / "bad.zip", policy__pth=content)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_sb3(bad, env_of("sac"))
    assert str(bad) in str(caught.value)


@pytest.mark.fault("Policies", "an SB3 policy with a network of another maker", "refused")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy_class": {"__module__": "sb3_contrib.crossq.policies"}}, "its own library"),
        ({"policy_kwargs": {"lstm_hidden_size": 3}}, "lstm_hidden_size"),
        ({"policy_kwargs": {"activation_fn": "<class 'evil.Relu'>"}}, "activation_fn"),
        ({"policy_kwargs": {"features_extractor_class": "<class 'evil.Net'>"}}, "features"),
        ({"policy_kwargs": {"normalize_images": "no"}}, "normalize_images"),
    ],
)
def test_networks_of_other_makers_are_refused(
    saved: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    data = json.dumps(fields_of(saved("sac")) | change).encode()
    bad = altered(saved("sac"), tmp_path / "bad.zip", data=data)
    with pytest.raises(CheckpointError, match=words):
        load_sb3(bad, env_of("sac"))


@pytest.mark.fault("Policies", "spaces in an SB3 file that are none or not supported", "refused")
@pytest.mark.parametrize(
    ("spaces_", "words"),
    [
        ({"observation_space": spaces.Box(-1, 1, (4,))}, r"observations of shape \(3,\)"),
        ({"action_space": spaces.Box(-1, 1, (1,))}, r"actions of shape \(2,\)"),
        ({"action_space": spaces.Box(-1, 1, (2,))}, r"actions with low \[-1\.  2\.\]"),
        ({"action_space": spaces.Discrete(2)}, "acts in"),
    ],
)
@pytest.mark.parametrize("name", ["sac", "td3"])
def test_wrong_spaces_are_refused(
    saved: Callable[[str], Path], name: str, spaces_: dict[str, Any], words: str
) -> None:
    env = SimpleNamespace(**(vars(env_of(name)) | spaces_))
    with pytest.raises(CheckpointError, match=words):
        load_sb3(saved(name), env)


def test_wrong_algorithm_and_arguments_are_refused(saved: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="expected a policy of ppo"):
        load_sb3(saved("sac"), env_of("sac"), algorithm="ppo")
    with pytest.raises(ConfigError, match="Nope-v0 cannot be made"):
        load_sb3(saved("sac"), "Nope-v0")
    with pytest.raises(ConfigError, match="algorithm"):
        load_sb3(saved("sac"), env_of("sac"), algorithm="sarsa")
    with pytest.raises(ConfigError, match="env_kwargs"):
        load_sb3(saved("sac"), env_of("sac"), env_kwargs={"g": 9.81})


def test_missing_extra_is_named(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved("sac")
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mpd-gym\[collect\]'"):
        load_sb3(path, env_of("sac"))
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.callbacks", None)
    monkeypatch.delitem(sys.modules, "mpd_gym.collect.sb3")
    with pytest.raises(MissingExtraError, match="collect"):
        import mpd_gym.collect.sb3  # noqa: F401
