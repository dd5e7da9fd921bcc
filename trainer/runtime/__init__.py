"""What every stage runs on: arguments, devices and ranks, checkpoints, guard, log, optimizers."""
