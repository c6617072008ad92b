"""How the built-in pair was made: vocabulary, training data, model, optimiser, sampler and checkpoints."""
