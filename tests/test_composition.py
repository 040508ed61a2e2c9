"""Compositions against steps computed by hand in NumPy, and against stored numbers.

After a change that is meant to alter the numbers, write them anew with
``python tests/test_composition.py``.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_gaussian import (
    COVARIANCE,
    DYNAMICS,
    NU,
    NX,
    PLANNER,
    SCHEDULE,
    D,
    by_hand,
    exact,
    hand_move,
    hand_step,
    linear,
    parts,
    waves,
)
from torch import Tensor

from mpd_gym.diffusion.composition import (
    COMPOSITIONS,
    PLANNER_COMPOSITIONS,
    Composition,
    Parts,
    alternating,
    alternating_matched,
    alternating_resampled,
    combined_score,
    compose,
    planner_only,
)
from mpd_gym.diffusion.guidance import guided
from mpd_gym.diffusion.samplers import (
    Move,
    ddim_move,
    ddpm_posterior,
    make_move,
    multistep,
    sample,
    start_noise,
    with_history,
)
from mpd_gym.diffusion.schedule import make_schedule
from mpd_gym.errors import ConfigError
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.types import Array, Step

GOLDEN = Path(__file__).parent / "golden" / "compositions.json"


@pytest.mark.parametrize("name", sorted(COMPOSITIONS))
@pytest.mark.parametrize("eta", [None, 0.0, 0.6])
def test_one_step_equals_the_step_by_hand(name: str, eta: float | None) -> None:
    move = ddpm_posterior if eta is None else functools.partial(ddim_move, eta=eta)
    levels = [(12, 11), (7, 6), (7, 2), (1, 0), (4, 0)]
    for (k, k_next), temperature in itertools.product(levels, (1.0, 0.3)):
        step = compose(name, parts(move, temperature), dynamics_weight=0.7)
        trajectory, *draws = waves(3)
        stream = iter([torch.from_numpy(wave) for wave in draws])
        found = step(torch.from_numpy(trajectory), k, k_next, stream.__next__)
        expected = hand_step(
            name, trajectory, k, k_next, draws, eta=eta, temperature=temperature, weight=0.7
        )
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
        assert len(list(stream)) == len(draws)  # as many draws as by hand


def test_the_dynamics_model_sees_noisy_states_and_actions() -> None:
    seen = []

    def dynamics(trajectory: Tensor, k: int) -> Tensor:
        seen.append((trajectory, k))
        return trajectory[..., :NX]

    start = torch.from_numpy(waves(1)[0])
    for build in (alternating, alternating_matched, alternating_resampled, combined_score):
        build(Parts(linear(PLANNER, D), dynamics, SCHEDULE, NX))(
            start, 5, 4, lambda: torch.zeros_like(start)
        )
        trajectory, k = seen.pop()
        assert torch.equal(trajectory, start) and k == 5


@pytest.mark.parametrize("move", [ddpm_posterior, make_move("ddim")])
def test_the_weights_of_the_combined_score_have_their_ends(move: Move) -> None:
    trajectory, *draws = (torch.from_numpy(wave) for wave in waves(2))

    def moved(step: Step) -> Tensor:
        return step(trajectory, 8, 5, lambda: draws[0])

    none, half, full = (moved(combined_score(parts(move), weight)) for weight in (0.0, 0.5, 1.0))
    assert torch.equal(none, moved(planner_only(parts(move))))
    torch.testing.assert_close(half, (none + full) / 2)
    # weight 1: states by the dynamics model, with their noise; actions by the planner
    clean = linear(DYNAMICS, NX)(trajectory, 8)
    mean, std = move(trajectory[..., :NX], clean, 8, 5, SCHEDULE)
    torch.testing.assert_close(full[..., :NX], mean + std * draws[0][..., :NX])
    assert torch.equal(full[..., NX:], none[..., NX:])


# --- Compositions of exact denoisers of Gaussian data ---------------------------------------------


def seen_by_the_planner(build: Composition, k: int) -> Array:
    """Exact covariance of what the planner sees when τ^k has the data's distribution."""
    schedule = make_schedule("cosine", 100)
    inputs = []

    def planner(trajectory: Tensor, level: int) -> Tensor:
        inputs.append(trajectory)
        return exact(schedule, D)(trajectory, level)

    step = build(Parts(planner, exact(schedule, NX), schedule, NX))
    kept = schedule.alphas_bar[k]
    root = np.linalg.cholesky(kept * COVARIANCE + (1 - kept) * np.eye(3))
    start = torch.zeros(6, 1, D, dtype=torch.float64)
    start[:3, 0] = torch.from_numpy(root.T)  # the rows of a square root, then one for each noise
    noise = torch.zeros_like(start)
    noise[3:, 0] = torch.eye(3)
    step(start, k, k - 1, lambda: noise)
    rows = inputs[0][:, 0].numpy()
    covariance: Array = rows.T @ rows
    return covariance


def test_resampled_states_reach_the_planner_at_its_level() -> None:
    schedule = make_schedule("cosine", 100)
    for k in (30, 70, 95):
        kept = schedule.alphas_bar[k]
        truth = kept * COVARIANCE + (1 - kept) * np.eye(3)
        wrong = {
            build.__name__: np.linalg.norm(seen_by_the_planner(build, k) - truth)
            for build in (alternating, alternating_matched, alternating_resampled)
        }
        assert wrong["alternating_resampled"] < 0.1 * wrong["alternating_matched"]
        assert wrong["alternating_matched"] < 0.9 * wrong["alternating"]


class Impulses:
    """Noise of which each entry is one in a single row: one run yields exact covariances."""

    def __init__(self, draws: int) -> None:
        self.rows, self.used = D * draws, 0

    def __call__(self) -> Tensor:
        noise = torch.zeros(self.rows, 1, D, dtype=torch.float64)
        noise[D * self.used : D * (self.used + 1), 0] = torch.eye(D)
        self.used += 1
        return noise


@pytest.mark.parametrize(
    ("name", "move", "low", "high"),
    [
        ("planner_only", ddpm_posterior, 0.95, 1.0),
        ("alternating", ddpm_posterior, 0.35, 0.55),
        ("alternating_matched", ddpm_posterior, 0.6, 0.75),
        ("alternating_matched", make_move("ddim"), 0.95, 1.0),
        ("alternating_resampled", ddpm_posterior, 0.95, 1.0),
        ("alternating_resampled", make_move("ddim"), 0.95, 1.0),
        ("combined_score", ddpm_posterior, 0.95, 1.0),
    ],
)
def test_the_literal_alternation_narrows_and_the_others_keep_the_distribution(
    name: str, move: Move, low: float, high: float
) -> None:
    schedule = make_schedule("cosine", 200)
    step = compose(name, Parts(exact(schedule, D), exact(schedule, NX), schedule, NX, move))
    noise = Impulses(2 * 200)
    rows = sample(step, start_noise(noise), schedule.levels(), noise)[:, 0].numpy()
    states = (rows.T @ rows).diagonal()[:NX] / COVARIANCE.diagonal()[:NX]
    assert (states > low).all() and (states < high).all(), states


@pytest.mark.parametrize("name", sorted(COMPOSITIONS))
def test_batched_plans_of_networks_equal_single_ones(name: str) -> None:
    torch.manual_seed(0)
    networks = [
        TrajectoryDenoiser(
            DenoiserConfig(NX, NU, 4, output, (("goal", 2),), unet=UnetConfig(8, (1, 2), groups=4))
        )
        for output in ("trajectory", "observations")
    ]
    generator = torch.Generator().manual_seed(0)
    initial, goals = torch.randn(2, 3, 2, generator=generator)
    draws = torch.randn(30, 3, 2, 4, D, generator=generator)  # two candidates each

    def plan(environments: slice) -> Tensor:
        stream = iter(draws[:, environments].flatten(1, 2))
        levels = SCHEDULE.levels(6)
        planner, dynamics = (
            guided(
                network,
                SCHEDULE,
                initial[environments],
                goals[environments],
                torch.ones(3, 1)[environments],
                2.0,
                levels=levels,
            )
            for network in networks
        )
        step = compose(name, Parts(planner, dynamics, SCHEDULE, NX))
        return sample(step, start_noise(stream.__next__), levels, stream.__next__)

    together = plan(slice(None))
    assert together.shape == (6, 4, D) and together.isfinite().all()
    single = torch.cat([plan(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_combining_equal_scores_changes_nothing(weight: float) -> None:
    same = Parts(exact(SCHEDULE, D), exact(SCHEDULE, NX), SCHEDULE, NX)
    start, *draws = (torch.from_numpy(wave) for wave in waves(13))
    found = [
        sample(step, start, SCHEDULE.levels(), iter(draws).__next__)
        for step in (planner_only(same), combined_score(same, weight))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


# --- DPM-Solver++ ---------------------------------------------------------------------------------


def multistep_by_hand(trajectory: Array, levels: tuple[int, ...], draws: list[Array]) -> Array:
    """`alternating_matched` with a history of each denoiser, in NumPy."""
    ratios = {
        k: 0.5 * np.log(SCHEDULE.alphas_bar[k] / (1 - SCHEDULE.alphas_bar[k])) for k in levels
    }
    last: dict[int, Array] = {}
    for index, (k, k_next) in enumerate(zip(levels, (*levels[1:], 0), strict=True)):

        def extrapolated(
            columns: int, clean: Array, index: int = index, k: int = k, k_next: int = k_next
        ) -> Array:
            before, last[columns] = last.get(columns), clean
            if before is None or k_next == 0 or levels[index - 1] == 12:  # λ_12 < −3
                return clean
            factor = (ratios[k_next] - ratios[k]) / (ratios[k] - ratios[levels[index - 1]]) / 2
            return clean + factor * (clean - before)

        states = trajectory[..., :NX]
        clean = extrapolated(NX, by_hand(DYNAMICS, NX, trajectory, k))
        moved, _ = hand_move(states, clean, k, k_next, 0.0)
        alpha = SCHEDULE.alphas_bar[k] / SCHEDULE.alphas_bar[k_next]
        moved = alpha**0.5 * moved + (1 - alpha) ** 0.5 * draws.pop(0)[..., :NX]
        trajectory = np.concatenate([moved, trajectory[..., NX:]], axis=-1)
        clean = extrapolated(D, by_hand(PLANNER, D, trajectory, k))
        trajectory, _ = hand_move(trajectory, clean, k, k_next, 0.0)
    return trajectory


def multistep_parts(levels: tuple[int, ...]) -> Parts:
    planner, dynamics = (
        multistep(linear(weights, columns), levels, SCHEDULE)
        for weights, columns in ((PLANNER, D), (DYNAMICS, NX))
    )
    return Parts(planner, dynamics, SCHEDULE, NX, make_move("dpm++"))


@pytest.mark.parametrize("levels", [(12, 9, 5, 4, 1), (6, 3, 1), (4,)])
def test_each_denoiser_of_an_alternation_has_its_own_history(levels: tuple[int, ...]) -> None:
    start, *draws = waves(1 + len(levels))
    stream = iter(tuple(draws))
    found = sample(
        alternating_matched(multistep_parts(levels)),
        torch.from_numpy(start),
        levels,
        lambda: torch.from_numpy(next(stream)),
    )
    np.testing.assert_allclose(found, multistep_by_hand(start, levels, draws), rtol=1e-10)


def test_the_planners_history_goes_on_where_the_dynamics_model_stops() -> None:
    """At weight 1 and equal predictions, both halves of a pass are the planner's own."""
    levels = SCHEDULE.levels(5, spacing="log_snr")
    exact_parts = [
        Parts(
            multistep(exact(SCHEDULE, D), levels, SCHEDULE),
            multistep(exact(SCHEDULE, NX), levels, SCHEDULE),
            SCHEDULE,
            NX,
            make_move("dpm++"),
        )
        for _ in range(2)
    ]
    start = torch.from_numpy(waves(1)[0])
    steps = (
        planner_only(exact_parts[0]),
        compose("combined_score", exact_parts[1], dynamics_weight=1.0, dynamics_levels=(0.3, 1.0)),
    )
    found = [sample(step, start, levels, lambda: start) for step in steps]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


# --- Options --------------------------------------------------------------------------------------


def test_the_dynamics_model_can_act_at_part_of_the_levels() -> None:
    trajectory, *draws = (torch.from_numpy(wave) for wave in waves(2))
    whole, alone = alternating(parts()), planner_only(parts())
    for levels, inside in (((0.5, 1.0), range(7, 13)), ((0.0, 0.5), range(1, 7))):
        step = compose("alternating", parts(), dynamics_levels=levels)
        for k in range(1, 13):
            expected = whole if k in inside else alone
            found = step(trajectory, k, k - 1, lambda: draws[0])
            assert torch.equal(found, expected(trajectory, k, k - 1, lambda: draws[0]))


def test_compositions_run_without_a_dynamics_model_only_where_they_can() -> None:
    single = Parts(linear(PLANNER, D), None, SCHEDULE, NX)
    compose("planner_only", single)
    compose("combined_score", single, dynamics_weight=0.0)
    compose("planner_resampled", single)
    for name in set(COMPOSITIONS) - set(PLANNER_COMPOSITIONS):
        with pytest.raises(ConfigError, match="needs a dynamics model; got None"):
            compose(name, single)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("alternatin", {}, "Did you mean 'alternating'"),
        ("combined_score", {"dynamics_weight": 1.5}, r"weight: expected .*\[0, 1\]; got 1.5"),
        ("alternating", {"dynamics_levels": (0.5, 0.5)}, "dynamics_levels"),
        ("alternating", {"dynamics_levels": (-0.1, 0.5)}, "dynamics_levels"),
    ],
)
def test_composition_mistakes_are_named(name: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(name, parts(), **options)


# --- Stored numbers -------------------------------------------------------------------------------

SAMPLERS: dict[str, Move] = {
    "ddpm": make_move("ddpm"),
    "ddim": make_move("ddim"),
    "ddim_eta_0.5": make_move("ddim", 0.5),
    "dpm++": make_move("dpm++"),
    "dpm++_eta_1": make_move("dpm++", 1.0),
}


def golden_plan(name: str, sampler: str, num_steps: int) -> Tensor:
    """A whole reverse pass of linear denoisers at temperature 0.5."""
    stream = iter(waves(1 + 2 * num_steps, rows=1))

    def noise() -> Tensor:
        return torch.from_numpy(next(stream))

    kind = sampler.partition("_")[0]
    levels = SCHEDULE.levels(num_steps)
    planner, dynamics = (
        with_history(kind, linear(weights, columns), levels, SCHEDULE)
        for weights, columns in ((PLANNER, D), (DYNAMICS, NX))
    )
    step = compose(name, Parts(planner, dynamics, SCHEDULE, NX, SAMPLERS[sampler], 0.5))
    return sample(step, start_noise(noise, 0.5), levels, noise)


def golden_cases() -> dict[str, tuple[str, str, int]]:
    return {
        f"{name} {sampler} {steps} steps": (name, sampler, steps)
        for name in sorted(COMPOSITIONS)
        for sampler in SAMPLERS
        for steps in (12, 4)
    }


@pytest.mark.parametrize("name", sorted(COMPOSITIONS))
def test_plans_equal_the_stored_ones(name: str) -> None:
    stored = json.loads(GOLDEN.read_text())
    assert set(stored) == set(golden_cases())
    for case, arguments in golden_cases().items():
        if arguments[0] == name:
            found = golden_plan(*arguments)[0]
            np.testing.assert_allclose(found, stored[case], rtol=1e-9, atol=1e-12, err_msg=case)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    plans = {case: golden_plan(*given)[0].tolist() for case, given in golden_cases().items()}
    GOLDEN.write_text(json.dumps(plans, indent=1) + "\n")
