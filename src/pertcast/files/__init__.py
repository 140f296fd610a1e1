"""Files: h5ad, the two scales of expression, manifests and atomic writes."""
