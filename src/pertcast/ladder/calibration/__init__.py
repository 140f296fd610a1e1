"""Calibration: how large effects and how wide cells should be, chosen on targets that the fit has not met."""

from pertcast.ladder.calibration.calibrate import calibrate

__all__ = ["calibrate"]
