"""veRL 0.9 on fa3_ops; docs/verl.md is for its users.

Every process of veRL finds fa3_ops by its entry point in the group `verl.plugins`, which registers
the attention implementations of fa3_ops.integrations.transformers. Of this package

    actor_rollout_ref.model.external_lib=fa3_ops.integrations.verl.batch_invariant

names the module that makes the trainer's linear layers batch-invariant, too.
"""
