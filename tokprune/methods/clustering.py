"""Density-peak clustering of a few tokens, without a device-to-host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core import ops
from ..core.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-12  # squared distances up to this share of the squared lengths are those of copies


def density_peaks(x: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Clusters around tokens that lie dense and far from all that lie denser.

    The density of a token is exp(-mean squared distance to its `n_clusters` nearest, itself among them); its rise is
    the distance to the nearest denser token, and the largest distance of all for the densest. Centres have the highest
    density x rise; every other token goes to the nearest centre. Distances are divided by sqrt(D).

    Equal densities happen: with two clusters the closest pair always has the same. Then the lower index is the denser,
    and all other ties go to the lower index as well.

    Args:
        x: (G, M, D).
        n_clusters: 1..M.

    Returns:
        Indices of the centres, best first, (G, C) int64, and the cluster of every token, (G, M) int64.
    """
    distance = _distances(x)
    parts = distance.split(max(1, ops.LARGEST // max(1, len(x) * x.shape[1])), 1)
    near = [part.topk(n_clusters, dim=2, largest=False).values.square().mean(2) for part in parts]
    density = (-torch.cat(near, 1)).exp()
    rise = _rises(distance, density)
    centres = (density * rise).sort(dim=1, descending=True, stable=True).indices[:, :n_clusters]
    to_centre = distance.gather(2, centres[:, None].expand(-1, x.shape[1], -1))  # (G, M, C)
    nearest = ops.first_highest(-to_centre.flatten(0, 1)).view(x.shape[:2])
    own_cluster = torch.arange(n_clusters, device=x.device).expand_as(centres)
    return centres, nearest.scatter(1, centres, own_cluster)


def _distances(x: Tensor) -> Tensor:
    """(G, M, M) float32, of (G, M, D), divided by sqrt(D); d(i, j) is d(j, i) to the bit.

    Products in double precision: as near as differences in single precision, at a fraction of their time.
    """
    rows, step = x.double(), 512
    length = rows.square().sum(2)
    distance = torch.empty(*x.shape[:2], x.shape[1], device=x.device)
    for first in range(0, x.shape[1], step):
        here, after = slice(first, first + step), slice(first, None)
        both = length[:, here, None] + length[:, None, after]
        squared = both - 2 * rows[:, here] @ rows[:, after].transpose(1, 2)
        squared = squared.masked_fill(squared < ROUNDING * both, 0) / x.shape[2]
        part = squared.sqrt().float()
        upper = part[:, :, :step].triu(1)
        part[:, :, :step] = upper + upper.transpose(1, 2)
        distance[:, here, after] = part
        distance[:, after, here] = part.transpose(1, 2)
    return distance


def _rises(distance: Tensor, density: Tensor) -> Tensor:
    """(G, M): the distance to the nearest denser token; of the densest one, the largest of all."""
    places = torch.arange(density.shape[1], device=density.device)
    most = distance.amax((1, 2))[:, None, None]
    step, found = max(1, ops.LARGEST // max(1, density.numel())), []
    for at in places.split(step):
        own, other = density[:, at, None], density[:, None]
        denser = (other > own) | ((other == own) & (places < at[:, None]))  # (G, rows, M): column denser than row
        found.append(torch.where(denser, distance[:, at], most).amin(2))
    return torch.cat(found, 1)


def cluster_means(x: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Centres as in `density_peaks`, and the mean of every cluster, (G, C, D) float32."""
    centres, clusters = density_peaks(x, n_clusters)
    groups = F.one_hot(clusters, n_clusters).float()  # (G, M, C)
    return centres, groups.transpose(1, 2) @ x.float() / (groups.sum(1) + 1e-6)[..., None]
