"""What demos, benchmarks and tests share; nothing that a training run needs."""
