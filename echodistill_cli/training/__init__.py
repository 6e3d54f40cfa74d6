"""The method: steps, losses, batches, critics, optimizers, state and the loop."""
