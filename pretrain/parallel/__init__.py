"""How a model is spread over devices. DeepSpeed is imported below this folder and nowhere else."""
