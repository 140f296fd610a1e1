"""Input data: experiment, store, cell sets, perturbation features."""
