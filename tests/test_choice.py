"""Which backend computes a denoiser: the fastest that there is, of the weights of the moment."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_agent
from torch import Tensor
from unets import CAUSAL, CONFIGS, difference, inputs, network, relative

from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.diffusion import guided, make_schedule
from mpd_gym.errors import ConfigError
from mpd_gym.models import TrajectoryDenoiser
from mpd_gym.models.backends import choice
from mpd_gym.models.backends.choice import InferenceNetworks, max_relative_error, training_forward
from mpd_gym.models.backends.compiled import CompiledDenoiser
from mpd_gym.models.backends.cuda_graph import GraphedDenoiser
from mpd_gym.models.backends.library import compiled
from mpd_gym.models.backends.rounded import RoundedDenoiser

BF16_BOUND = 5e-2  # of the largest output
needs_compiled = pytest.mark.skipif(compiled() is None, reason="no compiled code")


def without_c(monkeypatch: pytest.MonkeyPatch, *, bf16: bool) -> None:
    """A machine for which nothing was compiled."""
    monkeypatch.setattr(choice, "compiled", lambda: None)
    monkeypatch.setattr(choice, "computes_bf16", lambda: bf16)


# --- which network ---------------------------------------------------------------------------


@needs_compiled
@pytest.mark.parametrize("name", ["laptop", "causal"])
def test_c_is_remade_after_each_change_of_the_weights(name: str) -> None:
    plain, networks = network(name), InferenceNetworks()

    def current() -> CompiledDenoiser:
        found = networks.get(plain, "fp32")
        assert isinstance(found, CompiledDenoiser)
        assert difference(plain, found, 1, 1) < 1e-5
        return found

    first = current()
    assert current() is first
    with torch.no_grad():
        plain.unet.head[3].bias += 1.0  # as an optimiser does
    second = current()
    plain.load_state_dict(network(name, seed=1).state_dict())
    third = current()
    plain.time_embedding[0].weight = torch.nn.Parameter(plain.time_embedding[0].weight * 2)
    assert len({first, second, third, current()}) == 4


def test_plain_precision_and_other_types_are_left_alone() -> None:
    networks, plain, double = InferenceNetworks(), network(), network().double()
    assert networks.get(plain, "plain") is plain
    assert networks.get(double, "fp32") is double


@pytest.mark.parametrize("name", ["laptop", "causal"])
def test_without_c_plain_pytorch_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_c(monkeypatch, bf16=True)
    plain = network(name)
    assert InferenceNetworks().get(plain, "fp32") is plain
    assert isinstance(InferenceNetworks().get(plain, "bf16"), RoundedDenoiser)
    assert training_forward(plain) is plain


def test_wrong_precisions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="precision: expected one of"):
        InferenceNetworks().get(network(), "fp16")
    without_c(monkeypatch, bf16=False)
    with pytest.raises(ConfigError, match="precision: this CPU does not compute in bfloat16"):
        InferenceNetworks().get(network(), "bf16")


@pytest.mark.parametrize("name", [*CONFIGS, *CAUSAL])
def test_in_bfloat16_without_c_it_stays_within_its_bound(name: str) -> None:
    plain = network(name)
    assert 1e-5 < difference(plain, RoundedDenoiser(plain), 2, 4) < BF16_BOUND


@pytest.mark.fault(
    "Machine", "compiled code that computes something else", "plain PyTorch, with a warning"
)
@needs_compiled
def test_c_that_departs_from_the_plain_network_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CompiledDenoiser.denoise
    monkeypatch.setattr(CompiledDenoiser, "denoise", lambda *args: 1.001 * real(*args))
    plain, networks = network(), InferenceNetworks()
    with pytest.warns(RuntimeWarning, match=r"departs from the plain one by 1\.0e-03"):
        assert networks.get(plain, "fp32") is plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        assert networks.get(plain, "fp32") is plain


@needs_compiled
def test_networks_that_are_not_finite_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, broken = network(), network()
    with torch.no_grad():
        broken.unet.head[3].bias += torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the agent has an error for it
        assert InferenceNetworks().get(broken, "fp32") is broken
    assert max_relative_error(plain, broken, 1) == float("inf")


def test_copies_and_files_hold_no_weights() -> None:
    plain, networks = network(), InferenceNetworks()
    networks.get(plain, "bf16" if choice.computes_bf16() else "fp32")
    assert len(pickle.dumps(networks)) < 1000
    assert len(pickle.dumps(copy.deepcopy(networks))) < 1000


@pytest.mark.parametrize("levels", [(20, 10, 1), (20,)])
@pytest.mark.parametrize(("guidance", "num_envs", "candidates"), [(2.0, 2, 3), (1.0, 1, 4)])
def test_guided_denoisers_agree(
    levels: tuple[int, ...], guidance: float, num_envs: int, candidates: int
) -> None:
    plain = network("dynamics")
    schedule = make_schedule("cosine", 20)
    rows = num_envs * candidates
    trajectory, (_, initial, conditions, present) = inputs(plain.config, num_envs, rows)
    bound = (initial, conditions, present, guidance)
    with torch.no_grad():
        for k in levels:
            expected, found = (
                guided(part, schedule, *bound, levels=levels, clip=None)(trajectory, k)
                for part in (plain, InferenceNetworks().get(plain, "fp32"))
            )
            assert relative(found, expected) < 1e-4  # of the largest: noise is divided by signal


# --- training ----------------------------------------------------------------------------------


@needs_compiled
def test_trainings_without_a_form_in_c_are_plain() -> None:
    plain = network()
    assert training_forward(plain) is not plain
    for other in (network("causal"), network().double()):
        assert training_forward(other) is other


# --- a GPU -------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-2), ("bf16", BF16_BOUND)])
def test_graphs_replay_with_new_inputs_new_shapes_and_new_weights(
    precision: str, bound: float
) -> None:
    plain, networks = network().cuda(), InferenceNetworks()

    def output(part: TrajectoryDenoiser | GraphedDenoiser, groups: int, rows: int) -> Tensor:
        trajectory, conditioning = inputs(plain.config, groups, rows)
        modulations = part.modulations(part.embed(*(value.cuda() for value in conditioning)))
        return part.denoise((trajectory + rows).cuda(), modulations)

    for groups, rows in ((2, 4), (2, 4), (1, 16), (2, 4)):
        graphed = networks.get(plain, precision)
        assert isinstance(graphed, GraphedDenoiser)
        with torch.no_grad():
            expected, found = (output(part, groups, rows) for part in (plain, graphed))
            assert float((found - expected).abs().max() / expected.abs().max()) < bound
            plain.unet.head[3].bias += 1.0


# --- agents ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent() -> MPDiffuserAgent:
    return tiny_agent()


def actions(agent: MPDiffuserAgent, **options: object) -> np.ndarray:
    plan = agent.with_options(**options).plan(np.zeros(2, np.float32), deterministic=True)
    return plan.actions


@pytest.mark.parametrize("num_candidates", [1, 6])
def test_agents_plan_the_same_in_either_precision(
    agent: MPDiffuserAgent, num_candidates: int
) -> None:
    options = {"num_candidates": num_candidates, "guidance_scale": 2.0}
    found, expected = (actions(agent, precision=one, **options) for one in ("fp32", "plain"))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bfloat16_plans_are_near(agent: MPDiffuserAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "computes_bf16", lambda: True)  # PyTorch does, if slowly
    plain = actions(agent, precision="plain", num_candidates=6)
    near = actions(agent, precision="bf16", num_candidates=6)
    assert 0 < np.abs(near - plain).max() < 0.2 * np.abs(plain).max()


def test_agents_plan_with_new_weights_after_a_change(agent: MPDiffuserAgent) -> None:
    other = copy.deepcopy(agent)
    before = actions(other)
    with torch.no_grad():
        for weight in other.models["planner"].parameters():
            weight *= 1.1
    after = actions(other)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, actions(other, precision="plain"), atol=1e-4)


def test_files_are_the_same_before_and_after_planning(
    agent: MPDiffuserAgent, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(agent)
    fresh.save(tmp_path / "fresh.safetensors")
    actions(fresh)
    fresh.save(tmp_path / "used.safetensors")
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("fresh", "used")]
    assert contents[0] == contents[1]
    loaded = MPDiffuserAgent.load(tmp_path / "used.safetensors", precision="plain")
    assert loaded.options == replace(fresh.options, precision="plain")
    np.testing.assert_allclose(actions(loaded), actions(fresh), atol=1e-4)
