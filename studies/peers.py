"""The methods that studies compare, and how fairly they are tuned: one grid for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from studies.estimates import Estimate
from studies.measures import Measure
from studies.networks import Network
from studies.report import LITERAL, OURS, UNPUBLISHED, Ordering
from studies.runner import Contender, Scope

__all__ = [
    "ALONE",
    "BC",
    "DECISION_DIFFUSER_FILM",
    "FILM",
    "LITERAL",
    "OURS",
    "PEERS",
    "RESAMPLED",
    "TWICE",
    "Peer",
    "contender",
    "grid",
    "orderings",
]

BC = "behaviour cloning"
ALONE, TWICE = "planner alone", "planner, levels twice"
RESAMPLED = "MPDiffuser (resampled)"  # each level entered anew after the dynamics model
FILM = "Decision Diffuser, FiLM"


@final
@dataclass(frozen=True)
class Peer:
    """A method of the tables.

    Attributes:
        method: A key of `mpd_gym.agents.AGENTS` whose networks it has; planner and MPDiffuser share
            theirs.
        options: Sampling options that make it.
        changes: Fields of the preset's configuration that differ.
    """

    method: str = "mpdiffuser"
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    def network(self, scope: Scope, env_id: str, seed: int, **fields: Any) -> Network:
        """Its agent.

        Args:
            scope: Of the run.
            env_id: Environment.
            seed: Training seed.
            fields: Of `Network`.
        """
        return scope.network(env_id, seed, self.method, changes=self.changes, **fields)


PEERS: dict[str, Peer] = {
    BC: Peer("behavior_cloning"),
    "Diffuser": Peer("diffuser", {"composition": "planner_only"}),
    "Decision Diffuser": Peer("decision_diffuser", {"composition": "planner_only"}),
    ALONE: Peer(options={"composition": "planner_only"}),
    TWICE: Peer(options={"composition": "planner_resampled"}),
    OURS: Peer(options={"composition": "alternating_matched"}),
    LITERAL: Peer(options={"composition": "alternating"}),
}
"""Name to method. The planner that takes every level twice makes as many network calls as
MPDiffuser (appendix H)."""

DECISION_DIFFUSER_FILM = Peer(
    "decision_diffuser", PEERS["Decision Diffuser"].options, {"initial_state": "film"}
)
"""Decision Diffuser with x_0 as a condition, not inpainted."""


def grid(temperatures: Sequence[float], guidances: Sequence[float]) -> list[dict[str, Any]]:
    """Every pair of options, as `Contender` takes them."""
    return [
        {"temperature": temperature, "guidance_scale": guidance}
        for temperature in temperatures
        for guidance in guidances
    ]


def contender(
    scope: Scope,
    peer: Peer,
    env_id: str,
    measure: Measure,
    options: Mapping[str, Any],
    tried: Sequence[Mapping[str, Any]],
    **fields: Any,
) -> Contender:
    """A method, to be tuned with the first training seed.

    Behaviour cloning samples nothing and has no options. Diffuser follows a value network; where
    there is no return to climb, guidance changes nothing and is not searched.

    Args:
        scope: Of the run.
        peer: The method.
        env_id: Environment.
        measure: What is measured.
        options: Sampling options that all share.
        tried: Options to choose from.
        fields: Of `studies.networks.Network`.
    """
    network = peer.network(scope, env_id, scope.seeds[0], **fields)
    if peer.method == PEERS[BC].method:
        return Contender(network, measure, {}, [{}])
    climbs = any(spec.kind == "return" for spec in network.config.conditions)
    if peer.method == "diffuser" and not climbs:
        tried = [{**one, "guidance_scale": 1.0} for one in tried]
        tried = [one for index, one in enumerate(tried) if one not in tried[:index]]
    return Contender(network, measure, {**options, **peer.options}, tried)


def orderings(
    estimates: Mapping[str, Estimate],
    published: Mapping[str, float],
    place: str = "",
    table: str = "",
) -> list[Ordering]:
    """MPDiffuser (level-matched) above every other method; its own forms are not compared.

    Args:
        estimates: By name, a key of `PEERS`; higher is better.
        published: Values of the paper by name, `LITERAL` among them, where there are any.
        place: Where it was measured.
        table: Of the paper, for the page of results.
    """
    return [
        Ordering(
            f"{OURS} above {name}",
            estimates[OURS],
            estimate,
            f"{published[LITERAL]} : {published[name]}" if name in published else UNPUBLISHED,
            place=place,
            table=table if name in published else "",
        )
        for name, estimate in estimates.items()
        if name not in (OURS, LITERAL)
    ]
