"""Made-up data to try everything with."""
