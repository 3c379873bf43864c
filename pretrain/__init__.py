"""Pretraining of vision-language models: configuration, models, objectives, engines, checkpoints, trainer."""
