"""How much a merge changes the spectrum of the token graph, the measure of PiToMe's theorem.

    features = torch.randn(64, 32)
    plan = make_plan(algorithms.get("pitome"), features[None], 48, ctx=context)
    change = spectral_change(token_graph(features), plan.assign[0], plan.n_out)
    change.distance, change.bound        # SD <= N ||L - L_lifted||_2

Measured on clusters with known labels and on the merges of a wrapped model's tower. Which of the
paper's statements hold is said in `report.TRUTHS` and docs/spectral.md; the command is
`pitome-vlm verify`.
"""

from .features import LayerChange, RecordedMerge, TowerChange, merge_changes, recorded_merges
from .graph import (
    SpectralChange,
    coarse_graph,
    composed_groups,
    kept_eigenspace,
    lemma1_error,
    lifted_graph,
    mixed_groups,
    normalised_laplacian,
    spectral_change,
    spectrum,
    token_graph,
)
from .synthetic import LAYOUTS, Assumptions, Clusters, Run, can_merge, merge_clusters

__all__ = [
    "LAYOUTS",
    "Assumptions",
    "Clusters",
    "LayerChange",
    "RecordedMerge",
    "Run",
    "SpectralChange",
    "TowerChange",
    "can_merge",
    "coarse_graph",
    "composed_groups",
    "kept_eigenspace",
    "lemma1_error",
    "lifted_graph",
    "merge_changes",
    "merge_clusters",
    "mixed_groups",
    "normalised_laplacian",
    "recorded_merges",
    "spectral_change",
    "spectrum",
    "token_graph",
]
