"""Scores of predictions whose truth the user has."""
