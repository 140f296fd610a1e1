"""Calibration: choose how large effects and how wide cells should be, on targets held out of the fit."""

from pertcast.ladder.calibration.calibrate import calibrate

__all__ = ["calibrate"]
