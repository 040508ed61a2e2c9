"""What a finding rests on beside its study: short scripts that look into trained agents.

Each has a function ``main`` that reads its own command line; `PROBES` lists them for
``python -m studies``.
"""

from __future__ import annotations

__all__ = ["PROBES"]

PROBES = {
    "car-plans": "the shipped car's plans: samples, their means, what the model promises",
    "car-read-off": "the car's planned actions against those read off its planned states",
    "defect": "Table 3 on a walker with a weak foot, on data that this package records",
    "dynamics-accuracy": "how well D-MPC's dynamics model knows where recorded actions lead",
    "encoder": "what the latents of the shipped encoder hold",
    "first-try": "the general preset on environments that are not this package's",
    "inverse-dynamics": "how precisely actions can be read off two successive states",
    "latent-plans": "whether plans made from pictures are possible",
    "noise-width": "how much noise a denoiser of some width carries through",
    "normalizers": "what a bad dimension of the data does to actions, for each normaliser",
}
