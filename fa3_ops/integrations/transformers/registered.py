"""Importing this module registers fa3_ops with transformers, for configuration files that can name
a module and no function."""

from fa3_ops.integrations.transformers import register

register()
