"""The weights of a pruned model from statistics of the original alone: no forward pass, so that drafts take no time.

Everything comes in closed form from moments that were measured once: consumers are refit on the original's inputs
(`spa.compensate.closed`), attention heads are mixed (`spa.compensate.rotation`). The refit on the pruned prefix
(`spa.compensate.walk`) starts from there and is more accurate, but runs the pruned model layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spa.compensate.bias import Bias, bias_of
from spa.compensate.closed import Removed, refit_readers
from spa.compensate.rotation import DAMPING, Mixer, Rotation
from spa.least_squares import refit
from spa.measured import Measured
from spa.removal import Mask
from spa.sites import Site, constant_of, exchange, site_of
from spa.twin import Twin


def stitch(
    twin: Twin, measured: Measured, kept: Mask, removed: Sequence[Removed], rotations: Mapping[str, Rotation]
) -> None:
    """Give the pruned model `twin` the weights that make up for what left, as far as single layers can.

    Args:
        twin: the pruned model, which is changed.
        measured: statistics of the original.
        kept: positions that are left of the original.
        removed: groups with the units that left.
        rotations: of the groups whose units are mixed within heads, by name.
    """
    mine = {group.name: rotations[group.name] for group, _ in removed if group.name in rotations}
    mixer = Mixer(measured, mine, kept)
    readers = {c.site: None for r in mixer.rotations for o in r.heads.outlets for c in o.readers}
    mixed = {part.rows.site: None for r in mixer.rotations for part in r.parts}
    if any(group.name not in mine for group, _ in removed):
        before = {site: bias.read().copy() for site in readers if (bias := _bias(twin, site)) is not None}
        refit_readers(twin, measured, removed)
        for site, values in before.items():  # what reads mixed values is refit to these, from its own bias on
            bias = _bias(twin, site)
            assert bias is not None
            bias.write(values)
    mixer.write(twin)
    for site in mixed:
        _narrow(twin, measured, mixer, site)


def _bias(twin: Twin, site: Site) -> Bias | None:
    mirror = site_of(twin.node(site.node))
    return None if mirror is None else bias_of(twin, mirror)


def _narrow(twin: Twin, measured: Measured, mixer: Mixer, site: Site) -> None:
    """Refit a projection with mixed rows to what is left of its inputs."""
    inputs, mix, mirror = mixer.inputs(site), mixer.rows(site), site_of(twin.node(site.node))
    if mix is None or mirror is None or len(inputs) == site.columns:
        return
    joint, weight = measured.joint(site), site.weights[0]
    cross = joint.covariance[0][inputs]
    new = refit(cross[:, inputs], weight @ cross.T, weight[:, inputs], DAMPING)
    exchange(mirror.weight, mirror.stored((mix @ new)[None]))
    lost = weight @ joint.mean_x[0] - new @ joint.mean_x[0][inputs]
    tensor = constant_of(site.bias) if site.bias is not None else None
    own = 0.0 if tensor is None else tensor.numpy().astype(np.float64).reshape(-1) * site.bias_scale
    bias_of(twin, mirror).write(mix @ (own + lost))
