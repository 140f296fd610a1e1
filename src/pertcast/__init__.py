"""pertcast: forecast how single cells respond to gene perturbations, and pack a valid challenge submission."""

__version__ = "0.1.0"
