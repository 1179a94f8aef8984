"""The commands of `python -m fa3_ops`: what this machine has, doctor, consistency."""
