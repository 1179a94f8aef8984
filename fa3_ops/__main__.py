"""`python -m fa3_ops`: versions, devices, backends."""

from fa3_ops.info import report

print(report())
