"""Plans with a checkout of the authors' JAX code, one for each line read; see `sampling.py`.

Runs in a Python that has the requirements of that code, and needs nothing of this package.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Build the authors' sampler with random weights, then plan whenever a line comes."""
    options = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the code prints goes to the error stream
    os.sched_setaffinity(0, options["cores"])  # before JAX counts its threads
    sys.path.insert(0, options["checkout"])
    import jax
    from mpdiffuser.model import DynamicsModel, Planner, TrainState
    from mpdiffuser.policy import MPDiffuser

    sizes = {key: options[key] for key in ("nx", "nu", "horizon")}
    networks = [kind(**sizes, n_steps=options["levels"]) for kind in (Planner, DynamicsModel)]
    states = []
    for network in networks:
        variables = network.init(jax.random.PRNGKey(0), *network.get_batch_template())
        states.append(TrainState(variables=variables, ema_variables=variables, opt_state=None))
    policy = MPDiffuser(*networks)
    policy.load_state(*states)
    sample = policy.get_sample_fn(
        options["candidates"], cfg_scale=options["guidance"], temperature=0.5
    )
    start = jax.numpy.zeros((1, options["nx"]))
    returns = jax.numpy.ones((1, 1))
    for number, _ in enumerate(sys.stdin):
        plan = sample(start, jax.random.PRNGKey(number), return_scale=returns)
        jax.block_until_ready(plan)
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
