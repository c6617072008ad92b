"""The engine beside another one, same weights, same machine, same run."""
