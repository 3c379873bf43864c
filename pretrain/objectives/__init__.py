"""Pure functions: tensors in, a loss and counts out. Each loss is a mean over this rank's samples, or a sum over their
target tokens divided by how many an average micro-batch has, so that the average over ranks and micro-steps, which data
parallelism takes, is the mean over the global batch."""
