"""What reaches an agent from outside: observations of any kind, memory, moving goals, functions."""

from __future__ import annotations

import multiprocessing
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import observations, pick

from mpd_gym import MPDiffuserAgent
from mpd_gym.boundary import decided
from mpd_gym.datasets.source import MemorySource
from mpd_gym.errors import ConfigError, InputError, PlanningError
from mpd_gym.rankers import custom, first
from mpd_gym.types import Array, Ranking

# --- observations ---------------------------------------------------------------------------------


@pytest.mark.fault(
    "Observations and actions",
    "tensors with gradients, in bfloat16, lists, integers, float16, read-only arrays",
    "the action of the same numbers",
)
def test_numbers_of_any_kind_give_the_same_action(lqr: MPDiffuserAgent) -> None:
    one = np.array([1.0, -2.0])
    expected, _ = lqr.predict(one, deterministic=True)
    fixed = one.copy()
    fixed.flags.writeable = False
    same = [
        torch.tensor(one, requires_grad=True),
        torch.tensor(one, dtype=torch.bfloat16),
        [1, -2],
        one.astype(np.int8),
        one.astype(np.float16),
        np.ma.masked_array(one),
        np.array([1, -2], object),
        fixed,
    ]
    for value in same:
        action, _ = lqr.predict(value, deterministic=True)
        np.testing.assert_array_equal(action, expected)


@pytest.mark.fault(
    "Observations and actions",
    "complex, masked or date arrays, numbers as text, huge integers, rows of unequal length",
    "refused; nothing is dropped",
)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([1 + 1j, 0]), "complex128"),
        (torch.tensor([1j, 0j]), "complex64"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "masked"),
        (np.array(["2020-01-01", "2021-01-01"], "datetime64[D]"), "datetime64"),
        (np.array([1, 2], "timedelta64[s]"), "timedelta64"),
        (["1", "2"], "<U1"),
        ([10**400, 0], "too large"),
        ([1.0, None], "row 0 holds NaN"),
        ([[1.0, 2.0], [1.0]], r"row 1: expected shape \(2,\)"),
        ([[1.0, 2.0], [1.0, "2"]], "row 1: expected numbers; got dtype"),
        ([[1.0, 2.0], [1.0, np.inf]], "row 1 holds NaN or infinity"),
    ],
)
def test_what_is_no_array_of_real_numbers_is_refused(
    lqr: MPDiffuserAgent, bad: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"observation.*{message}"):
        lqr.predict(bad)


@pytest.mark.fault("Observations and actions", "flags that are no flags", "refused")
@pytest.mark.parametrize("flags", [["no"], [np.nan], [2], [True, False], None])
def test_flags_are_true_or_false(lqr: MPDiffuserAgent, flags: Any) -> None:
    _, state = lqr.predict(np.ones(2))
    if flags is None:  # resets nothing
        assert lqr.predict(np.ones(2), state, None)[1].started.all()
        return
    with pytest.raises(InputError, match="episode_start"):
        lqr.predict(np.ones(2), state, flags)


@pytest.mark.fault(
    "Observations and actions", "a state of other sizes whose plans have the same shape", "refused"
)
def test_a_state_of_other_sizes_is_refused(lqr: MPDiffuserAgent) -> None:
    _, state = lqr.predict(np.ones(2))
    wide, flat = np.zeros((1, lqr.horizon, 2)), np.zeros((1, 1))
    with pytest.raises(InputError, match=r"its actions of shape .* another agent"):
        lqr.predict(np.ones(2), replace(state, actions=wide, observation=flat))
    with pytest.raises(InputError, match="its observation of shape"):
        lqr.predict(np.ones(2), replace(state, observation=flat))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.fault(
    "Observations and actions",
    "observations, actions and plans that the caller goes on to change",
    "later actions and costs are the same",
)
def test_nothing_of_the_callers_is_kept_and_nothing_of_ours_is_given(
    pendulum: MPDiffuserAgent,
) -> None:
    agent = pendulum.with_options(budget=5.0, action_chunk=4)
    agent.set_cost(lambda x, u, y: np.abs(x[..., 2]))
    rows = observations(agent, 2)

    def run(spoil: bool) -> list[Array]:
        found, state, given = [], None, rows.copy()
        for _ in range(5):
            action, state = agent.predict(given, state, deterministic=True)
            found += [action.copy(), state.budget.copy()]
            if spoil:
                planned = agent.planned(state)
                for array in (given, action, *planned):
                    array[:] = 7.0
                given = rows.copy()
        return found

    for clean, spoiled in zip(run(False), run(True), strict=True):
        np.testing.assert_array_equal(clean, spoiled)


# --- what is asked for changes --------------------------------------------------------------------


@pytest.mark.fault(
    "Observations and actions",
    "a goal that moves within an episode, in one row of a batch",
    "that row plans anew, from scratch",
)
@pytest.mark.parametrize("warm", [0, 3])
def test_a_goal_that_moves_makes_a_new_plan_of_its_row(car: MPDiffuserAgent, warm: int) -> None:
    agent = car.with_options(action_chunk=8, warm_start_steps=warm)
    batch = observations(agent, 3)
    _, state = agent.predict(batch, deterministic=True)
    moved = {key: rows.copy() for key, rows in batch.items()}
    moved["desired_goal"][1] += 0.5
    action, after = agent.predict(moved, state, deterministic=True)
    fresh, _ = agent.predict(pick(moved, 1), deterministic=True)
    np.testing.assert_allclose(action[1], fresh, atol=1e-5)
    assert after.position.tolist() == [2, 1, 2]
    np.testing.assert_array_equal(action[::2], state.actions[::2, 1].astype(np.float32))
    again, last = agent.predict(moved, after, deterministic=True)  # and goes on with that plan
    assert last.position.tolist() == [3, 2, 3]
    np.testing.assert_array_equal(again[1], after.actions[1, 1].astype(np.float32))


@pytest.mark.fault("Observations and actions", "a goal with float32 rounding", "the plan goes on")
def test_rounding_of_a_goal_is_no_other_goal(car: MPDiffuserAgent) -> None:
    agent = car.with_options(action_chunk=8)
    one = pick(observations(agent, 1), 0)
    one["desired_goal"] = np.array([3.7, 1e-9])
    _, state = agent.predict(one)
    for jitter in (np.float32(one["desired_goal"]), one["desired_goal"] + 1e-7):
        _, state = agent.predict({**one, "desired_goal": jitter}, state)
    assert state.position[0] == 3
    one["desired_goal"] = one["desired_goal"] + 1e-4
    assert agent.predict(one, state)[1].position[0] == 1


@pytest.mark.fault(
    "Observations and actions",
    "a return, budget or other condition that changes within an episode",
    "a new plan; the cost so far counts",
)
def test_what_is_asked_for_changes_within_an_episode(pendulum: MPDiffuserAgent) -> None:
    agent = pendulum.with_options(action_chunk=8, budget=2.0)
    agent.set_cost(lambda x, u, y: np.full(u.shape[:2], 0.75))
    one = pick(observations(agent, 1), 0)
    _, state = agent.predict(one, deterministic=True)
    other = agent.with_options(return_scale=0.1)
    action, after = other.predict(one, state, deterministic=True)
    assert after.position[0] == 1 and after.budget[0] == 1.25
    expected = other.with_options(budget=1.25).predict(one, deterministic=True)[0]
    np.testing.assert_array_equal(action, expected)
    budgets, positions = [], []
    for budget in (2.0, 2.0, 2.0, 5.0, None, 4.0):  # three steps spend all, the limit is raised
        agent.set_budget(budget)
        _, state = agent.predict(one, state, deterministic=True)
        budgets.append(float(state.budget[0]))
        positions.append(int(state.position[0]))
    assert budgets == [1.25, 0.5, 0.0, 2.0, np.inf, 0.25]
    assert positions == [2, 3, 4, 1, 1, 1]


@pytest.mark.fault(
    "Observations and actions", "a plan for a budget that is NaN, negative or no number", "refused"
)
@pytest.mark.parametrize("bad", [np.nan, -np.inf, -1.0, 10**400, "3", True, 1j])
def test_budgets_are_numbers_of_at_least_zero(pendulum: MPDiffuserAgent, bad: Any) -> None:
    one = pick(observations(pendulum, 1), 0)
    for call in (lambda: pendulum.plan(one, budget=bad), lambda: pendulum.set_budget(bad)):
        with pytest.raises(ConfigError, match="budget: expected a finite number >= 0"):
            call()
    assert pendulum.options.budget is None
    assert pendulum.plan(one, 2, budget=np.inf).feasible.all()
    assert pendulum.with_options(budget=np.float32(2)).options.budget == 2.0


# --- callers' functions ---------------------------------------------------------------------------


def choosing(**changes: Any) -> Any:
    """A ranker whose answer is right but for some fields."""

    def ranker(observations: Array, actions: Array, **known: Any) -> Any:
        return replace(first(observations, actions), **changes)

    return ranker


@pytest.mark.fault(
    "Callers' functions",
    "a ranker that chooses 99, 1.0, −1, True or None, or gives NaN or scores of another shape",
    "refused",
)
@pytest.mark.parametrize(
    ("ranker", "message"),
    [
        *[
            (choosing(chosen=bad), "from 0 to 2 as chosen")
            for bad in (99, 3, -1, 1.0, True, None, "0")
        ],
        (choosing(scores=np.zeros(2)), "scores"),
        (choosing(scores=np.array([0.0, np.nan, 0.0])), "NaN"),
        (choosing(feasible=np.ones((3, 1))), "feasible"),
        (choosing(scores="good"), "scores"),
        (lambda *_, **__: 0, "Ranking, got int"),
        (custom(lambda x, u: np.zeros(2)), r"shape \(3,\), got \(2,\)"),
    ],
)
def test_a_ranker_chooses_a_candidate(lqr: MPDiffuserAgent, ranker: Any, message: str) -> None:
    agent = lqr.with_options(num_candidates=3)
    agent.set_ranker(ranker)
    with pytest.raises(InputError, match=message):
        agent.predict(np.ones(2))


@pytest.mark.fault(
    "Callers' functions", "a ranker that chooses a plan that is not finite", "refused"
)
def test_a_ranker_chooses_what_is_finite(lqr: MPDiffuserAgent, monkeypatch: Any) -> None:
    agent = lqr.with_options(num_candidates=3)
    agent.set_ranker(choosing(chosen=1))
    sample = agent._sample

    def broken(request: Any) -> Any:
        found = sample(request)
        found[1] = np.nan
        return found

    monkeypatch.setattr(agent, "_sample", broken)
    with pytest.raises(InputError, match="plan 1, which is not finite"):
        agent.predict(np.ones(2))


@pytest.mark.fault(
    "Callers' functions",
    "functions that write to what they get, or to what they returned",
    "nothing of ours changes",
)
def test_callers_functions_reach_nothing_of_ours(pendulum: MPDiffuserAgent) -> None:
    agent = pendulum.with_options(num_candidates=3)
    one = pick(observations(agent, 1), 0)
    agent.set_reward(lambda x, u, y: u[..., 0])
    agent.set_cost(lambda x, u, y: 0 * u[..., 0])
    expected, kept = agent.plan(one, deterministic=True), []

    def spoils(values: Any) -> Any:
        def function(*arguments: Any, **known: Any) -> Any:
            found = values(*arguments, **known)
            for array in (*arguments, *known.values()):
                if isinstance(array, np.ndarray):
                    array[:] = 9.0
            kept.append(found)
            return found

        return function

    agent.set_reward(spoils(lambda x, u, y: u[..., 0].copy()))
    agent.set_cost(spoils(lambda x, u, y: 0 * u[..., 0]))
    agent.set_ranker(spoils(lambda x, u, **known: Ranking(known["returns"].copy(), np.ones(3), 1)))
    agent.set_inverse_dynamics(spoils(lambda x, u, y: u.copy()))
    found = agent.plan(one, deterministic=True)
    for values in kept:
        for array in (values, getattr(values, "scores", None)):
            if isinstance(array, np.ndarray):
                array[:] = 9.0
    np.testing.assert_array_equal(found.actions, expected.actions)
    np.testing.assert_array_equal(found.observations, expected.observations)
    np.testing.assert_array_equal(found.scores, expected.returns)
    assert found.chosen == 1 and found.costs.tolist() == [0, 0, 0]


@pytest.mark.fault(
    "Observations and actions", "one row of a batch has no finite plan, or no cost", "names the row"
)
def test_errors_of_a_batch_name_the_row(pendulum: MPDiffuserAgent) -> None:
    agent, rows = pendulum.with_options(), observations(pendulum, 3)
    rows[2, 2] = 7.5
    agent.set_reward(lambda x, u, y: np.where(x[:, :1, 2] == 7.5, np.nan, u[..., 0]))
    with pytest.raises(PlanningError, match="observation 2: none of the 1 candidate"):
        agent.predict(rows)
    agent = pendulum.with_options(budget=1.0)
    agent.set_cost(lambda x, u, y: np.where(x[..., 2] == 7.5, np.nan, 0 * u[..., 0]))
    rows[2, 2] = 0.0
    _, state = agent.predict(rows)
    state = replace(state, observation=np.where(np.eye(3) == 1, 7.5, state.observation))
    with pytest.raises(InputError, match="finite cost, got nan in row 2"):
        agent.predict(rows, state)


@pytest.mark.fault("Callers' functions", "a filter of episodes that returns None", "refused")
def test_filters_say_yes_or_no(pendulum: MPDiffuserAgent) -> None:
    from helpers import play

    source = MemorySource(play("LQR-v0", episodes=2, steps=4), {})
    for answer in (None, 1, "yes", np.ones(2)):
        with pytest.raises(InputError, match="keep: expected True or False"):
            source.where(lambda episode, answer=answer: answer)  # type: ignore[misc]
    kept = source.episode(0).rewards.copy()

    def spoils(episode: Any) -> bool:
        episode.rewards[:] = 9.0
        return True

    assert decided("keep", spoils, source.episode(0)) is True
    np.testing.assert_array_equal(source.where(spoils).episode(0).rewards, kept)


# --- other processes ------------------------------------------------------------------------------


def effort(x: Array, u: Array, y: Array) -> Array:
    """Reward that pickle can name."""
    return -np.abs(u).sum(axis=-1)


def act(agent: MPDiffuserAgent, pipe: Any) -> None:
    """Main function of a process that is given an agent."""
    pipe.send(agent.predict(np.ones(2), deterministic=True)[0])


@pytest.mark.fault("Machine", "an agent that is pickled after set_reward, set_cost", "acts alike")
def test_a_pickled_agent_keeps_its_functions_and_a_copy_its_weights(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options(num_candidates=4)
    agent.set_reward(effort)
    copied = pickle.loads(pickle.dumps(agent))
    plans = [one.plan(np.ones(2), deterministic=True) for one in (agent, copied)]
    np.testing.assert_array_equal(plans[0].returns, plans[1].returns)
    np.testing.assert_array_equal(plans[0].actions, plans[1].actions)
    assert agent.models is lqr.models  # `with_options` copies no weights


@pytest.mark.slow
@pytest.mark.fault("Machine", "an agent as an argument of a spawned or forkserver process", "acts")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_agent_is_an_argument_of_a_process(lqr: MPDiffuserAgent, method: Any) -> None:
    context: Any = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=act, args=(lqr, there))
    process.start()
    assert here.poll(60), "the process gave no action"
    np.testing.assert_array_equal(here.recv(), lqr.predict(np.ones(2), deterministic=True)[0])
    process.join(10)
    assert process.exitcode == 0
