"""What goes in: experiment, store, cell sets, perturbation features."""
