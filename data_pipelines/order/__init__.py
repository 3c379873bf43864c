"""Where every sample of a run stands, as arithmetic."""
