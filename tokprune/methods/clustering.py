"""Density-peak clustering of a few tokens, without a device-to-host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core import ops
from ..core.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


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
    x = x.float()
    # Differences, not the product of norms: so that d(i, j) is d(j, i) to the bit, and equal densities are equal.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    density = (-distance.sort(dim=2).values[..., :n_clusters].square().mean(2)).exp()
    places = torch.arange(x.shape[1], device=x.device)
    own, other = density[:, :, None], density[:, None]
    denser = (other > own) | ((other == own) & (places < places[:, None]))  # (G, M, M): column denser than row
    rise = torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(2)
    centres = (density * rise).sort(dim=1, descending=True, stable=True).indices[:, :n_clusters]
    to_centre = distance.gather(2, centres[:, None].expand(-1, x.shape[1], -1))  # (G, M, C)
    nearest = ops.first_highest(-to_centre.flatten(0, 1)).view(x.shape[:2])
    own_cluster = torch.arange(n_clusters, device=x.device).expand_as(centres)
    return centres, nearest.scatter(1, centres, own_cluster)


def cluster_means(x: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Centres as in `density_peaks`, and the mean of every cluster, (G, C, D) float32."""
    centres, clusters = density_peaks(x, n_clusters)
    groups = F.one_hot(clusters, n_clusters).float()  # (G, M, C)
    return centres, groups.transpose(1, 2) @ x.float() / (groups.sum(1) + 1e-6)[..., None]
