"""What came back: scores of predictions whose truth the user has."""
