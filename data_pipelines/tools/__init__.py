"""What is done to shards before a run. No module of a run imports one of these."""
